"""The machine's own ceiling, measured in the same run: copy and read bandwidth, and bf16/fp32 matmul
throughput.

A share of the roofline is the least time an op's traffic could take at the measured ceiling, over the time it
took. Reading is bounded by `torch.sum` on the CPU (all threads, one stream of reads) and by the copy kernel
on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import timing
from fastmon.backend import Traffic


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings: bytes per second for reading and copying (both directions counted), FLOP/s per
    dtype."""

    read: float
    copy: float
    flops: dict[torch.dtype, float]

    def share(self, traffic: Traffic, ms: float, dtype: torch.dtype) -> float:
        """Attainable time over measured time: 1 is the ceiling. The later of memory and arithmetic bounds."""
        bound = traffic.bytes / max(self.read, self.copy)
        if (
            dtype in self.flops and traffic.flops > 50 * traffic.bytes
        ):  # matmuls; reductions are bound by memory
            bound = max(bound, traffic.flops / self.flops[dtype])
        return bound / (ms / 1e3)


def measure(device: torch.device, *, seconds: float = 1.0) -> Roofline:
    """Measure the ceilings of `device` on 256 MiB buffers and 2048 (GPU: 8192) square matmuls."""
    count = 64 << 20
    x, y = torch.ones(count, device=device), torch.empty(count, device=device)
    n = 8192 if device.type == "cuda" else 2048
    matrices = {
        dtype: torch.ones(n, n, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    variants = {"sum": x.sum, "copy": lambda: y.copy_(x)}
    variants |= {str(dtype): (lambda a=a: a @ a) for dtype, a in matrices.items()}
    if device.type == "cuda":
        found, _ = timing.cuda_interleave(variants, {name: [()] for name in variants}, seconds=seconds)
        ms = {name: entry.device.median for name, entry in found.items()}
    else:
        ms = {name: entry.p20 for name, entry in timing.interleave(variants, seconds=seconds).items()}
    per_second = {name: 1e3 / value for name, value in ms.items()}
    flops = {dtype: 2 * n**3 * per_second[str(dtype)] for dtype in matrices}
    return Roofline(4 * count * per_second["sum"], 8 * count * per_second["copy"], flops)
