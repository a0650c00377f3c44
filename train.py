"""Train a model on real data and watch it.

    python train.py                                      a small GPT on the embedded corpus, on any machine
    python train.py --mode gpt2-124m --train-files 'data/train_*.bin' --val-files 'data/val_*.bin' --compile
    torchrun --nproc-per-node=2 train.py                 the same losses from two processes
    python train.py --resume                             go on with the newest run

What differs between jobs is a workload (fastmon/workloads); here are the table of roles and the loop. Exit codes:
0 done; 2 a wish that cannot be met, said in one sentence; 128 + n stopped by signal n, ready to resume. Under
torchrun the processes exit so; torchrun itself exits with 1 whenever one of them failed, after our sentence.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# OpenMP threads spin a little before they sleep: good on free cores and on busy ones (docs/measured.md).
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch import Tensor, nn

from fastmon import checkpoint, config, device, precision, runs, workloads
from fastmon.config import Config
from fastmon.distributed import Agreement, Ranks, Refused, accumulating, gather, process_group, together, wrap
from fastmon.flags import ConfigError
from fastmon.monitor import Monitor
from fastmon.optim import Muon
from fastmon.plan import split_param
from fastmon.report.summary import write_summary
from fastmon.schedules import factor
from fastmon.sinks import Console, Fanout, Jsonl

Optimizer = torch.optim.Optimizer
Roles = dict[str, dict[str, nn.Parameter]]  # "matrix" (hidden weights) or "other" -> the parameters by name
Rule = Callable[[Roles, Config], Optimizer]


def muon(roles: Roles, cfg: Config) -> Optimizer:
    """Muon with steps of AdamW's size, so that one learning rate serves both (arXiv 2502.16982, section 2.2)."""
    pieces: dict[int, list[nn.Parameter]] = {}  # a fused q, k, v is three matrices
    for name, parameter in roles["matrix"].items():
        count = len(split_param(name, parameter)) if parameter.ndim == 2 else 1
        pieces.setdefault(count, []).append(parameter)
    groups = [{"params": p, "split": n, "name": "matrix" if n == 1 else "qkv"} for n, p in pieces.items()]
    return Muon(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")


def adamw(roles: Roles, cfg: Config) -> Optimizer:
    """AdamW; its decay is the matrices' alone."""
    return torch.optim.AdamW(decayed(roles, cfg), lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def sgd(roles: Roles, cfg: Config) -> Optimizer:
    """SGD with Nesterov momentum; its decay is the matrices' alone."""
    return torch.optim.SGD(decayed(roles, cfg), lr=cfg.lr, momentum=0.9, nesterov=True)


def decayed(roles: Roles, cfg: Config) -> list[dict[str, Any]]:
    """Return parameter groups named by their roles, with weight decay for matrices."""
    decay = {"matrix": cfg.weight_decay, "other": 0.0}
    return [{"params": [*p.values()], "weight_decay": decay[role], "name": role} for role, p in roles.items()]


OPTIMIZERS: dict[str, dict[str, Rule]] = {  # --optimizer -> the rule for each role of a parameter
    "muon": {"matrix": muon, "other": adamw},
    "adamw": {"matrix": adamw, "other": adamw},
    "sgd": {"matrix": sgd, "other": sgd},
}


@dataclass
class Job:
    """One run, ready to go on after `step`."""

    cfg: Config
    ranks: Ranks
    precision: str
    ops: dict[str, str]  # the row of each op that runs here
    workload: workloads.Workload
    bare: nn.Module  # the model without wrappers: what is observed and saved
    optimizers: list[Optimizer]
    scaler: torch.amp.GradScaler
    folder: Path
    step: int = 0
    samples: int = 0  # sequences that all ranks together have read: the position in the data
    observed: dict[str, Any] = field(default_factory=dict)  # the monitor's state, once restored

    def loss(self, batch: workloads.Batch) -> Tensor:
        """Return a micro-batch's mean loss on the device, 0-d."""
        with precision.autocast(self.precision, self.ranks.device):
            return self.workload.loss(self.workload.to_device(batch))

    def evaluate(self) -> dict[str, float]:
        """Return the validation losses."""
        with precision.autocast(self.precision, self.ranks.device):
            return self.workload.evaluate(max_batches=self.cfg.val_batches)

    def save(self, mon: Monitor, losses: dict[str, float], *, prefix: str) -> None:
        """Write a checkpoint from rank 0, with the random state of every rank, and let older ones go."""
        generators = gather(checkpoint.random_state())
        if not self.ranks.first:
            return
        state = {
            "model": self.bare.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "progress": {"step": self.step, "samples": self.samples},
            "random": generators,
            "monitor": mon.state_dict(),
        }
        checkpoint.save(self.folder / "checkpoints", self.step, state, prefix=prefix, facts=losses)
        checkpoint.rotate(self.folder / "checkpoints", keep=self.cfg.keep_checkpoints, best="Loss/val_loss")

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `save` wrote; a rank that did not exist then keeps its fresh random state."""
        self.bare.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.samples = state["progress"]["step"], state["progress"]["samples"]
        self.observed = state["monitor"]
        if self.step > self.cfg.steps:
            raise ValueError(f"--steps {self.cfg.steps} is less than the {self.step} that the run has done")
        if self.samples % (size := self.cfg.batch_size):
            raise ValueError(f"--batch-size {size} does not divide the {self.samples} samples read so far")
        if self.ranks.rank < len(state["random"]):
            checkpoint.restore_random_state(state["random"][self.ranks.rank])


def set_up(cfg: Config, ranks: Ranks, say: Callable[[str], None]) -> Job:
    """Make what a run needs, writing nothing; ValueError or OSError, one sentence, where that fails."""
    folder = Path(cfg.run_dir) / (cfg.run_name or runs.default_name(datetime.datetime.now(), width=cfg.width))
    if not cfg.eval_only and not (cfg.resume is not None and folder.is_dir()):
        runs.check_free(folder)
    if cfg.grad_accum % ranks.world_size:
        raise ValueError(f"--grad-accum {cfg.grad_accum} does not split over {ranks.world_size} processes")
    number_format, ops = precision.pick(cfg.precision, ranks.device), runs.op_rows(ranks.device)
    checkpoint.seed_generators(cfg.seed + ranks.rank)
    build = workloads.load(cfg.workload).build
    workload = build(cfg.to_dict(), ranks.device, rank=ranks.rank, world_size=ranks.world_size)
    names = {parameter: name for name, parameter in workload.model.named_parameters()}
    rules: dict[Rule, Roles] = {}
    for role, parameters in workload.optimizer_groups().items():
        if parameters:
            rules.setdefault(OPTIMIZERS[cfg.optimizer][role], {})[role] = {names[p]: p for p in parameters}
    optimizers = [rule(roles, cfg) for rule, roles in rules.items()]
    scaler = precision.scaler(number_format, ranks.device)
    job = Job(cfg, ranks, number_format, ops, workload, workload.model, optimizers, scaler, folder)
    if cfg.resume is not None:
        if Path(cfg.resume).parent.name == "checkpoints":
            job.restore(checkpoint.load(Path(cfg.resume), device=ranks.device))
        elif found := checkpoint.newest(folder / "checkpoints", device=ranks.device, say=say):
            job.restore(found[2])
        say(f"going on after step {job.step} of {cfg.steps}{'' if job.step else ': no complete checkpoint'}")
    if cfg.compile:
        job.bare.compile()
    workload.model = wrap(job.bare, ranks)
    return job


def introduce(job: Job) -> dict[str, Any]:
    """Return the run's record: provenance, and what runs where."""
    cfg, here, tokens = job.cfg, job.ranks.device, job.workload.tokens_per_micro_batch * job.cfg.grad_accum
    return runs.provenance() | {
        "device": f"{device.name(here)} ({here}), {job.ranks.world_size} process(es)",
        "precision": job.precision,
        "workload": job.workload.describe(),
        "ops": job.ops,
        "effective_batch": f"{cfg.batch_size} sequences x {cfg.grad_accum} micro-batches = {tokens} tokens a step",
        "config": cfg.to_dict(),
        "after_step": job.step,
    }


def watch(job: Job, output: Fanout) -> Monitor:
    """Return the run's monitor, which goes on where the one of the checkpoint stopped."""
    cfg = job.cfg
    mon = Monitor(
        job.bare,
        job.optimizers,
        preset="cheap" if cfg.monitor == "off" else cfg.monitor,
        sinks=[output],
        every=cfg.monitor_every(),
        scaler=job.scaler if job.scaler.is_enabled() else None,
        samples_per_step=cfg.batch_size * cfg.grad_accum,
        tokens_per_step=job.workload.tokens_per_micro_batch * cfg.grad_accum,
        flops_per_token=job.workload.flops_per_token,
        total_steps=cfg.steps,
        compute_dtype=precision.DTYPES[job.precision],
    )
    if job.observed:
        mon.load_state_dict(job.observed)
    return mon


def train(job: Job, mon: Monitor, interruption: runs.Interruption) -> None:
    """Run the loop from the job's step to the last one, or to the step in which a signal came."""
    cfg, workload, optimizers, scaler = job.cfg, job.workload, job.optimizers, job.scaler
    micro_batches = cfg.grad_accum // job.ranks.world_size
    batches = workload.batches(start=job.samples // cfg.batch_size)
    agreement = Agreement()
    gc.freeze()  # what is there now stays: a full collection over it took 0.1 s, measured
    for step in range(job.step + 1, cfg.steps + 1):
        lr = cfg.lr * factor(cfg.schedule, step, steps=cfg.steps, warmup=cfg.warmup, low=cfg.min_lr_ratio)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        loss, data_ms = torch.zeros((), device=job.ranks.device), 0.0
        for left in reversed(range(micro_batches)):
            asked = time.perf_counter()
            batch = next(batches)
            data_ms += 1e3 * (time.perf_counter() - asked)
            with accumulating(workload.model, last=left == 0):
                share = job.loss(batch) / micro_batches
                scaler.scale(share).backward()
            loss += share.detach()
            if left:
                mon.micro_step(reduced=job.ranks.world_size == 1)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        if cfg.grad_clip > 0:
            mon.clip_grad_norm_(cfg.grad_clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        job.step, job.samples = step, job.samples + cfg.batch_size * cfg.grad_accum

        stop, final = agreement.any(interruption.came), step == cfg.steps
        saving = stop or final or step % (cfg.save_interval or cfg.steps) == 0
        losses: dict[str, float] = {}
        if saving or step % (cfg.val_interval or cfg.steps) == 0:  # an interval of 0 is never
            with mon.pause("eval"):
                losses = job.evaluate()
        mon.step(step, {"Loss/train_loss": loss, "Time/data_ms": data_ms, **losses})
        for optimizer in optimizers:
            optimizer.zero_grad()
        if saving:
            with mon.pause("checkpoint"):
                job.save(mon, losses, prefix="final_" if final else "")
        if stop:
            break
    gc.unfreeze()


def run(cfg: Config, ranks: Ranks) -> int:
    """Set up, train, report; return the exit code. What can fail comes before the folder."""
    early = [*cfg.unheard().values()]  # what is said before there is a console log
    job = together(lambda: set_up(cfg, ranks, early.append))
    if cfg.eval_only:
        losses = " ".join(f"{name.removeprefix('Loss/')}:{loss:.4f}" for name, loss in job.evaluate().items())
        if ranks.first:
            early += [] if job.step else ["untrained weights: no checkpoint was read (--resume)"]
            print(*early, f"step:{job.step}/{cfg.steps} {losses}", sep="\n")
        return 0
    record, out = introduce(job), Fanout([])  # console and logs join `out` once there is a folder
    mon = together(lambda: watch(job, out))
    early += together(lambda: runs.claim(job.folder, cfg.to_dict(), step=job.step) if ranks.first else [])
    with runs.console(job.folder, speaks=ranks.first) as streams, runs.Interruption() as interruption:
        say = functools.partial(runs.say, streams)
        say("\n".join([f"run: {job.folder}", *early, *runs.told(record)]))
        shown = {"log_interval": cfg.log_interval, "total_steps": cfg.steps}
        out.sinks += [Console(**shown, stream=stream) for stream in streams]
        out.sinks += [Jsonl(job.folder, header=record, append=True)] if ranks.first else []
        with mon:
            train(job, mon, interruption)
        if (came := interruption.signal) is not None:
            say(f"{came.name} after step {job.step}: go on with train.py --resume {job.folder}")
            return 128 + came
        if ranks.first:
            say(f"summary: {write_summary(job.folder)}")
    return 0


def main() -> int:
    """Read the command line and run; say in one sentence what cannot be done."""
    with contextlib.ExitStack() as stack:
        try:
            cfg = config.parse()
            return run(cfg, together(lambda: stack.enter_context(process_group(cfg.device))))
        except (ConfigError, Refused) as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"train.py: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("train.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
