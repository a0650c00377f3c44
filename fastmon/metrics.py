"""METRICS: the one place where a logged name exists, and who is due when.

A row says what a number is called, in which unit, what it means, where its formula comes from, how often it is taken,
how ranks are reduced, and from which preset on it is there. README tables, the console, the JSONL header and W&B derive
from it. Names are `Group/quantity[/parameter]`; a part in angle brackets (`<param>`, `<module>`, `<group>`, `<task>`)
stands for many names. A value that cannot be computed is absent: never -1, 0 or NaN-as-missing.

Strings and schedules only: this module imports neither torch nor numpy.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

GROUPS = (
    "Time",
    "Loss",
    "Optimization",
    "Model",
    "Hardware",
    "Activations",
    "Gradients",
    "Representation",
    "minmin",
)
PRESETS = ("off", "cheap", "usual", "full")  # each observes all that the one before it does
REDUCTIONS = ("rank 0", "mean", "replicated")
_NAME = re.compile(r"(\w+)/(?:[a-z_][a-z0-9_]*(?:<\w+>)?(?:/<\w+>)?|<\w+>_[a-z0-9_]+)")


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a metric fires: step 1, then every `every` steps, within [start, end]; 0 or -1 is never."""

    every: int = 1
    start: int = 1
    end: int | None = None  # inclusive; None: no end

    def __post_init__(self) -> None:
        if self.every < -1 or (self.end is not None and self.end < self.start):
            raise ValueError(f"a schedule wants every >= -1 and end >= start, got {self}")

    def fires(self, step: int) -> bool:
        """Whether it fires at `step` (counted from 1)."""
        if self.every <= 0 or step < self.start or (self.end is not None and step > self.end):
            return False
        return step % self.every == 0 or step == 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One logged name, or one pattern of names."""

    name: str
    unit: str
    meaning: str
    source: str  # formula, paper or where it is read
    preset: str | None  # the first preset that has it; None: only when asked for by `every`
    reduction: str = "rank 0"  # "mean": over ranks; "replicated": the same on every rank; "rank 0": its own
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        group = self.name.partition("/")[0]
        if not _NAME.fullmatch(self.name) or group not in GROUPS:
            raise ValueError(
                f"a metric is named Group/quantity[/<part>] with a group of {GROUPS}, got {self.name!r}"
            )
        if not (self.unit and self.meaning and self.source):
            raise ValueError(f"{self.name}: unit, meaning and source must be said")
        if self.preset not in (*PRESETS[1:], None):
            raise ValueError(f"{self.name}: preset is one of {PRESETS[1:]} or None, got {self.preset!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"{self.name}: reduction is one of {REDUCTIONS}, got {self.reduction!r}")

    @property
    def per_parameter(self) -> bool:
        """Whether its values go to params.jsonl."""
        return self.name.endswith("<param>")


def _rows(preset: str, reduction: str, *rows: tuple[str, str, str, str]) -> dict[str, Metric]:
    """Rows of one preset and one reduction: (name, unit, meaning, source)."""
    return {row[0]: Metric(*row, preset, reduction) for row in rows}


_GIVEN = "given to Monitor.step"
# fmt: off
METRICS: dict[str, Metric] = {
    **_rows("cheap", "rank 0",
        ("Time/step_ms", "ms", "wall time of this step, without pauses and compilation", "host clock between steps"),
        ("Time/step_avg_ms", "ms", "training time per step so far", "training_time_ms / steps"),
        ("Time/training_time_ms", "ms", "sum of the step times: no evaluation, checkpoints, compilation", "host clock"),
        ("Time/total_time_s", "s", "wall time since the monitor was built, everything included", "host clock"),
        ("Time/tokens_per_s", "1/s", "tokens per second of this step", "tokens_per_step / step_ms"),
        ("Time/iterations_per_s", "1/s", "optimizer steps per second, of this step", "1000 / step_ms"),
        ("Time/eta_s", "s", "training time left", "(total_steps - step) step_avg_ms / 1000"),
        ("Time/eval_ms", "ms", "evaluation since the last row", 'Monitor.pause("eval")'),
        ("Time/checkpoint_ms", "ms", "saving since the last row", 'Monitor.pause("checkpoint")'),
        ("Time/compile_ms", "ms", "torch.compile at work since the last row", "dynamo's own clock"),
        ("Time/monitor_ms", "ms",
         "host time of the monitor's calls and hooks since the last row, waits for a full ring included; not clipping",
         "host clock"),
        ("Time/data_ms", "ms", "waiting for the batch", _GIVEN)),
    **_rows("cheap", "mean",
        ("Loss/train_loss", "nats", "training loss of this step", _GIVEN)),
    **_rows("cheap", "rank 0",
        ("Loss/val_loss", "nats", "validation loss", _GIVEN),
        ("Loss/loss_<task>", "nats", "loss of one task, on its steps", _GIVEN)),
    **_rows("cheap", "replicated",
        ("Optimization/lr", "1", "learning rate of the first parameter group", "param_groups"),
        ("Optimization/lr/<group>", "1", "learning rate of each group, where there are several", "param_groups"),
        ("Optimization/momentum", "1", "momentum (or Adam's beta1) of the first group", "param_groups"),
        ("Optimization/grad_norm", "1", "global L2 norm of the reduced gradient, before clipping", "sqrt(sum |g|^2)"),
        ("Optimization/grad_norm_clipped", "1",
         "global L2 norm of the gradient that the optimizer receives", "grad_norm min(1, c)"),
        ("Optimization/step_skipped", "0/1",
         "1 where the scaler skipped the step (overflow), 0 where it did not", "GradScaler"),
        ("Optimization/loss_scale", "1", "scale of the loss", "GradScaler")),
    **_rows("usual", "replicated",
        ("Optimization/update_norm", "1", "L2 norm of the step's change of the parameters", "sqrt(sum |w' - w|^2)"),
        ("Optimization/update_ratio", "1", "largest update ratio of any parameter", "max update_ratio/<param>"),
        ("Optimization/update_ratio/<param>", "1", "rms change / rms weight after the step", "|w' - w| / |w'|")),
    **_rows("usual", "replicated",
        ("Gradients/norm/<param>", "1", "L2 norm, before clipping where the monitor clips", "|g|")),
    **_rows("usual", "rank 0",
        ("Gradients/noise_scale", "samples",
         "batch size at which noise and signal of the gradient are equal", "arXiv 1812.06162, app. A.1")),
    **_rows("cheap", "replicated",
        ("Gradients/nonfinite", "count", "NaN and Inf elements of the gradient", "count")),
    **_rows("cheap", "replicated",
        ("Model/param_norm", "1", "global L2 norm of the trained parameters, after the step", "sqrt(sum |w|^2)")),
    **_rows("usual", "replicated",
        ("Model/spectral_norm/<param>", "1", "largest singular value of a hidden matrix", "warm power iteration"),
        ("Model/spectral_residual/<param>", "1",
         "some singular value lies within residual/sqrt(2) of spectral_norm", "Weyl's bound"),
        ("Model/stable_rank/<param>", "1", "|W|_F^2 / sigma^2 of a hidden matrix", "spectral_norm and |W|_F, one read"),
        ("Model/spectral_norm_max", "1", "largest spectral norm over the hidden matrices", "max"),
        ("Model/spectral_norm_mean", "1", "mean spectral norm over the hidden matrices", "mean"),
        ("Model/spectral_norm_std", "1", "standard deviation of the spectral norms (population)", "std")),
    **_rows("usual", "rank 0",
        ("Activations/<module>_mean", "1", "mean of the module's output in this step's training batches", "sum x / n"),
        ("Activations/<module>_std", "1", "standard deviation of the output (population)", "sqrt(m2 / n)"),
        ("Activations/<module>_min", "1", "smallest output", "min"),
        ("Activations/<module>_max", "1", "largest output", "max"),
        ("Activations/<module>_l2_norm", "1", "L2 norm of the output over the step's batches", "sqrt(sum x^2)"),
        ("Activations/<module>_zero_frac", "fraction", "share of outputs that are exactly 0", "zeros / n")),
    **_rows("full", "replicated",
        ("Optimization/update_spectral_norm/<param>", "1",
         "largest singular value of what Muon orthogonalises", "Muon.observations"),
        ("Optimization/update_stable_rank/<param>", "1",
         "|U|_F^2 / sigma^2 of what Muon orthogonalises", "Muon.observations")),
    **_rows("full", "rank 0",
        ("Activations/<module>_kurtosis", "1", "fourth standardised moment: Gaussian 3", "(m4 / n) / (m2 / n)^2")),
    **_rows("cheap", "rank 0",
        ("Hardware/peak_memory_mb", "MiB", "peak of allocated device memory", "torch.cuda.memory_stats"),
        ("Hardware/reserved_memory_mb", "MiB", "device memory held by the allocator", "torch.cuda.memory_stats"),
        ("Hardware/allocated_memory_mb", "MiB", "device memory in tensors", "torch.cuda.memory_stats"),
        ("Hardware/host_rss_mb", "MiB", "resident memory of the process", "/proc/self/statm"),
        ("Hardware/monitor_memory_mb", "MiB", "memory held by the monitor's own buffers", "sum of their bytes"),
        ("Hardware/mfu", "fraction",
         "model FLOP/s over the peak of all devices; absent for an unknown device", "arXiv 2204.02311, app. B"),
        ("Hardware/tflops_per_s", "TFLOP/s", "model FLOP/s", "flops_per_token tokens_per_s / 1e12")),
}
# fmt: on


_TEMPLATES: list[tuple[re.Pattern[str], str]] = []


def register(metric: Metric) -> None:
    """Add a row, so that its name may be given to `Monitor.step`. ValueError where the name is taken."""
    if metric.name in METRICS:
        raise ValueError(f"the metric {metric.name} exists already")
    METRICS[metric.name] = metric
    _add_template(metric.name)


def _add_template(name: str) -> None:
    if "<" in name:
        _TEMPLATES.insert(0, (re.compile(re.sub(r"<\w+>", "(.+)", name)), name))


for _name in METRICS:
    _add_template(_name)


def lookup(name: str) -> Metric:
    """The row of a logged name, exact or by pattern; KeyError with the nearest names where there is none.

    `lookup("Gradients/norm/blocks.0.mlp.fc.weight")` is the row `Gradients/norm/<param>`.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, row in _TEMPLATES:
        if pattern.fullmatch(name):
            return METRICS[row]
    raise KeyError(f"no metric is called {name!r}{_nearest(name)}")


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, METRICS, n=2, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def plan_schedules(
    preset: str,
    every: Mapping[str, int | Schedule] | None = None,  # name or glob -> interval in steps, or a Schedule
) -> dict[str, Schedule]:
    """The metrics that may fire under a preset, with their schedules.

    `every` changes a schedule, adds a metric that the preset lacks (N > 0), or takes one out (0, -1).
    A key is a row's name or a glob over row names ("Model/*", "Activations/<module>_kurtosis"); later keys win.
    ValueError for an unknown preset, and with the nearest name for a key that matches nothing.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is one of {', '.join(PRESETS)}, got {preset!r}")
    within = PRESETS[1 : PRESETS.index(preset) + 1]
    plan = {m.name: m.schedule for m in METRICS.values() if m.preset in within}
    for key, wish in (every or {}).items():
        names = [name for name in METRICS if name == key or fnmatch.fnmatchcase(name, key)]
        if not names:
            raise ValueError(f"every: {key!r} matches no metric{_nearest(key)}")
        for name in names:
            schedule = wish if isinstance(wish, Schedule) else replace(METRICS[name].schedule, every=wish)
            plan.pop(name, None)
            if schedule.every > 0:
                plan[name] = schedule
    return plan


class Calendar:
    """Which metrics are due at a step: one set per combination of schedules, built once and then looked up."""

    def __init__(self, plan: Mapping[str, Schedule]) -> None:
        self.active = frozenset(plan)
        self._schedules = tuple(dict.fromkeys(plan.values()))
        self._plan = dict(plan)
        self._sets: dict[tuple[bool, ...], frozenset[str]] = {}

    def due(self, step: int) -> frozenset[str]:
        """Row names that fire at `step`."""
        key = tuple([schedule.fires(step) for schedule in self._schedules])
        if key not in self._sets:
            firing = {s for s, on in zip(self._schedules, key, strict=True) if on}
            self._sets[key] = frozenset(name for name, s in self._plan.items() if s in firing)
        return self._sets[key]


class Observer(Protocol):
    """What the monitor asks of everything that observes; it iterates a table of these and knows none by name.

    The order of calls in a step: `begin` (before the forward pass, with what will be due), `micro_step`,
    `before_update` and `after_update` (around every optimizer's step), `enqueue` (returns fp32 device tensors for the
    tape; nothing may wait for the device), later `decode` with the same numbers on the host.
    """

    FILLS: ClassVar[tuple[str, ...]]  # names of METRICS that it computes

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
        ...

    def decode(self, numbers: np.ndarray[Any, Any], note: Any, row: Any) -> None:
        """Name the numbers in `row`."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def close(self) -> None:
        """Let go of hooks."""
