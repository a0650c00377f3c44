"""Cached facts of the hardware. What is not known is None, never a guess."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

# Peak dense bf16 throughput in TFLOP/s and memory bandwidth in GB/s, from the makers' data sheets (dense, not the
# sparse marketing figure). First match of the device name wins, so the special cases stand before the general ones.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 8000.0),
    ("B200", 2250.0, 8000.0),
    ("H200", 989.0, 4800.0),
    ("H100 PCIe", 756.0, 2000.0),
    ("H100 NVL", 835.0, 3900.0),
    ("H100", 989.0, 3350.0),
    ("A100", 312.0, 2039.0),
    ("L40S", 362.0, 864.0),
    ("L4", 121.0, 300.0),
    ("RTX 4090", 165.2, 1008.0),
    ("RTX 3090", 71.0, 936.0),
    ("MI325X", 1307.0, 6000.0),
    ("MI300X", 1307.0, 5300.0),
)


@functools.cache
def sm(device: torch.device) -> int | None:
    """Compute capability as one number (90 for sm_90), or None where the device is not an NVIDIA GPU."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def name(device: torch.device) -> str:
    """The marketing name of the device: the GPU's, "Apple MPS", or the CPU model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple MPS" if device.type == "mps" else cpu_model()


@functools.cache
def cpu_model() -> str:
    """The CPU's model name as the operating system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_flops(device_name: str, *, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Peak dense FLOP/s of one device of that name; None for an unknown device or another dtype than bf16/fp16.

    fp16 and bf16 tensor cores run at the same dense rate on every card of the table.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    row = _row(device_name)
    return None if row is None else row[1] * 1e12


def peak_bandwidth(device_name: str) -> float | None:
    """Data-sheet memory bandwidth in bytes per second; None for an unknown device."""
    row = _row(device_name)
    return None if row is None else row[2] * 1e9


def _row(device_name: str) -> tuple[str, float, float] | None:
    words = device_name.replace("-", " ").split()
    return next((row for row in _PEAKS if all(part in words for part in row[0].split())), None)


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (AVX512-BF16 or AMX); without it bf16 matrix products are emulated."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def _annotate() -> Any:
    if os.environ.get("FASTMON_NVTX", "0") in ("", "0"):
        return None
    try:
        return importlib.import_module("nvtx").annotate
    except ImportError as error:
        raise RuntimeError(
            "FASTMON_NVTX is set, but the package nvtx is not installed (pip install nvtx)"
        ) from error


_NOTHING = contextlib.nullcontext()


def trace(name: str) -> contextlib.AbstractContextManager[Any]:
    """A named NVTX range for profilers such as Nsight Systems, where FASTMON_NVTX=1 is set; else nothing."""
    annotate = _annotate()
    context: contextlib.AbstractContextManager[Any] = (
        _NOTHING if annotate is None else annotate(name, domain="fastmon")
    )
    return context
