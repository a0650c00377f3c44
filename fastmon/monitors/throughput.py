"""Time, throughput and memory, from the host's clock and the allocator's counters: no device work.

A step lasts from one `Monitor.step` to the next, less pauses (evaluation, checkpoints) and what torch.compile took,
which are reported on their own. On a GPU the host runs ahead of the device; over a few steps the two rates agree.
MFU follows arXiv 2204.02311: flops_per_token = 6 N + 12 L H Q T, given by the workload.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastmon import device as hardware
from fastmon.monitors import Base, Scene
from fastmon.readback import Numbers
from fastmon.sinks import Row

MIB = 2**20


class Throughput(Base):
    """Everything that a clock, the allocator and the operating system tell."""

    FILLS: ClassVar[tuple[str, ...]] = (
        "Time/step_ms",
        "Time/step_avg_ms",
        "Time/training_time_ms",
        "Time/total_time_s",
        "Time/tokens_per_s",
        "Time/iterations_per_s",
        "Time/eta_s",
        "Time/eval_ms",
        "Time/checkpoint_ms",
        "Time/compile_ms",
        "Time/monitor_ms",
        "Hardware/peak_memory_mb",
        "Hardware/reserved_memory_mb",
        "Hardware/allocated_memory_mb",
        "Hardware/host_rss_mb",
        "Hardware/monitor_memory_mb",
        "Hardware/mfu",
        "Hardware/tflops_per_s",
    )

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._start = self._last = time.perf_counter()
        self._before_s = 0.0  # wall time of the runs that this one resumes
        self._training_ms = 0.0
        self._steps = 0
        self._compile_ms = _compile_ms()
        self._rss = _open_statm()
        self._peak = self._peak_flops()

    def enqueue(self, due: frozenset[str]) -> tuple[Sequence[Tensor], Any]:
        """Close the step's account."""
        now = time.perf_counter()
        scene, paused = self.scene, self.scene.paused_ms
        compiled = _compile_ms()
        values = {f"Time/{kind}_ms": ms for kind, ms in paused.items()}
        compiling = max(compiled - self._compile_ms, 0.0)
        if compiling:
            values["Time/compile_ms"] = compiling
        step_ms = max(1e3 * (now - self._last) - sum(paused.values()) - compiling, 1e-3)
        self._last, self._compile_ms = now, compiled
        paused.clear()
        self._training_ms += step_ms
        self._steps += 1
        average = self._training_ms / self._steps
        values["Time/step_ms"] = step_ms
        values["Time/step_avg_ms"] = average
        values["Time/training_time_ms"] = self._training_ms
        values["Time/total_time_s"] = self._before_s + now - self._start
        values["Time/iterations_per_s"] = 1e3 / step_ms
        values["Time/monitor_ms"], scene.spent_ms = scene.spent_ms, 0.0
        if scene.total_steps is not None:
            values["Time/eta_s"] = max(scene.total_steps - scene.step, 0) * average / 1e3
        if scene.tokens_per_step is not None:
            rate = values["Time/tokens_per_s"] = 1e3 * scene.tokens_per_step / step_ms
            if scene.flops_per_token is not None:
                flops = scene.flops_per_token * rate
                values["Hardware/tflops_per_s"] = flops / 1e12
                if self._peak is not None:
                    values["Hardware/mfu"] = flops / self._peak
        values.update(self._memory())
        return (), {name: value for name, value in values.items() if name in due}

    def decode(self, numbers: Numbers, note: Any, row: Row) -> None:
        """Host values, named already."""
        row.values.update(note)

    def state_dict(self) -> dict[str, Any]:
        """The clocks, so that averages go on."""
        total = self._before_s + time.perf_counter() - self._start
        return {"training_ms": self._training_ms, "steps": self._steps, "total_s": total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self._training_ms, self._steps = state["training_ms"], state["steps"]
        self._before_s = state["total_s"]
        self._start = self._last = time.perf_counter()

    def close(self) -> None:
        """Close the operating system's counter."""
        if self._rss is not None:
            os.close(self._rss)
            self._rss = None

    def _memory(self) -> dict[str, float]:
        values = {"Hardware/monitor_memory_mb": (self.scene.buffers_bytes + self.scene.tape_bytes) / MIB}
        if self._rss is not None:
            pages = os.pread(self._rss, 64, 0).split()[1]
            values["Hardware/host_rss_mb"] = int(pages) * _PAGE / MIB
        if self.scene.device.type == "cuda":
            stats = torch.cuda.memory_stats_as_nested_dict(self.scene.device)
            values["Hardware/peak_memory_mb"] = stats["allocated_bytes"]["all"]["peak"] / MIB
            values["Hardware/allocated_memory_mb"] = stats["allocated_bytes"]["all"]["current"] / MIB
            values["Hardware/reserved_memory_mb"] = stats["reserved_bytes"]["all"]["current"] / MIB
        elif self.scene.device.type == "mps":
            values["Hardware/allocated_memory_mb"] = torch.mps.current_allocated_memory() / MIB
            values["Hardware/reserved_memory_mb"] = torch.mps.driver_allocated_memory() / MIB
        return values

    def _peak_flops(self) -> float | None:
        """Peak of all devices at the precision of the matrix products; None where it is not known."""
        if self.scene.device.type != "cuda":
            return None
        dtypes = {p.dtype for p in self.scene.plan.pieces if p.role == "matrix"}
        dtype = self.scene.compute_dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
        peak = hardware.peak_flops(hardware.name(self.scene.device), dtype=dtype)
        return None if peak is None else peak * self.scene.world_size


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def _open_statm() -> int | None:
    path = Path("/proc/self/statm")
    return os.open(path, os.O_RDONLY) if path.exists() else None


def _compile_ms() -> float:
    """What dynamo has spent on compiling in this process; 0 where it was never imported."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    spent: Mapping[str, int] = getattr(dynamo, "cumulative_time_spent_ns", {})
    return (spent.get("entire_frame_compile", 0) + spent.get("entire_backward_compile", 0)) / 1e6
