"""Parameter norms, and what a step changed: update norm and update ratio.

The update is |w' - w| with w copied just before the optimizer steps (1x the memory of those parameters, and one copy a
step); one read of w' and w gives the norms of both the change and the weight. An optimizer that offers `observe` and
`observations` (fastmon.optim.Muon) reports its updates itself, per parameter, against the weight before the step; its
parameters are not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastmon.monitors import Base, Scene
from fastmon.readback import Numbers, floats, global_norm
from fastmon.sinks import Row

PARAM_NORM, UPDATE_NORM, LARGEST = "Model/param_norm", "Optimization/update_norm", "Optimization/update_ratio"
RATIO = "Optimization/update_ratio/<param>"
SPECTRUM = {
    "update_spectral_norm": "Optimization/update_spectral_norm/<param>",
    "update_stable_rank": "Optimization/update_stable_rank/<param>",
}
_UPDATE = frozenset({UPDATE_NORM, LARGEST, RATIO})


@dataclass(frozen=True, slots=True)
class _Lists:
    """For one set of optimizers that have stepped: which pieces meet their copy, and which are only read."""

    paired: list[int]
    copies: list[Tensor]  # views of the copies, in the order of `paired`
    alone: list[int]


class Parameters(Base):
    """Norms of all trained parameters after the step; update norms of those whose optimizer has stepped."""

    FILLS: ClassVar[tuple[str, ...]] = (PARAM_NORM, UPDATE_NORM, LARGEST, RATIO, *SPECTRUM.values())

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        plan = scene.plan
        self._index = {p: i for i, p in enumerate(plan.parameters)}
        self._mine = [
            sorted({self._index[p] for group in o.param_groups for p in group["params"] if p in self._index})
            for o in scene.optimizers
        ]
        self._reporting = [i for i, o in enumerate(scene.optimizers) if hasattr(o, "observations")]
        self._asked = (False, False)  # of the reporting optimizers: norms, spectrum
        logged = {piece.parameter for piece in plan.pieces if piece.logged}
        self._stems = [name if i in logged else None for i, name in enumerate(plan.names)]
        self._keys = [f"Optimization/update_ratio/{p.name}" if p.logged else None for p in plan.pieces]
        copying = [i for i, mine in enumerate(self._mine) if mine and i not in self._reporting]
        self._copies: dict[int, list[Tensor]] = {}  # by optimizer
        if not _UPDATE.isdisjoint(scene.active):
            self._copies = {i: [plan.parameters[p].detach().clone() for p in self._mine[i]] for i in copying}
        self._lists: dict[tuple[tuple[int, ...], tuple[int, ...]], _Lists] = {}
        self._copied: list[int] = []
        self._moments = plan.prepare("moments", plan.weights(), 2)
        copies = self._lists_for(tuple(self._copies), ()).copies
        self._pair_moments = plan.prepare("pair_moments", copies, copies)
        self.hold(*copies)

    def begin(self, due: frozenset[str]) -> None:
        """Whether the coming step wants copies, and reports."""
        self._copied.clear()
        self._ask(not _UPDATE.isdisjoint(due), not due.isdisjoint(SPECTRUM.values()))

    def before_update(self, index: int) -> None:
        """Copy the parameters of this optimizer, unless it reports its updates itself."""
        if not self._asked[0] or index not in self._copies or index in self._copied:
            return
        parameters: list[Tensor] = [self.scene.plan.parameters[i] for i in self._mine[index]]
        with torch.no_grad():
            torch._foreach_copy_(self._copies[index], parameters)
        self._copied.append(index)

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """One read of the copied pairs, one of the pieces whose norm nobody has, and the optimizers' reports."""
        if due.isdisjoint(self.FILLS):
            return (), None
        parts: list[Tensor] = []
        reports = self._reports(due, parts)
        normed = self.scene.normed
        lists = self._lists_for(tuple(self._copied), normed)
        weights = self.scene.plan.weights()
        with torch.no_grad():
            if lists.paired:
                (rows,) = self._pair_moments([weights[i] for i in lists.paired], lists.copies)
                parts += [rows[4], rows[6]]
            alone = lists.alone if PARAM_NORM in due else []
            if alone:
                chosen = weights if len(alone) == len(weights) else [weights[i] for i in alone]
                parts.append(self._moments(chosen, 2)[1][6])
        return parts, (due, reports, lists.paired, normed)

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Ratios and roots. A ratio to a weight of 0 is undefined and left out."""
        if note is None:
            return
        due, reports, paired, normed = note
        changes, ratios, at = [], dict[str, float](), 0
        for metric, parameters in reports:
            values = numbers[at : at + len(parameters)].astype(np.float64)
            at += len(parameters)
            keys = [self._stems[i] for i in parameters]
            if metric == UPDATE_NORM:
                before = numbers[at : at + len(parameters)]
                at += len(parameters)
                changes.append(values)
                _divide(values, before, [k and f"Optimization/update_ratio/{k}" for k in keys], ratios)
            else:
                stem = metric.removesuffix("<param>")
                row.params.update((stem + k, v) for k, v in zip(keys, floats(values), strict=True) if k)
        n = len(paired)
        weight, change, alone = numbers[at : at + n], numbers[at + n : at + 2 * n], numbers[at + 2 * n :]
        if PARAM_NORM in due:
            known = set(paired)
            fro = [f for slot, f in zip(normed, row.shared.get("fro", ()), strict=False) if slot not in known]
            row.values[PARAM_NORM] = global_norm(np.concatenate([weight, alone, fro]))
        if n:
            changes.append(change.astype(np.float64))
            _divide(changes[-1], weight, [self._keys[i] for i in paired], ratios)
        if not changes:
            return
        if UPDATE_NORM in due:
            row.values[UPDATE_NORM] = global_norm(np.concatenate(changes))
        if RATIO in due:
            row.params.update(ratios)
        if LARGEST in due and ratios:
            row.values[LARGEST] = float(np.max(list(ratios.values())))  # NaN wins

    def close(self) -> None:
        """Ask for no more reports."""
        self._ask(False, False)

    def _ask(self, norms: bool, spectrum: bool) -> None:
        if (norms, spectrum) != self._asked:
            self._asked = (norms, spectrum)
            for index in self._reporting:
                optimizer: Any = self.scene.optimizers[index]
                optimizer.observe(norms=norms, spectrum=spectrum)

    def _reports(self, due: frozenset[str], parts: list[Tensor]) -> list[tuple[str, list[int]]]:
        """Put the optimizers' own numbers into `parts`; returns (metric, parameters), in their order."""
        order: list[tuple[str, list[int]]] = []
        for index in self._reporting:
            if index not in self.scene.stepped:
                continue
            optimizer: Any = self.scene.optimizers[index]
            seen = {
                self._index[p]: report for p, report in optimizer.observations().items() if p in self._index
            }
            for word, metric in (("update_norm", UPDATE_NORM), *SPECTRUM.items()):
                which = [i for i, report in seen.items() if word in report]
                wanted = not _UPDATE.isdisjoint(due) if metric == UPDATE_NORM else metric in due
                if which and wanted:
                    parts.append(torch.stack([seen[i][word] for i in which]))
                    if metric == UPDATE_NORM:
                        parts.append(torch.stack([seen[i]["param_norm"] for i in which]))
                    order.append((metric, which))
        return order

    def _lists_for(self, copied: tuple[int, ...], normed: tuple[int, ...]) -> _Lists:
        if (copied, normed) not in self._lists:
            plan = self.scene.plan
            copies = {p: t for o in copied for p, t in zip(self._mine[o], self._copies[o], strict=True)}
            chosen = sorted(copies)
            paired = [i for i, piece in enumerate(plan.pieces) if piece.parameter in copies]
            known = {*paired, *normed}
            alone = [i for i in range(len(plan.pieces)) if i not in known]
            self._lists[copied, normed] = _Lists(
                paired, plan.views([copies[p] for p in chosen], chosen), alone
            )
        return self._lists[copied, normed]


def _divide(
    change: Numbers,  # (n,) fp64
    weight: Numbers,  # (n,)
    keys: Sequence[str | None],  # None: not logged
    ratios: dict[str, float],  # written
) -> None:
    defined = weight != 0
    values = floats(change / np.where(defined, weight, 1))
    ratios.update((k, v) for k, v, there in zip(keys, values, floats(defined), strict=True) if k and there)
