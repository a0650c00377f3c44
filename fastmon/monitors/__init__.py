"""Observers: what is measured, each behind the same small protocol (`fastmon.metrics.Observer`).

`OBSERVERS` is the table that the monitor iterates. An observer is built only where one of its metrics can fire. It
reads what the loop's calls left in the `Scene`, hands fp32 device tensors to the tape, and turns the same numbers into
named values on the host, later. Nothing before `decode` may wait for the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastmon.plan import Plan
from fastmon.readback import Numbers
from fastmon.sinks import Row

OBSERVERS: tuple[str, ...] = (
    "optimization:Settings",
    "gradients:Gradients",
    "noise_scale:NoiseScale",
    "spectral:SpectralNorms",
    "parameters:Parameters",
    "activations:Activations",
    "throughput:Throughput",
)  # in the order of enqueue; Throughput last, so that it sees what the others cost


@dataclass(slots=True)
class Scene:
    """What observers know: facts of the run, and what the calls of the current step left behind."""

    model: nn.Module  # without wrappers
    plan: Plan
    device: torch.device
    preset: str
    active: frozenset[str]  # metrics that can ever fire
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    scaler: Any = None
    modules: str | None = None
    world_size: int = 1
    samples_per_step: int | None = None
    tokens_per_step: int | None = None
    flops_per_token: float | None = None
    total_steps: int | None = None
    compute_dtype: torch.dtype | None = None  # of the matrix products; None: the parameters'
    spent_ms: float = 0.0  # the monitor's own host time that no row has reported yet
    paused_ms: dict[str, float] = field(default_factory=dict)  # pauses by kind that no row has reported yet
    buffers_bytes: int = 0  # memory of all observers' buffers
    tape_bytes: int = 0
    step: int = 1  # the step under way
    reader: Any = None  # monitors.gradients.GradientReader
    read: Any = None  # its Reading of the gradients before clipping, where the loop asked for it
    coefficient: Tensor | None = None  # () fp32, what the monitor clipped by
    normed: tuple[int, ...] = ()  # pieces whose norm after the step comes with row.shared["fro"]
    stepped: set[int] = field(default_factory=set)  # optimizers that have stepped

    def forget(self, step: int) -> None:
        """Begin a step: nothing has happened in it yet."""
        self.step, self.read, self.coefficient, self.normed = step, None, None, ()
        self.stepped.clear()


class Base:
    """An observer that does nothing: subclasses override the calls they need (see `fastmon.metrics.Observer`)."""

    FILLS: ClassVar[tuple[str, ...]] = ()
    ARMED: ClassVar[bool] = False  # whether `enqueue` can only give what `begin` was told is due

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def hold(self, *buffers: Tensor) -> None:
        """Count buffers that it keeps into the monitor's memory."""
        self.scene.buffers_bytes += sum(b.numel() * b.element_size() for b in buffers)

    def begin(self, due: frozenset[str]) -> None:
        """A step begins in which `due` will be asked for."""

    def micro_step(self, reduced: bool) -> None:
        """One micro-batch's backward pass is done, more follow; `reduced`: the gradients are those of all ranks."""

    def before_update(self, index: int) -> None:
        """Optimizer `index` is about to step."""

    def after_update(self, index: int) -> None:
        """Optimizer `index` has stepped."""

    def pause(self) -> None:
        """Evaluation or a checkpoint begins: what follows is not training."""

    def resume(self) -> None:
        """Training goes on."""

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """The step's device numbers (flat fp32), and what the host needs to name them."""
        return (), None

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Name the numbers in `row`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def close(self) -> None:
        """Let go of hooks."""


def observer_classes() -> list[type[Base]]:
    """The classes of `OBSERVERS`, in order."""
    found = []
    for path in OBSERVERS:
        module, _, name = path.partition(":")
        found.append(getattr(importlib.import_module(f"fastmon.monitors.{module}"), name))
    return found
