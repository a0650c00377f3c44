"""The default training job as a callable step, so that monitored and unmonitored copies can be interleaved.

Every copy has its own model, optimizers and data position, seeded alike. Observing changes nothing (that is
tested), so all copies do the very same arithmetic, and a difference in time is the monitor's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmon.config import Config, apply_mode_defaults
from fastmon.metrics import METRICS
from fastmon.monitor import Monitor
from fastmon.optim import Muon
from fastmon.sinks import Jsonl
from fastmon.workloads import load

MONITORS: dict[str, tuple[str, ...]] = {  # parts of a preset as globs: every METRICS row is in exactly one
    "loss, lr and time": ("Loss/*", "Optimization/lr*", "Optimization/momentum", "Optimization/loss_scale",
                          "Optimization/step_skipped", "Time/*"),
    "gradient norms": ("Optimization/grad_norm*", "Gradients/*"),
    "parameter norm": ("Model/param_norm",),
    "spectral norms": ("Model/spectral_*", "Model/stable_rank*"),
    "update norms": ("Optimization/update_*",),
    "activations": ("Activations/*",),
    "memory and MFU": ("Hardware/*",),
}  # fmt: skip

PRESETS = ("cheap", "usual", "full")


def monitor_options(variant: str) -> dict[str, Any]:
    """What to give to Monitor: a preset by its name, or one part of `full` alone by its name in MONITORS."""
    if variant in ("off", *PRESETS):
        return {"preset": variant}
    return {"preset": "full", "every": {"*": 0} | dict.fromkeys(MONITORS[variant], 1)}


@dataclass
class Job:
    """One copy of the training loop; `step()` is one optimizer step, accumulation included, observed or
    not."""

    variant: str
    cfg: Mapping[str, Any]
    device: torch.device
    steps: int = 0
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.workload = load(cfg["workload"]).build(cfg, self.device, rank=0, world_size=1)
        groups = self.workload.optimizer_groups()
        matrices, others = groups["matrix"], groups["other"]
        fused = {"fused": True} if self.device.type == "cuda" else {}
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=cfg["lr"], weight_decay=cfg["weight_decay"]),
            torch.optim.AdamW(others, lr=cfg["lr"], weight_decay=0.0, **fused),
        ]
        tokens = self.workload.tokens_per_micro_batch * cfg["grad_accum"]
        self.monitor = Monitor(
            self.workload.model,
            self.optimizers,
            sinks=[Jsonl(Path(self._folder.name))],
            samples_per_step=self.workload.samples_per_micro_batch * cfg["grad_accum"],
            tokens_per_step=tokens,
            flops_per_token=self.workload.flops_per_token,
            **monitor_options(self.variant),
        )
        self._batches = self.workload.batches(start=0)
        self._autocast = torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self) -> None:
        """Forward and backward over the micro-batches, clip, update, observe."""
        self.steps += 1
        accum = self.cfg["grad_accum"]
        total = torch.zeros((), device=self.device)
        for micro in range(accum):
            batch = self.workload.to_device(next(self._batches))
            with self._autocast:
                loss = self.workload.loss(batch) / accum
            loss.backward()
            total += loss.detach()
            if micro < accum - 1:
                self.monitor.micro_step()
        self.monitor.clip_grad_norm_(self.cfg["grad_clip"])
        for optimizer in self.optimizers:
            optimizer.step()
        self.monitor.step(self.steps, {"Loss/train_loss": total})
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def close(self) -> None:
        """Flush the monitor and drop its files."""
        self.monitor.close()
        self._folder.cleanup()


def default_config(mode: str = "nano", **changes: Any) -> dict[str, Any]:
    """The configuration of `python train.py --mode MODE`, as a plain dict."""
    return Config(**apply_mode_defaults({"mode": mode, **changes})).to_dict()


def random_shards(folder: Path, *, vocab: int, tokens: int = 2_000_000) -> dict[str, str]:
    """Two shards of random tokens, for a machine without the corpus: the configuration that reads them."""
    rng = np.random.default_rng(0)
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    for name in ("train", "val"):
        body = rng.integers(0, vocab, tokens, dtype="<u2")
        (folder / f"{name}.bin").write_bytes(header.tobytes() + body.tobytes())
    return {"train_files": str(folder / "train.bin"), "val_files": str(folder / "val.bin")}


def uncovered() -> list[str]:
    """Rows of METRICS that no part of MONITORS, or more than one, takes: empty when the table is right."""
    import fnmatch

    def owners(name: str) -> int:
        return sum(any(fnmatch.fnmatchcase(name, glob) for glob in globs) for globs in MONITORS.values())

    return [name for name in METRICS if owners(name) != 1]
