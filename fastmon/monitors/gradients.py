"""Gradient norms and non-finite counts, and clipping, from one read of the gradients.

Clipping needs the global norm before it can multiply; that read gives everything else here. The coefficient is
min(1, max_norm / (norm + 1e-6)), on the device: no branch and no wait. It equals torch's for finite gradients; where
an element is Inf or NaN it is 0, which is torch's answer to Inf: finite tensors get a zero gradient and their weights
survive the step (torch's answer to one NaN is NaN everywhere).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmon.monitors import Base, Scene
from fastmon.plan import Plan, owners_of, split_param
from fastmon.readback import Numbers, counts, floats, global_norm, words
from fastmon.sinks import Row

NORM, NONFINITE = "Gradients/norm/<param>", "Gradients/nonfinite"
GLOBAL, CLIPPED = "Optimization/grad_norm", "Optimization/grad_norm_clipped"


@dataclass(frozen=True, slots=True)
class Reading:
    """One read of the gradients that were there: norms and non-finite counts per piece."""

    l2: Tensor  # (n,) fp32
    nonfinite: Tensor  # (n,) int64
    slots: tuple[int, ...] | None  # which of the reader's names; None: all pieces of the plan
    scale: Tensor | None = (
        None  # () what the gradients are multiplied by (a GradScaler with a fused optimizer)
    )


class GradientReader:
    """Reads and clips every gradient of a model. A parameter without a gradient is left out.

    Parameters that the plan leaves out, because they were frozen when it was made, take part from their first gradient
    on. ValueError for complex parameters, sparse gradients and gradients on another device.
    `names` and `logged` (chosen by the regex `params`): the plan's pieces, then those of the parameters outside.
    """

    def __init__(self, plan: Plan, model: nn.Module, *, params: str | None = None) -> None:
        self._plan = plan
        owners, planned, wanted = owners_of(model), set(plan.parameters), re.compile(params or "")
        outside = [(n, p) for n, p in model.named_parameters() if p not in planned]
        self._outside = [p for _, p in outside]
        self._cuts = [(n.replace("_orig_mod.", ""), owners[p]) for n, p in outside]
        for name, p in outside:
            if p.is_complex() and p.requires_grad:
                raise ValueError(f"the parameter {name} is complex ({p.dtype}): real parameters are wanted")
        self.names = [piece.name for piece in plan.pieces]
        self.logged = [piece.logged for piece in plan.pieces]
        self._places: list[tuple[int, ...]] = []  # of each parameter outside, among the names
        for (name, owner), p in zip(self._cuts, self._outside, strict=True):
            parts = [part for part, _ in split_param(name, p.detach(), owner)]
            self._places.append(tuple(range(len(self.names), len(self.names) + len(parts))))
            self.names += parts
            self.logged += [bool(wanted.search(part)) for part in parts]
        self._moments = plan.prepare("moments", plan.weights(), 2)
        self._slots: dict[tuple[bool, ...], tuple[int, ...]] = {}

    def read(self, *, scale: Tensor | None = None) -> Reading | None:
        """One read of all gradients; None where there is none."""
        grads = [p.grad for p in self._plan.parameters]
        there = [g for g in grads if g is not None]
        late = [i for i, p in enumerate(self._outside) if p.grad is not None]
        if not there and not late:
            return None
        if any(g.is_sparse for g in there):
            raise ValueError(
                f"{self._sparse()} has a sparse gradient: dense gradients are wanted (sparse=False)"
            )
        with torch.no_grad():
            if len(there) == len(grads) and not late:
                numbers, stats = self._moments(self._plan.views(there), 2)
                return Reading(stats[6], numbers[2], None, scale)
            index = [i for i, g in enumerate(grads) if g is not None]
            views, slots = (
                self._plan.views(there, index),
                self._slots_of(tuple([g is not None for g in grads])),
            )
            for i in late:
                views += self._late(i)
                slots += self._places[i]
            numbers, stats = self._moments(views, 2)
            return Reading(stats[6], numbers[2], slots, scale)

    def clip(self, reading: Reading, max_norm: float) -> tuple[Tensor, Tensor]:
        """Multiply the gradients in place; returns the global norm before and the coefficient, each () fp32."""
        with torch.no_grad():
            total = torch.linalg.vector_norm(reading.l2)
            coefficient = (max_norm / (total + 1e-6)).clamp_(max=1.0).nan_to_num_(nan=0.0)
            parameters = (*self._plan.parameters, *self._outside)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], coefficient)
        return total, coefficient

    def _late(self, i: int) -> list[Tensor]:
        """The pieces of a gradient that the plan does not know."""
        (name, owner), grad = self._cuts[i], self._outside[i].grad
        assert grad is not None
        if grad.is_complex() or grad.is_sparse or grad.device != self._plan.device:
            raise ValueError(
                f"the gradient of {name} is {grad.dtype}, {grad.layout} and on {grad.device}: "
                f"a real, dense one on {self._plan.device} is wanted"
            )
        return [view for _, view in split_param(name, grad, owner)]

    def _sparse(self) -> str:
        pairs = zip(self._plan.names, self._plan.parameters, strict=True)
        return next(name for name, p in pairs if p.grad is not None and p.grad.is_sparse)

    def _slots_of(self, has: tuple[bool, ...]) -> tuple[int, ...]:
        if has not in self._slots:
            self._slots[has] = tuple(i for i, piece in enumerate(self._plan.pieces) if has[piece.parameter])
        return self._slots[has]


class Gradients(Base):
    """Global and per-parameter norms, and the first parameter with a non-finite element.

    Where the loop clips through the monitor, or calls `before_clip`, the norms are those before clipping. Otherwise
    they are of what the optimizer receives, and `grad_norm` is absent: nobody can tell whether the loop has clipped.
    """

    FILLS: ClassVar[tuple[str, ...]] = (NORM, NONFINITE, GLOBAL, CLIPPED)

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._names, self._logged = scene.reader.names, scene.reader.logged
        self._keys = [f"Gradients/norm/{name}" for name in self._names]
        self._all_logged = all(self._logged)
        self._received: Reading | None = None
        self._wanted = False

    def begin(self, due: frozenset[str]) -> None:
        """Remember whether a read of our own would be of use."""
        self._received = None
        self._wanted = not due.isdisjoint(self.FILLS)
        self._wanted_after = CLIPPED in due

    def before_update(self, index: int) -> None:
        """Read what the optimizer receives, unless clipping has told already."""
        if self._received is not None or self.scene.coefficient is not None:
            return
        if self._wanted if self.scene.read is None else self._wanted_after:
            self._received = self.scene.reader.read(
                scale=getattr(self.scene.optimizers[index], "grad_scale", None)
            )

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """Norms, counts, the coefficient and the scale."""
        if due.isdisjoint(self.FILLS):
            return (), None
        if self.scene.read is None and self._received is None and not self.scene.optimizers:
            self._received = self.scene.reader.read()
        parts: list[Tensor] = []
        readings: list[tuple[tuple[int, ...] | None, int, bool] | None] = []
        for reading in (self.scene.read, self._received):
            if reading is None:
                readings.append(None)
            else:
                parts += [reading.l2, words(reading.nonfinite)]
                if reading.scale is not None:
                    parts.append(reading.scale.to(torch.float32).reshape(1))
                readings.append((reading.slots, reading.l2.numel(), reading.scale is not None))
        clipped = self.scene.coefficient is not None
        if self.scene.coefficient is not None:
            parts.append(self.scene.coefficient.reshape(1))
        return parts, (due, readings, clipped)

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Roots over the norms; the name of the first parameter with a non-finite element."""
        if note is None:
            return
        due, readings, clipped = note
        at, done = 0, list[tuple[tuple[int, ...] | None, Numbers, Numbers] | None]()
        for reading in readings:
            if reading is None:
                done.append(None)
                continue
            slots, n, scaled = reading
            norms, bad = numbers[at : at + n], counts(numbers[at + n : at + 3 * n])
            at += 3 * n
            if scaled:
                norms = norms / numbers[at]
                at += 1
            done.append((slots, norms, bad))
        before, received = done
        if before is not None:
            total = row.shared["grad_norm"] = global_norm(before[1])
            if GLOBAL in due:
                row.values[GLOBAL] = total
            if clipped and CLIPPED in due:
                row.values[CLIPPED] = total * float(numbers[at])
        if received is not None and CLIPPED in due:
            row.values[CLIPPED] = global_norm(received[1])
        if (first := before or received) is not None:
            self._per_parameter(*first, due, row)

    def _per_parameter(
        self, slots: tuple[int, ...] | None, norms: Numbers, bad: Numbers, due: frozenset[str], row: Row
    ) -> None:
        if NORM in due:
            keys = self._keys[: len(norms)] if slots is None else [self._keys[i] for i in slots]
            pairs = zip(keys, floats(norms), strict=True)
            if self._all_logged:
                row.params.update(pairs)
            else:
                where = range(len(norms)) if slots is None else slots
                row.params.update(pair for i, pair in zip(where, pairs, strict=True) if self._logged[i])
        if NONFINITE in due:
            total = int(bad.sum())
            row.values[NONFINITE] = float(total)
            if total and not row.values.get("Optimization/step_skipped"):
                first = int(bad.nonzero()[0][0])
                name = self._names[first if slots is None else slots[first]]
                row.event("nonfinite_gradient", parameter=name, count=int(bad[first]), total=total)
