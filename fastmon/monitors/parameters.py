"""Parameter norms, and what a step changed: update norm and update ratio.

The update is |w' - w| with w copied just before the optimizer steps (1x the memory of those parameters, and one copy a
step). An optimizer that offers `observations()` with an "update_norm" (fastmon.optim.Muon) saves both: its parameters
are not copied. One read of w' and w gives the norms of both the change and the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastmon.monitors import Base, Scene
from fastmon.ops.pair_moments import op as pair_moments
from fastmon.readback import Numbers, floats, global_norm
from fastmon.sinks import Row

PARAM_NORM, UPDATE_NORM, LARGEST = "Model/param_norm", "Optimization/update_norm", "Optimization/update_ratio"
RATIO = "Optimization/update_ratio/<param>"
SIGMA, STABLE = "Optimization/update_spectral_norm/<param>", "Optimization/update_stable_rank/<param>"
_UPDATE = frozenset({UPDATE_NORM, LARGEST, RATIO})
_OBSERVED = {"update_spectral_norm": SIGMA, "update_stable_rank": STABLE}  # key of observations() -> metric


@dataclass(frozen=True, slots=True)
class _Lists:
    """For one set of optimizers that have stepped: which pieces are compared with their copy, which are only read."""

    paired: list[int]
    copies: list[Tensor]  # views of the copies, in the order of `paired`
    alone: list[int]
    order: Numbers  # paired + alone


class Parameters(Base):
    """Norms of all trained parameters after the step; update norms of those whose optimizer has stepped."""

    FILLS: ClassVar[tuple[str, ...]] = (PARAM_NORM, UPDATE_NORM, LARGEST, RATIO, SIGMA, STABLE)

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        plan = scene.plan
        self._names = [piece.name for piece in plan.pieces]
        self._ratio_keys = [f"Optimization/update_ratio/{name}" for name in self._names]
        self._logged = np.array([piece.logged for piece in plan.pieces], dtype=bool)
        index = {id(p): i for i, p in enumerate(plan.parameters)}
        self._mine = [
            sorted({index[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in index})
            for optimizer in scene.optimizers
        ]
        self._copies: dict[int, list[Tensor]] = {}  # by optimizer
        self._lists: dict[tuple[int, ...], _Lists] = {}
        self._due_update = False
        self._copied: list[int] = []
        self._moments = plan.prepare("moments", plan.weights(), 2)

    def begin(self, due: frozenset[str]) -> None:
        """Whether the coming step wants copies."""
        self._due_update = not _UPDATE.isdisjoint(due)
        self._copied.clear()

    def before_update(self, index: int) -> None:
        """Copy the parameters of this optimizer."""
        if not self._due_update or index in self._copied:
            return
        parameters: list[Tensor] = [self.scene.plan.parameters[i] for i in self._mine[index]]
        with torch.no_grad():
            if index not in self._copies:
                self._copies[index] = [torch.empty_like(p) for p in parameters]
                self.hold(*self._copies[index])
            torch._foreach_copy_(self._copies[index], parameters)
        self._copied.append(index)

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """One read of the copied pairs, and one of the parameters that have no copy."""
        if not self._due_update and PARAM_NORM not in due:
            return (), None
        lists = self._lists_for(tuple(self._copied))
        weights = self.scene.plan.weights()
        parts: list[Tensor] = []
        with torch.no_grad():
            if lists.paired:
                chosen = weights if not lists.alone else [weights[i] for i in lists.paired]
                rows = pair_moments(chosen, lists.copies)
                parts += [rows[4], rows[6]]
            if lists.alone and PARAM_NORM in due:
                chosen = weights if not lists.paired else [weights[i] for i in lists.alone]
                parts.append(self._moments(chosen, 2)[1][6])
        return parts, (due, lists)

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Ratios and roots. A ratio to a weight of 0 is undefined and left out."""
        if note is None:
            return
        due, lists = note
        n = len(lists.paired)
        weight, update, alone = numbers[:n], numbers[n : 2 * n].astype(np.float64), numbers[2 * n :]
        if PARAM_NORM in due and len(lists.order):
            row.values[PARAM_NORM] = global_norm(np.concatenate([weight, alone]))
        if not n or _UPDATE.isdisjoint(due):
            return
        if UPDATE_NORM in due:
            row.values[UPDATE_NORM] = global_norm(update)
        paired = lists.order[:n]
        there = (weight != 0) & self._logged[paired]
        ratios = update[there] / weight[there]
        if RATIO in due:
            row.params.update(zip([self._ratio_keys[i] for i in paired[there]], floats(ratios), strict=True))
        if LARGEST in due and len(ratios):
            row.values[LARGEST] = float(ratios.max())  # NaN wins

    def _lists_for(self, copied: tuple[int, ...]) -> _Lists:
        if copied not in self._lists:
            plan = self.scene.plan
            copies = {p: t for o in copied for p, t in zip(self._mine[o], self._copies[o], strict=True)}
            chosen = sorted(copies)
            paired = [i for i, piece in enumerate(plan.pieces) if piece.parameter in copies]
            alone = [i for i, piece in enumerate(plan.pieces) if piece.parameter not in copies]
            views = plan.views([copies[p] for p in chosen], chosen)
            self._lists[copied] = _Lists(paired, views, alone, np.array(paired + alone, dtype=np.int64))
        return self._lists[copied]
