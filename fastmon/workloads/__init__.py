"""What a run trains: model, batches, loss and evaluation behind one protocol; the loop knows none by name.

WORKLOADS is the table of `--workload`, MODES that of `--mode`; both are plain names, and importing them
imports no torch. `load(name)` brings the class.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fastmon.workloads.presets import PRESETS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Batch = tuple[Tensor, ...]


class Workload(Protocol):
    """One job. Its random draws come from cfg["seed"] alone, never from torch's global generators.

    `model` may be replaced by a wrapper with the same call (DDP, torch.compile) after `optimizer_groups()`
    was read; `loss` and `evaluate` call whatever stands there.
    """

    name: str
    model: nn.Module
    samples_per_micro_batch: int  # of one micro-batch, which one rank computes
    tokens_per_micro_batch: int
    flops_per_token: float  # training FLOPs, forward and backward

    @classmethod
    def build(
        cls,
        cfg: Mapping[str, Any],
        device: torch.device,
        *,
        rank: int,
        world_size: int,
    ) -> Workload:
        """Make data and model for this rank; ValueError or FileNotFoundError, one sentence, on bad input."""
        ...

    def batches(self, *, start: int) -> Iterator[Batch]:
        """Yield training micro-batches on the host, endlessly: start + rank, start + rank + world_size, ...

        `start` counts the micro-batches that all ranks together have consumed. Which samples micro-batch
        number m holds depends on the configuration and m only, so any number of ranks reads the same data and
        a resumed run goes on where it stopped.
        """
        ...

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch on the workload's device, without making the host wait."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a micro-batch on the device, 0-d, with grad."""
        ...

    def evaluate(self, *, max_batches: int) -> dict[str, float]:
        """Return {"Loss/val_loss": ...} over at most `max_batches` fixed batches; every rank calls it.

        Waits for the device. Leaves the model in the mode (train or eval) it was in.
        """
        ...

    def optimizer_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return {"matrix": hidden matrices, "other": every other parameter}."""
        ...

    def describe(self) -> dict[str, str | int | float]:
        """Return what the start-up lines and the run's record say about this job."""
        ...


WORKLOADS: dict[str, str] = {"gpt": "fastmon.workloads.gpt:GPTWorkload"}
MODES: tuple[str, ...] = tuple(PRESETS)


def load(name: str) -> type[Workload]:
    """Return the workload class of a WORKLOADS row; ValueError on an unknown name."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; the workloads are {', '.join(WORKLOADS)}")
    module, _, attribute = WORKLOADS[name].partition(":")
    workload: type[Workload] = getattr(importlib.import_module(module), attribute)
    return workload
