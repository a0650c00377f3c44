"""Honest timing: variants interleaved in one process, inputs rotated so that no cache is warm, medians with
p20 and p80.

CPU   `interleave` runs every variant once a round, in a rotated order, each call timed with perf_counter_ns.
      A slow minute of a shared machine slows every variant, and `ratio` compares them within the rounds.
CUDA  each call is captured into a CUDA graph per input set; the replays rotate through enough sets to exceed
      L2 three times over, between two events: device time without launch cost. Host time is what enqueueing
      one call takes while the device is kept busy, measured separately.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over n samples. `samples` keeps them in round order, for paired ratios."""

    median: float
    p20: float
    p80: float
    n: int
    samples: tuple[float, ...] = ()

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summarise samples in ms; at least one."""
        ordered = sorted(samples)
        at = [ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8)]
        return cls(statistics.median(ordered), at[0], at[1], len(ordered), tuple(samples))


@dataclass(frozen=True)
class Ratio:
    """Median of per-round ratios with a 95% bootstrap interval of that median."""

    median: float
    low: float
    high: float
    n: int


def interleave(
    variants: Mapping[str, Call],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 500,
    slow_ms: float = 400.0,
    slow_rounds: int = 3,
    once_ms: float = 2000.0,
) -> dict[str, Timing]:
    """Time every variant on the CPU, one call each a round, until `seconds` are spent and `min_rounds` are
    done.

    The order is rotated each round, so that no variant always runs in the wake of the same other one. A
    variant slower than `slow_ms` takes part in the first `slow_rounds` rounds only, one slower than `once_ms`
    in none: its single warm-up call is its figure.
    """
    names = list(variants)
    first = {name: _once(variants[name]) for name in names}
    slow = {name for name in names if first[name] > slow_ms}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in [name for name in names if first[name] > once_ms]:
        samples[name].append(first[name])
        names.remove(name)
    for name in names:
        if name not in slow:
            variants[name]()
    end = time.perf_counter() + seconds
    for round_ in range(max_rounds):
        if round_ >= min_rounds and time.perf_counter() > end:
            break
        turn = round_ % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            if round_ < slow_rounds or name not in slow:
                samples[name].append(_once(variants[name]))
    return {name: Timing.of(values) for name, values in samples.items()}


def _once(call: Call) -> float:
    """One call in ms."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def ratio(
    of: Timing,
    to: Timing,
    *,
    seed: int = 0,
    draws: int = 500,
) -> Ratio:
    """`of` over `to`, paired by round (the rounds both ran in): median and 95% bootstrap interval."""
    n = min(of.n, to.n)
    return paired_ratio(of.samples[:n], to.samples[:n], seed=seed, draws=draws)


def paired_ratio(
    of: Sequence[float],
    to: Sequence[float],
    *,
    seed: int = 0,
    draws: int = 500,
) -> Ratio:
    """Median of of[i]/to[i] with a 95% bootstrap interval (percentiles of resampled medians)."""
    quotients = [a / b for a, b in zip(of, to, strict=True)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(quotients, k=len(quotients))) for _ in range(draws))
    low, high = medians[round(0.025 * (draws - 1))], medians[round(0.975 * (draws - 1))]
    return Ratio(statistics.median(quotients), low, high, len(quotients))


def rotate(function: Callable[..., Any], inputs: Sequence[Sequence[Any]]) -> Call:
    """A call without arguments that walks through the input sets, one set a call."""
    position = 0

    def call() -> object:
        nonlocal position
        position = (position + 1) % len(inputs)
        return function(*inputs[position])

    return call


@dataclass(frozen=True)
class DeviceTiming:
    """Device time of one call by graph replay, and host time of one eager enqueue; both in ms."""

    device: Timing
    host: Timing


def l2_bytes(device: torch.device) -> int:
    """L2 size of a CUDA device as the driver tells it; 50 MB (an H100's) where it does not."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return int(size) or 50 << 20


def input_sets(bytes_each: int, tensors_each: int, device: torch.device) -> int:
    """How many input sets a cold rotation needs: together over 3x L2, at least 2, at most 32; on the CPU 1
    set.

    Long lists are about host cost, and each set is captured once per variant: at most 800 tensors over all
    sets.
    """
    if device.type != "cuda":
        return 1
    cold = max(2, min(32, -(-3 * l2_bytes(device) // max(bytes_each, 1)) + 1))
    return max(1, min(cold, 800 // max(tensors_each, 1)))


def cuda_interleave(
    variants: Mapping[str, Callable[..., Any]],
    inputs: Mapping[str, Sequence[Sequence[Any]]],
    *,
    seconds: float = 1.0,
    min_rounds: int = 10,
    max_rounds: int = 200,
) -> tuple[dict[str, DeviceTiming], dict[str, str]]:
    """Time variants on the current CUDA device; `inputs[name]` holds that variant's rotating argument sets.

    Returns the timings, and for each variant that cannot be captured (it makes the host wait) the reason.
    """
    graphs: dict[str, list[torch.cuda.CUDAGraph]] = {}
    failed: dict[str, str] = {}
    for name, function in variants.items():
        try:
            graphs[name] = [_capture(function, args) for args in inputs[name]]
        except RuntimeError as error:
            failed[name] = "cannot be captured: " + str(error).splitlines()[0]
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    end = time.perf_counter() + seconds
    for round_ in range(max_rounds):
        if round_ >= min_rounds and time.perf_counter() > end:
            break
        for name, replays in graphs.items():
            samples[name].append(_replay_ms(replays))
    timed = {n: DeviceTiming(Timing.of(samples[n]), host_time(variants[n], inputs[n])) for n in graphs}
    return timed, failed


def _capture(function: Callable[..., Any], args: Sequence[Any]) -> torch.cuda.CUDAGraph:
    """One call as a graph, after three warm-up calls on a side stream (lazy set-up must not be captured)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(*args)
    return graph


def _replay_ms(graphs: Sequence[torch.cuda.CUDAGraph]) -> float:
    """Mean device ms of one replay over one walk through all input sets, behind a short device sleep."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(200_000)  # about 0.1 ms: the replays are all enqueued before the first one starts
    start.record()
    for graph in graphs:
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / len(graphs)


def host_time(
    function: Callable[..., Any],
    inputs: Sequence[Sequence[Any]],
    *,
    calls: int = 30,
    seconds: float = 1.0,
) -> Timing:
    """Host ms to enqueue one call while the device is busy, so that nothing but the host's own work is
    counted."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    for i in range(calls):
        if samples and time.perf_counter() > end:
            break
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # about 10 ms: the queue does not drain while the call is enqueued
        start = time.perf_counter_ns()
        function(*inputs[i % len(inputs)])
        samples.append((time.perf_counter_ns() - start) / 1e6)
    torch.cuda.synchronize()
    return Timing.of(samples)
