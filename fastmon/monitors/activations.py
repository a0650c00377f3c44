"""Moments of module outputs, from taps that stay in the compiled graph.

A tap is a forward hook that calls the registered op `fastmon::tap`, which reads the output once and writes its moments
into a static buffer, if the step records. Whether it records is decided outside the graph (a host flag for ordinary
calls, a device flag under CUDA-graph capture), so the graph never changes: one graph, no break, and an idle tap costs
one call. It records in train mode only, and not while activation checkpointing computes a block again.

Every call of a module within a step (micro-batches, shared layers) gets a place of its own among `CALLS`; the host
merges them by Chan's update in fp64. Further calls, and all calls under capture, are merged on the device in the last.
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastmon.backend import choose
from fastmon.monitors import Base, Scene
from fastmon.ops import Moments, merge_moments
from fastmon.ops.moments import op as moments_op
from fastmon.readback import Numbers, counts, words
from fastmon.sinks import Row

CALLS = 8  # places per tap for the calls of one step
_STATISTICS = ("mean", "std", "min", "max", "l2_norm", "zero_frac", "kurtosis")


def _name(statistic: str) -> str:
    return f"Activations/<module>_{statistic}"


class Recorder:
    """The buffers of all taps of one monitor, and whether this step records."""

    def __init__(self, scene: Scene, taps: int, order: int) -> None:
        rows = 7 if order == 2 else 9
        self.scene = scene
        self.number = next(_numbers)
        self.order = order
        self.on = False
        self.calls = [0] * taps  # of each tap in this step
        self.counts = torch.zeros(CALLS, taps, 3, dtype=torch.int64, device=scene.device)
        self.stats = torch.zeros(CALLS, taps, rows, device=scene.device)
        self.flag = torch.zeros((), dtype=torch.bool, device=scene.device)
        neutral = torch.zeros(rows, device=scene.device)
        neutral[3], neutral[4] = torch.inf, -torch.inf
        self._neutral = neutral.expand_as(self.stats).contiguous()
        # (call, tap) -> its places in both buffers; dtype -> the row that reads such outputs
        self.places = [
            [(self.counts[call, tap, :, None], self.stats[call, tap, :, None]) for tap in range(taps)]
            for call in range(CALLS)
        ]
        self.readers: dict[torch.dtype, Any] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the step: no calls, the moments of nothing."""
        self.calls = [0] * len(self.calls)
        self.counts.zero_()
        self.stats.copy_(self._neutral)

    def switch(self, on: bool) -> None:
        """Record from now on, or not; the device flag follows for captured graphs."""
        if on != self.on:
            self.on = on
            self.flag.fill_(on)

    def used(self) -> int:
        """How many places of the buffers hold something."""
        if self.scene.device.type == "cuda":
            return CALLS if _ever_captured else max(self.calls, default=0)
        return max(self.calls, default=0)


_numbers = itertools.count()
_recorders: weakref.WeakValueDictionary[int, Recorder] = weakref.WeakValueDictionary()
_ever_captured = False  # whether any tap has been part of a CUDA-graph capture in this process


def _tap(x: Tensor, counts: Tensor, stats: Tensor, flag: Tensor, recorder: int, tap: int) -> None:
    """Write the moments of x into the tap's next place, if the step records."""
    global _ever_captured
    owner = _recorders.get(recorder)
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if owner is None or not (owner.on or capturing) or torch._C._current_graph_task_id() != -1:
        return
    start = time.perf_counter()
    call = owner.calls[tap]
    owner.calls[tap] = min(call + 1, CALLS)
    if x.dtype not in owner.readers:
        owner.readers[x.dtype] = choose(moments_op, moments_op.facts(([x], owner.order))).function()
    number, moment = owner.readers[x.dtype]([x], owner.order)
    if call < CALLS - 1 and not capturing:
        if counts is owner.counts:
            into_counts, into_stats = owner.places[call][tap]
        else:  # a graph may pass copies of the buffers and write them back afterwards
            into_counts, into_stats = counts[call, tap, :, None], stats[call, tap, :, None]
        into_counts.copy_(number)
        into_stats.copy_(moment)
    else:
        _ever_captured |= capturing
        _merge(counts[CALLS - 1, tap], stats[CALLS - 1, tap], number, moment, flag if capturing else None)
    owner.scene.spent_ms += 1e3 * (time.perf_counter() - start)


def _merge(
    counts: Tensor,  # (3,) int64, written
    stats: Tensor,  # (7 | 9,) fp32, written
    number: Tensor,  # (3, 1) int64
    moment: Tensor,  # (7 | 9, 1) fp32
    flag: Tensor | None,  # () bool: whether to write, where only the device knows
) -> None:
    old = Moments(*counts[:, None], *stats[:, None])
    new = merge_moments(old, Moments(*number, *moment))
    merged = (
        torch.cat([x for x in new[:3] if x is not None]),
        torch.cat([x for x in new[3:] if x is not None]),
    )
    for buffer, value in zip((counts, stats), merged, strict=True):
        buffer.copy_(value if flag is None else torch.where(flag, value, buffer))


_library = torch.library.Library("fastmon", "FRAGMENT")
_library.define(
    "tap(Tensor x, Tensor(a!) counts, Tensor(b!) stats, Tensor flag, int recorder, int tap) -> ()"
)
_library.impl("tap", _tap, "CompositeExplicitAutograd")


@torch.library.register_fake("fastmon::tap", lib=_library)
def _fake_tap(x: Tensor, counts: Tensor, stats: Tensor, flag: Tensor, recorder: int, tap: int) -> None:
    return None


class _Hook:
    """A forward hook: passes the first floating tensor of a module's output to the tap, in train mode."""

    def __init__(self, recorder: Recorder, tap: int) -> None:
        self.counts, self.stats, self.flag = recorder.counts, recorder.stats, recorder.flag
        self.recorder, self.tap = recorder.number, tap

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            if isinstance(output, dict):
                output = next(iter(output.values()))
            if isinstance(output, (tuple, list)):
                output = output[0]
            if isinstance(output, Tensor) and output.is_floating_point():
                # The dispatcher costs more than the read: only a graph needs it.
                write = torch.ops.fastmon.tap if torch.compiler.is_compiling() else _tap
                write(output.detach(), self.counts, self.stats, self.flag, self.recorder, self.tap)


class Activations(Base):
    """Streaming moments of the selected modules' outputs over one step's training batches.

    Selected: names that match the regex `modules`; else, in preset `full`, all modules, and otherwise the blocks: the
    entries of the outermost ModuleLists and of Sequentials whose children have parameters, or the model's children
    where it has none. ValueError where the regex matches nothing, and where torch.compile has already traced the
    model: such a trace would ignore the taps. A function that was compiled around the model and has run is not noticed
    here: taps that record nothing in the first training step warn.
    """

    FILLS: ClassVar[tuple[str, ...]] = tuple(_name(statistic) for statistic in _STATISTICS)
    ARMED: ClassVar[bool] = True

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        chosen = select_modules(scene.model, scene.modules, everything=scene.preset == "full")
        _refuse_traced(scene.model)
        self._keys = {s: [f"Activations/{name}_{s}" for name in chosen] for s in _STATISTICS}
        order = 4 if _name("kurtosis") in scene.active else 2
        self._recorder = Recorder(scene, len(chosen), order)
        _recorders[self._recorder.number] = self._recorder
        self.hold(self._recorder.counts, self._recorder.stats, self._recorder.stats)
        self._hooks = [
            module.register_forward_hook(_Hook(self._recorder, tap))
            for tap, module in enumerate(chosen.values())
        ]
        self._recorded = False
        self._heard = False  # whether any tap has ever recorded

    def begin(self, due: frozenset[str]) -> None:
        """Record the coming step, if something of it is due."""
        if self._recorded:
            self._recorder.clear()
            self._recorded = False
        self._recorder.switch(not due.isdisjoint(self.FILLS))

    def pause(self) -> None:
        """Record nothing."""
        self._was_on = self._recorder.on
        self._recorder.switch(False)

    def resume(self) -> None:
        """Record again, if the step does."""
        self._recorder.switch(self._was_on)

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """The buffers as they are."""
        if due.isdisjoint(self.FILLS):
            return (), None
        used = self._recorder.used()
        if not used:
            self._say_silent()
            return (), None
        self._recorded = self._heard = True
        recorder = self._recorder
        parts = [words(recorder.counts[:used].reshape(-1)), recorder.stats[:used].reshape(-1)]
        return parts, (due, used)

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Merge the calls of each tap; a module that did not run is absent, an undefined ratio too."""
        if note is None:
            return
        due, used = note
        taps = len(self._recorder.calls)
        number = counts(numbers[: 6 * used * taps]).reshape(used, taps, 3)
        moment = numbers[6 * used * taps :].reshape(used, taps, -1).astype(np.float64)
        merged = merge_calls(number, moment)
        for statistic, keys in self._keys.items():
            if _name(statistic) in due:
                values, defined = merged[statistic]
                for key, value, there in zip(keys, values, defined, strict=True):
                    if there:
                        row.values[key] = float(value)

    def _say_silent(self) -> None:
        """Warn once where the model trains and no tap has ever recorded."""
        if not self._heard and self.scene.stepped:
            self._heard = True
            warnings.warn(
                "the activation taps recorded nothing in a training step: the model is in eval mode, the chosen "
                "modules do not run, or torch.compile runs a trace that was made before the monitor was built",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Take the hooks away."""
        self._recorder.switch(False)
        for hook in self._hooks:
            hook.remove()


def merge_calls(
    number: Numbers,  # (calls, taps, 3) int64: numel, zeros, nonfinite
    moment: Numbers,  # (calls, taps, 7 | 9) fp64: mean, m2, sumsq, min, max, absmax, l2 [, m3, m4]
) -> dict[str, tuple[Numbers, Numbers]]:
    """Statistics of each tap over all its calls, (values, defined), by Chan's update in fp64."""
    n = np.zeros(number.shape[1])
    mean, m2, m3, m4 = np.zeros((4, number.shape[1]))
    fourth = moment.shape[2] == 9
    for count, row in zip(number, moment, strict=True):
        n_b = count[:, 0].astype(np.float64)
        total = np.maximum(n + n_b, 1)
        d = row[:, 0] - mean
        if fourth:
            b2, b3, b4 = row[:, 1], row[:, 7], row[:, 8]
            m4 = (
                m4 + b4 + d**4 * n * n_b * (n * n - n * n_b + n_b * n_b) / total**3
                + 6 * d**2 * (n * n * b2 + n_b * n_b * m2) / total**2 + 4 * d * (n * b3 - n_b * m3) / total
            )  # fmt: skip
            m3 = m3 + b3 + d**3 * n * n_b * (n - n_b) / total**2 + 3 * d * (n * b2 - n_b * m2) / total
        m2 = m2 + row[:, 1] + d * d * (n * n_b / total)
        mean = mean + d * (n_b / total)
        n = n + n_b
    ran = n > 0
    size = np.maximum(n, 1)
    variance = m2 / size
    spread = ran & (variance != 0)
    merged = {
        "mean": (mean, ran),
        "std": (np.sqrt(variance), ran),
        "min": (moment[:, :, 3].min(axis=0), ran),
        "max": (moment[:, :, 4].max(axis=0), ran),
        "l2_norm": (np.sqrt(np.square(moment[:, :, 6]).sum(axis=0)), ran),
        "zero_frac": (number[:, :, 1].sum(axis=0) / size, ran),
    }
    if fourth:
        merged["kurtosis"] = (m4 / size / np.where(spread, variance, 1) ** 2, spread)
    return merged


def select_modules(model: nn.Module, pattern: str | None, *, everything: bool) -> dict[str, nn.Module]:
    """Name -> module: by regex, or all that can have an output, or the blocks (see `Activations`)."""
    named = {name: m for name, m in model.named_modules() if name and not isinstance(m, _CONTAINERS)}
    if pattern is not None:
        found = {name: m for name, m in named.items() if re.search(pattern, name)}
        if not found:
            raise ValueError(f"modules={pattern!r} matches none of {', '.join(list(named)[:3])} ...")
        return found
    if not named:
        return {type(model).__name__.lower(): model}
    if everything:
        return named
    for lists in _lists_of_blocks(model):
        outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
        blocks = {n: m for n, m in named.items() if n.rpartition(".")[0] in outer}
        if blocks:
            return blocks
    return dict(model.named_children())


def _lists_of_blocks(model: nn.Module) -> Iterator[list[str]]:
    """Names of what may hold the blocks: ModuleLists and Sequentials of composite modules, else of weighted layers."""
    rows = {n: m for n, m in model.named_modules() if n and isinstance(m, (nn.ModuleList, nn.Sequential))}
    weighted = {n: m for n, m in rows.items() if all(any(True for _ in c.parameters()) for c in m.children())}
    composite = {n for n, m in weighted.items() if all(any(True for _ in c.children()) for c in m.children())}
    yield [n for n, m in rows.items() if isinstance(m, nn.ModuleList) or n in composite]
    if not isinstance(model, nn.Sequential):
        yield list(weighted)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _refuse_traced(model: nn.Module) -> None:
    """ValueError where torch.compile holds a trace that this model would run without its taps.

    Traces are kept per code object and do not look at hooks: one made before the taps, even of another instance of the
    class, is reused and leaves them out in silence. An uncompiled model is not concerned. A compiled function that
    calls the model cannot be told from any other: there the warning that the taps recorded nothing is the rule.
    """
    frames, outer = (sys.modules.get(f"torch._dynamo.{part}") for part in ("eval_frame", "external_utils"))
    if frames is None or outer is None:
        return
    around = outer.wrap_inline(
        _refuse_traced
    ).__code__  # what is traced where a module of torch.nn is compiled
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        kind, own = type(module), not type(module).__module__.startswith("torch.nn.")
        code = getattr(kind.forward, "__code__", None) if own else around
        alone = own or module is model or isinstance(module, nn.Sequential)
        if alone and code is not None and frames._debug_get_cache_entry_list(code):
            found[id(module)] = module
    if not found:
        return
    # A wrapper keeps its module in a dictionary, under this name; nothing else leads from a module to its wrapper.
    holders = (
        r["_orig_mod"] for r in gc.get_referrers(*found.values()) if type(r) is dict and "_orig_mod" in r
    )
    wrapped = next((m for m in holders if id(m) in found), None)
    called = next((m for m in model.modules() if m._compiled_call_impl is not None), None)
    if wrapped is not None or (called is not None and not type(called).__module__.startswith("torch.nn.")):
        name = type(wrapped if wrapped is not None else next(iter(found.values()))).__name__
        raise ValueError(
            f"torch.compile has already traced {name}.forward, and that trace would ignore activation taps: "
            'build the Monitor before the first compiled call, or pass every={"Activations/*": 0}, '
            "or call torch._dynamo.reset() first"
        )
