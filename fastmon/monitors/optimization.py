"""The optimizer's settings: learning rates, momentum, and what a GradScaler does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmon.monitors import Base, Scene
from fastmon.readback import Numbers, floats
from fastmon.sinks import Row

LR, MOMENTUM = "Optimization/lr", "Optimization/momentum"
SKIPPED, SCALE = "Optimization/step_skipped", "Optimization/loss_scale"


class Settings(Base):
    """Reads param_groups as the optimizer steps, so that a scheduler that steps before the row does not show early.

    With a GradScaler `step_skipped` is 1 where it skipped any optimizer. A fused one skips on the device and its
    `found_inf` says so. Any other fires no hook: that the scaler, not the loop, left it out shows in the scaler's own
    account of the step, or, once `scaler.update()` has closed it, in a scale that fell. `loss_scale` is the step's.
    """

    FILLS: ClassVar[tuple[str, ...]] = (LR, "Optimization/lr/<group>", MOMENTUM, SKIPPED, SCALE)

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._names = _group_names(scene.optimizers)
        self._seen: dict[str, Any] = {}
        self._found_inf: list[Tensor] = []
        self._scale: Tensor | float | None = None  # as the step began

    def begin(self, due: frozenset[str]) -> None:
        """Keep the scale; the scaler changes it in place."""
        scale = getattr(self.scene.scaler, "_scale", None)  # None before its first use
        if isinstance(scale, Tensor):
            self._scale = scale.detach().clone()
        else:
            self._scale = getattr(self.scene.scaler, "_init_scale", None)

    def before_update(self, index: int) -> None:
        """Read the groups of this optimizer."""
        self._read(index)
        found = getattr(self.scene.optimizers[index], "found_inf", None)
        if isinstance(found, Tensor):
            self._found_inf.append(found)

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """Host numbers as they are; tensors (a capturable learning rate, the scaler's scale) by the tape."""
        for index in range(len(self.scene.optimizers)):
            if index not in self.scene.stepped:
                self._read(index)
        values = self._seen
        if self.scene.scaler is not None:
            values[SCALE], values[SKIPPED] = self._scaling(self.scene.scaler)
        self._found_inf = []
        host, names, parts = {}, [], []
        for name, value in values.items():
            if (name if name in (LR, MOMENTUM, SKIPPED, SCALE) else "Optimization/lr/<group>") not in due:
                continue
            if isinstance(value, Tensor):
                names.append(name)
                parts.append(value.detach().to(self.scene.device, torch.float32).reshape(1))
            elif value is not None:
                host[name] = value
        return parts, (host, names)

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Names as they came."""
        host, names = note
        row.values.update(host)
        row.values.update(zip(names, floats(numbers), strict=True))

    def _scaling(self, scaler: Any) -> tuple[Tensor | float | None, Tensor | float]:
        """The scale that the step used, and whether an optimizer was skipped."""
        scale = getattr(scaler, "_scale", None)
        account = getattr(scaler, "_per_optimizer_states", None)  # empty once update() was called
        before = None if scale is None else scale if account else self._scale
        signs = [f.reshape(()) > 0 for f in self._found_inf]
        missing = [o for i, o in enumerate(self.scene.optimizers) if i not in self.scene.stepped]
        if missing and account:
            if any(id(o) in account and account[id(o)]["stage"].name == "STEPPED" for o in missing):
                return before, 1.0
        elif missing and scale is not None and before is not None:
            signs.append(scale.detach().reshape(()) < before)
        return before, torch.stack(signs).any() if signs else 0.0

    def _read(self, index: int) -> None:
        for place, group in enumerate(self.scene.optimizers[index].param_groups):
            name = self._names.get((index, place), f"{index}.{place}")  # groups may be added later
            if len(self._names) > 1:
                self._seen[f"Optimization/lr/{name}"] = group["lr"]
            if index == place == 0:
                self._seen[LR] = group["lr"]
                if "momentum" in group or "betas" in group:
                    self._seen[MOMENTUM] = group["momentum"] if "momentum" in group else group["betas"][0]


def _group_names(optimizers: Sequence[torch.optim.Optimizer]) -> dict[tuple[int, int], str]:
    """(optimizer, group) -> a name: the group's own "name", else its optimizer's class, numbered where it must be."""
    names: dict[tuple[int, int], str] = {}
    for index, optimizer in enumerate(optimizers):
        for place, group in enumerate(optimizer.param_groups):
            kind = type(optimizer).__name__.lower()
            name = str(group.get("name") or (kind if len(optimizer.param_groups) == 1 else f"{kind}.{place}"))
            names[index, place] = name if name not in names.values() else f"{name}.{index}.{place}"
    return names
