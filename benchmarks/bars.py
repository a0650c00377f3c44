"""The promises of README as measurements: each bar is a number from this run beside the number it must reach.

CPU: one warm spectral iteration against `torch.sum` over the same bytes, and against the frozen baseline; the
bandwidth of `pair_moments` against `torch.sum`'s; the accuracy of cold Lanczos; the import time.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import frozen_ns5_power, record, shapes, stamp, timing
from fastmon import ops

COLUMNS = (
    "bar", "value", "low", "high", "unit", "limit", "met", "detail",
    "device", "threads", "driver", "torch", "triton", "python", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One measured promise: `value` (95% interval low-high) must be at most or at least `limit`."""

    name: str
    value: float
    limit: float
    at_most: bool
    unit: str
    detail: str
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        """Whether the measured value keeps the promise."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def row(self) -> record.Row:
        """As columns of the CSV."""
        return {
            "bar": self.name,
            "value": record.number(self.value, 4),
            "low": "" if self.low is None else record.number(self.low, 4),
            "high": "" if self.high is None else record.number(self.high, 4),
            "unit": self.unit,
            "limit": f"{'<=' if self.at_most else '>='} {record.number(self.limit)}",
            "met": "yes" if self.met else "no",
            "detail": self.detail,
        }


def warm_spectral(device: torch.device, *, seconds: float = 6.0) -> Iterator[Bar]:
    """One warm iteration over GPT-2 124M's 48 hidden matrices over `torch.sum` of the same bytes viewed as
    fp32."""
    for dtype, limit in ((torch.float32, 1.3), (torch.bfloat16, 1.5)):
        flat, ws = shapes.packed("gpt2-124m-hidden", dtype=dtype, device=device)
        state = ops.spectral_state(ws)
        as_fp32 = flat.view(torch.float32)
        variants = {
            "warm": lambda ws=ws, state=state: ops.spectral_norm(ws, state=state),
            "sum": lambda x=as_fp32: x.sum(),
        }
        timed = timing.interleave(variants, seconds=seconds, min_rounds=20)
        over = timing.ratio(timed["warm"], timed["sum"])
        short = str(dtype).removeprefix("torch.")
        detail = f"{timed['warm'].median:.2f} ms, torch.sum {timed['sum'].median:.2f} ms, {over.n} rounds"
        name = f"warm spectral_norm / torch.sum, {short}"
        yield Bar(name, over.median, limit, True, "x", detail, over.low, over.high)
        if dtype == torch.float32:
            yield _against_frozen(ws, state)


def _against_frozen(ws: list[Tensor], state: Tensor) -> Bar:
    variants = {
        "warm": lambda: ops.spectral_norm(ws, state=state),
        "frozen": lambda: frozen_ns5_power.spectral_norms(ws),
    }
    timed = timing.interleave(variants, seconds=2.0, min_rounds=20, slow_rounds=2, once_ms=math.inf)
    factor = timed["frozen"].median / timed["warm"].median
    detail = f"frozen eager ns5 + 7 power iterations {timed['frozen'].median / 1e3:.2f} s"
    return Bar("warm spectral_norm, times faster than the frozen baseline", factor, 300, False, "x", detail)


def pair_bandwidth(device: torch.device, *, seconds: float = 6.0) -> Iterator[Bar]:
    """Bandwidth of pair_moments over two vectors of 85M elements, as a share of `torch.sum`'s over the same
    bytes."""
    for dtype in (torch.float32, torch.bfloat16):
        x, xs = shapes.packed("flat-85m", dtype=dtype, device=device)
        y, ys = shapes.packed("flat-85m", dtype=dtype, device=device, seed=1)
        halves = x.view(torch.float32), y.view(torch.float32)
        variants = {
            "pair": lambda xs=xs, ys=ys: ops.pair_moments(xs, ys),
            "sum": lambda halves=halves: [half.sum() for half in halves],
        }
        timed = timing.interleave(variants, seconds=seconds, min_rounds=10)
        share = timing.ratio(timed["sum"], timed["pair"])
        short = str(dtype).removeprefix("torch.")
        gb = 2 * x.numel() * x.element_size() / 1e6
        ours, theirs = gb / timed["pair"].median, gb / timed["sum"].median
        detail = f"{ours:.1f} GB/s, torch.sum {theirs:.1f} GB/s, {share.n} rounds"
        name = f"pair_moments bandwidth / torch.sum's, 85M elements, {short}"
        yield Bar(name, share.median, 0.8, False, "x", detail, share.low, share.high)


def cold_accuracy(device: torch.device) -> Iterator[Bar]:
    """Worst relative error of cold Lanczos (20 iterations) against svdvals over Gaussians and power laws, in
    %."""
    errors: list[tuple[float, str]] = []
    for name, w in _spectra():
        truth = float(torch.linalg.svdvals(w)[0])
        for seed in range(5):
            sigma = float(ops.lanczos_norm(w.to(device, torch.float32), seed=seed).sigma)
            errors.append((100 * abs(sigma - truth) / truth, name))
    worst, where = max(errors, key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0])
    detail = f"worst on {where}; 5 seeds each of {', '.join(name for name, _ in _spectra())}"
    yield Bar("cold lanczos_norm, worst error against svdvals", worst, 1.0, True, "%", detail)


def _spectra() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for m, n in ((768, 768), (2304, 768)):
        yield f"Gaussian {m}x{n}", torch.randn(m, n, generator=generator, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(768, 512, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(512, 512, generator=generator, dtype=torch.float64)).Q
    for power in (0.2, 0.5, 1.0, 2.0):
        yield f"power law {power:g}", u * torch.arange(1, 513, dtype=torch.float64) ** -power @ v.mT


def import_cost() -> Iterator[Bar]:
    """Milliseconds that `import fastmon`, and its ops and monitor with it, add to a process that imported
    torch."""
    code = (
        "import time, torch; t = time.perf_counter(); import fastmon; a = time.perf_counter(); "
        "fastmon.ops, fastmon.Monitor; b = time.perf_counter(); print((a - t) * 1e3, (b - a) * 1e3)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=stamp.ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(7)
    ]
    first, rest = (statistics.median(float(line.split()[i]) for line in said) for i in (0, 1))
    detail = f"ops and Monitor at first use: {rest:.0f} ms"
    yield Bar("import fastmon after import torch", first, 60, True, "ms", detail)


def measure(device: torch.device) -> Iterator[Bar]:
    """Every bar of this device, one at a time."""
    yield from import_cost()
    yield from cold_accuracy(device)
    if device.type == "cpu":  # on a GPU the op cases carry the bars: shares of the measured copy bandwidth
        yield from warm_spectral(device)
        yield from pair_bandwidth(device)


def run(
    device: torch.device,
    *,
    out: Path | None = None,
    partial: bool = False,
) -> bool:
    """Measure, print and write every bar; True where all are met."""
    facts = stamp.stamp(device)
    sink = record.Csv(out, COLUMNS, partial=partial) if out else None
    met = True
    print(f"bars on {facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['commit']}")
    for bar in measure(device):
        row = bar.row()
        met &= bar.met
        interval = f" ({row['low']} to {row['high']})" if row["low"] else ""
        mark = "ok  " if bar.met else "MISS"
        print(f"{mark} {row['bar']}: {row['value']} {row['unit']}{interval}, bar {row['limit']}")
        print(f"     {row['detail']}", flush=True)
        if sink:
            sink.add(row | facts)
    if sink:
        sink.close()
    print(flush=True)
    return met
