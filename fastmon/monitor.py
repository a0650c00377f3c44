"""Monitor: what a training loop calls. It asks what is due, lets the observers enqueue, and hands on what has arrived.

    mon = fastmon.Monitor(model, optimizer, preset="usual", run_dir="runs/demo")
    for step, batch in enumerate(batches, start=1):
        loss = model(batch); loss.backward()
        mon.clip_grad_norm_(1.0)
        optimizer.step()
        mon.step(step, {"Loss/train_loss": loss})
        optimizer.zero_grad()
    mon.close()

No maths and no waiting here: observers hold the first, readback the second. Watching changes nothing: losses, weights
and random numbers are bit for bit those of the same loop with `preset="off"`.
"""

from __future__ import annotations

import atexit
import contextlib
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastmon.distributed import all_reduce
from fastmon.metrics import METRICS, Calendar, Schedule, lookup, plan_schedules
from fastmon.monitors import Base, Scene, observer_classes
from fastmon.monitors.gradients import GradientReader
from fastmon.monitors.inputs import checked_input
from fastmon.plan import Plan
from fastmon.readback import Numbers, Readback, floats
from fastmon.sinks import Console, Fanout, Jsonl, Row, Sink

LOSS = "Loss/train_loss"
PAUSES = ("eval", "checkpoint")


class Monitor:
    """Watches one model in one training loop.

    model: the module that trains; a compiled or DDP wrapper is seen through.
    optimizer: one, several, or None; their step hooks tell when parameters change.
    preset: "off" (same calls, nothing observed), "cheap", "usual", "full"; see METRICS.
    run_dir: folder for metrics.jsonl and params.jsonl. sinks: replaces the default (console, and the files of run_dir).
    every: {metric or glob: N or Schedule}, 0 or -1 is off. params, modules: regex on parameter and module names.
    scaler: a GradScaler, for `step_skipped` and `loss_scale`.
    samples_per_step, tokens_per_step (of all ranks), flops_per_token, total_steps: throughput, MFU and ETA need them.
    compute_dtype: precision of the matrix products, for the peak that MFU is a share of; default: the parameters'.
    A metric that lacks its input is absent. ValueError for an unknown preset or name and for no regex, TypeError for
    another kind of model or optimizer. A forgotten `close` is made up for at collection or the process's end.
    """

    _closed = True  # until it is built

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        *,
        preset: str = "usual",
        run_dir: str | Path | None = None,
        sinks: Sequence[Sink] | None = None,
        every: Mapping[str, int | Schedule] | None = None,
        params: str | None = None,
        modules: str | None = None,
        scaler: Any = None,
        samples_per_step: int | None = None,
        tokens_per_step: int | None = None,
        flops_per_token: float | None = None,
        total_steps: int | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        given = checked_input(model, optimizer, params=params, modules=modules)
        planned = plan_schedules(preset, every)
        self._calendar = Calendar({} if preset == "off" else planned)
        self._rows = frozenset(METRICS)  # what the calendar speaks of; a row registered later is always taken
        plan = Plan(unwrapped(model), params=params)
        ranked = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank() if ranked else 0
        self._world = dist.get_world_size() if ranked else 1
        self._scene = Scene(
            model=unwrapped(model),
            plan=plan,
            reader=GradientReader(plan, unwrapped(model), params=params),
            device=plan.device,
            preset=preset,
            active=self._calendar.active,
            optimizers=tuple(given),
            scaler=scaler,
            modules=modules,
            world_size=self._world,
            samples_per_step=samples_per_step,
            tokens_per_step=tokens_per_step,
            flops_per_token=flops_per_token,
            total_steps=total_steps,
            compute_dtype=compute_dtype,
        )
        kinds = [kind for kind in observer_classes() if not self._calendar.active.isdisjoint(kind.FILLS)]
        self._failures: dict[int, str] = {}
        self._readback = Readback(plan.device, reduce=all_reduce if self._world > 1 else None)
        self._sinks = Fanout(self._default_sinks(run_dir) if sinks is None else sinks)
        self._observers: list[Base | None] = []
        try:
            for kind in kinds:
                self._observers.append(kind(self._scene))
        except BaseException:
            for observer in self._observers:
                if observer is not None:
                    observer.close()
            if sinks is None:
                self._sinks.close()
            raise
        self._ones = torch.ones(1 + len(kinds), device=plan.device)  # a loss is there; observer i is well
        self._zero = torch.zeros(1, device=plan.device)
        self._known: dict[str, str] = {}  # name given to step -> its row
        self._inner_ms: list[float] = []  # of each open pause: time in pauses within it
        self._hooks = [
            hook
            for index, each in enumerate(given if kinds else [])
            for hook in (
                each.register_step_pre_hook(lambda *_, i=index: self._around(i, before=True)),
                each.register_step_post_hook(lambda *_, i=index: self._around(i, before=False)),
            )
        ]
        self._last_step = 0
        self._begin(1)
        self._closed = False
        _open.add(self)

    # -- what the loop calls -------------------------------------------------------------------------------------

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip all gradients of the model in place to a global L2 norm; returns the norm before, () fp32.

        One read of the gradients serves clipping and all gradient metrics. The coefficient min(1, max_norm / (norm +
        1e-6)) stays on the device and agrees with torch's to 1e-6; see `monitors.gradients` for Inf and NaN. With a
        GradScaler call `scaler.unscale_(optimizer)` first.
        """
        reading = self._scene.reader.read()
        if reading is None:
            return torch.zeros((), device=self._scene.device)
        total: Tensor
        coefficient: Tensor
        total, coefficient = self._scene.reader.clip(reading, max_norm)
        if self._scene.read is None:
            self._scene.read = reading
        self._scene.coefficient = coefficient
        return total

    def before_clip(self) -> None:
        """Read the gradients now, because the loop is about to clip them itself. One read; nothing waits."""
        if self._calendar.active:
            with self._timed():
                self._scene.read = self._scene.reader.read()

    def micro_step(self, *, reduced: bool = True) -> None:
        """One micro-batch's backward pass is done and more follow: call it after each but the last.

        reduced: False where the gradients are this rank's own so far (DDP's `no_sync`).
        """
        with self._timed():
            self._each("micro_step", reduced)

    def step(self, step: int, values: Mapping[str, Tensor | float] | None = None) -> None:
        """Close a step: enqueue what is due, and emit the rows that have arrived. Never waits for the device.

        step: counted from 1 (from 0: step 0 is a first step, too). A loop may call it at every k-th step only; what has
        to be recorded in the forward pass is then due at the step that the last two calls foretell.
        values: losses and timings by their METRICS names, as device scalars or floats, kept where they are due;
        `Loss/train_loss` is averaged over ranks. ValueError for a name that is in no row of METRICS (see
        `fastmon.metrics.register`) and for a tensor that is no scalar. RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError("this Monitor is closed: it takes no more steps")
        if not self._calendar.active:
            return
        with self._timed():
            due = self._due if step == self._expected else self._calendar.due(max(step, 1))
            given = {name: value for name, value in (values or {}).items() if self._takes(name, value, due)}
            stride = max(1, step - self._last_step)
            self._scene.step = self._last_step = step
            row = Row(step, time.time(), self._rank)
            loss = given.pop(LOSS, None)
            head_parts = [self._zero, self._zero, self._ones[1:]]
            parts = head_parts if loss is None else [self._on_device(loss), self._ones]
            head = 1 + self._ones.numel()
            names = []
            for name, value in given.items():
                if not isinstance(value, Tensor):
                    row.values[name] = float(value)
                else:
                    names.append(name)
                    parts.append(self._on_device(value))
            notes: list[tuple[int, int, Any]] = []
            for index, observer in enumerate(self._observers):
                if observer is not None and index not in self._failures:
                    try:
                        found, note = observer.enqueue(self._due if observer.ARMED else due)
                    except Exception as error:  # an observer must not end the run
                        self._fail(index, error)
                        continue
                    parts += found
                    notes.append((index, sum([part.numel() for part in found]), note))
            while self._readback.full():
                self._emit(*self._readback.next_row())
            self._readback.push(parts, (row, names, notes), head=head)
            self._scene.tape_bytes = self._readback.memory_bytes()
            self._begin(step + stride)
            for numbers, note in self._readback.arrived():
                self._emit(numbers, note)

    @contextlib.contextmanager
    def pause(self, kind: str = "eval") -> Iterator[None]:
        """Around evaluation ("eval") and saving ("checkpoint"): nothing is recorded, the times are apart; may nest."""
        if kind not in PAUSES:
            raise ValueError(f"a pause is one of {', '.join(PAUSES)}, got {kind!r}")
        start = time.perf_counter()
        if not self._inner_ms:
            self._each("pause")
        self._inner_ms.append(0.0)
        try:
            yield
        finally:
            inner_ms = self._inner_ms.pop()
            if not self._inner_ms:
                self._each("resume")
            whole_ms = 1e3 * (time.perf_counter() - start)
            if self._inner_ms:
                self._inner_ms[-1] += whole_ms
            spent = self._scene.paused_ms
            spent[kind] = spent.get(kind, 0.0) + whole_ms - inner_ms

    def close(self) -> None:
        """Emit the rows under way, take every hook away and close the sinks. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        for numbers, note in self._readback.drain():
            self._emit(numbers, note)
        for observer in self._observers:
            if observer is not None:
                observer.close()
        self._sinks.close()
        _open.discard(self)

    def __del__(self) -> None:
        with _disable_current_modes():  # it may be collected while something is traced
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """The step and what observers need to go on: tensors, numbers, strings, lists. Part of a checkpoint.

        Emits the rows under way first, waiting for them, so that a checkpoint never knows more than the log.
        """
        for numbers, note in self._readback.drain():
            self._emit(numbers, note)
        alive = [observer for observer in self._observers if observer is not None]
        return {"step": self._last_step, "observers": {type(o).__name__: o.state_dict() for o in alive}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; observers that it does not know begin afresh."""
        for observer in self._observers:
            if observer is not None and type(observer).__name__ in state["observers"]:
                observer.load_state_dict(state["observers"][type(observer).__name__])
        self._last_step = state["step"]
        self._begin(self._last_step + 1)

    # -- inside a step -------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        self._expected = step
        self._scene.forget(step)
        self._due = self._calendar.due(step)
        self._each("begin", self._due)

    def _around(self, index: int, *, before: bool) -> None:
        """An optimizer's step hook."""
        with self._timed():
            self._each("before_update" if before else "after_update", index)
            if not before:
                self._scene.stepped.add(index)

    def _each(self, call: str, *args: Any) -> None:
        """Make one call on every observer that is well."""
        for index, observer in enumerate(self._observers):
            if observer is not None and index not in self._failures:
                try:
                    getattr(observer, call)(*args)
                except Exception as error:  # an observer must not end the run
                    self._fail(index, error)

    def _fail(self, index: int, error: Exception) -> None:
        """Note a failure; every rank hears of it with the next row."""
        self._failures[index] = f"{type(error).__name__}: {error}"
        self._ones[1 + index].zero_()

    def _emit(self, numbers: Numbers, note: tuple[Row, list[str], list[tuple[int, int, Any]]]) -> None:
        """Turn one row's numbers into names and give it to the sinks; switch off what failed on any rank."""
        row, names, notes = note
        self._switch_off(numbers[2 : 1 + self._ones.numel()], row)
        if self._rank != 0:
            return
        if numbers[1]:
            row.values[LOSS] = float(numbers[0]) / float(numbers[1])
        at = 1 + self._ones.numel()
        row.values.update(zip(names, floats(numbers[at : at + len(names)]), strict=True))
        at += len(names)
        for index, size, observed in notes:
            observer = self._observers[index]
            if observer is not None:
                try:
                    observer.decode(numbers[at : at + size], observed, row)
                except Exception as error:  # an observer must not end the run
                    self._fail(index, error)
            at += size
        self._sinks.write(row)

    def _switch_off(self, well: Numbers, row: Row) -> None:
        for index in (well < self._world).nonzero()[0]:
            observer = self._observers[index]
            if observer is None:
                continue
            self._observers[index] = None
            reason = self._failures.pop(int(index), "it failed on another rank")
            name = type(observer).__name__
            row.event("observer_off", observer=name, reason=reason)
            warnings.warn(f"the observer {name} is switched off: {reason}", RuntimeWarning, stacklevel=2)
            with contextlib.suppress(Exception):  # it has failed already
                observer.close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._scene.spent_ms += 1e3 * (time.perf_counter() - start)

    def _takes(self, name: str, value: Tensor | float, due: frozenset[str]) -> bool:
        """Whether a given value is logged at this step; ValueError where it is none."""
        if name not in self._known:
            try:
                self._known[name] = lookup(name).name
            except KeyError as error:
                raise ValueError(
                    f"Monitor.step: {error.args[0]}; fastmon.metrics.register adds a name"
                ) from None
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"Monitor.step: {name} wants a scalar, got shape {tuple(value.shape)}")
        row = self._known[name]
        return row in due or row not in self._rows

    def _on_device(self, value: Tensor | float) -> Tensor:
        """A scalar as one float of the tape."""
        if not isinstance(value, Tensor):
            return torch.full((1,), float(value), device=self._scene.device)
        return value.detach().to(self._scene.device, torch.float32, non_blocking=True).reshape(1)

    def _default_sinks(self, run_dir: str | Path | None) -> list[Sink]:
        if self._rank != 0 or not self._calendar.active:
            return []
        sinks: list[Sink] = [Console(total_steps=self._scene.total_steps)]
        return sinks if run_dir is None else [*sinks, Jsonl(run_dir)]


_open: weakref.WeakSet[Monitor] = weakref.WeakSet()


@atexit.register
def _close_forgotten() -> None:
    for monitor in list(_open):
        monitor.close()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return model
        model = inner
