"""The default training job as a callable step, so that monitored and unmonitored copies can be interleaved.

Every copy has its own model, optimizers and data position, seeded alike. Observing changes nothing (that is
tested), so all copies do the very same arithmetic, and a difference in time is the monitor's.
"""

from __future__ import annotations

import fnmatch
import gc
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train
from fastmon.config import Config, apply_mode_defaults
from fastmon.distributed import Ranks
from fastmon.metrics import METRICS
from fastmon.monitor import Monitor
from fastmon.schedules import factor
from fastmon.sinks import Jsonl

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
class Loop:
    """One copy of the training run of train.py; `step()` is one optimizer step of its loop, observed or not.

    Models, optimizers, learning rates and micro-batches are train.py's own; validation, checkpoints and the
    console are left out, because the monitor has no part in them.
    """

    variant: str
    cfg: Config
    device: torch.device
    steps: int = 0
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def __post_init__(self) -> None:
        cfg = self.cfg
        self.job = train.set_up(cfg, Ranks(0, 0, 1, self.device), lambda _: None)
        self.monitor = Monitor(
            self.job.bare,
            self.job.optimizers,
            sinks=[Jsonl(Path(self._folder.name))],
            samples_per_step=cfg.batch_size * cfg.grad_accum,
            tokens_per_step=self.job.workload.tokens_per_micro_batch * cfg.grad_accum,
            flops_per_token=self.job.workload.flops_per_token,
            total_steps=cfg.steps,
            **monitor_options(self.variant),
        )
        self._batches = self.job.workload.batches(start=0)
        gc.freeze()  # as train.train does

    def step(self) -> None:
        """Forward and backward over the micro-batches, clip, update, observe: the body of train.train."""
        self.steps += 1
        cfg, job = self.cfg, self.job
        at = min(self.steps, cfg.steps)
        lr = cfg.lr * factor(cfg.schedule, at, steps=cfg.steps, warmup=cfg.warmup, low=cfg.min_lr_ratio)
        for group in (group for optimizer in job.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        loss, data_ms = torch.zeros((), device=self.device), 0.0
        for micro in range(1, cfg.grad_accum + 1):
            asked = time.perf_counter()
            batch = next(self._batches)
            data_ms += 1e3 * (time.perf_counter() - asked)
            share = job.loss(batch) / cfg.grad_accum
            share.backward()
            loss += share.detach()
            if micro < cfg.grad_accum:
                self.monitor.micro_step()
        self.monitor.clip_grad_norm_(cfg.grad_clip)
        for optimizer in job.optimizers:
            optimizer.step()
        self.monitor.step(self.steps, {"Loss/train_loss": loss, "Time/data_ms": data_ms})
        for optimizer in job.optimizers:
            optimizer.zero_grad()

    def close(self) -> None:
        """Flush the monitor and drop its files."""
        self.monitor.close()
        gc.unfreeze()
        self._folder.cleanup()


def default_config(mode: str = "nano", **changes: Any) -> Config:
    """The configuration of `python train.py --mode MODE`, with changes."""
    return Config(**apply_mode_defaults({"mode": mode, **changes}))


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

    def owners(name: str) -> int:
        return sum(any(fnmatch.fnmatchcase(name, glob) for glob in globs) for globs in MONITORS.values())

    return [name for name in METRICS if owners(name) != 1]
