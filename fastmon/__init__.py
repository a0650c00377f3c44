"""fastmon: see what a training run does at every step, without slowing it down.

Everything is loaded at first use (PEP 562): `import fastmon` costs nothing but itself, and reading a run's log or
METRICS leaves torch out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmon import backend, ops, optim
    from fastmon.metrics import METRICS
    from fastmon.monitor import Monitor
    from fastmon.monitors.spectral import compute_weight_spectral_norms
    from fastmon.ops.lanczos import lanczos_norm
    from fastmon.ops.moments import Moments, merge_moments, moments
    from fastmon.ops.newton_schulz import Polar, newton_schulz
    from fastmon.ops.pair_moments import PairMoments, pair_moments
    from fastmon.ops.spectral import Spectral, spectral_norm
    from fastmon.ops.spectral_state import spectral_state
    from fastmon.simple_logger import SimpleLogger

__version__ = "0.1.0"

_OPS = (
    "Moments",
    "PairMoments",
    "Polar",
    "Spectral",
    "lanczos_norm",
    "merge_moments",
    "moments",
    "newton_schulz",
    "pair_moments",
    "spectral_norm",
    "spectral_state",
)
_HOME = dict.fromkeys(_OPS, "fastmon.ops") | {
    "METRICS": "fastmon.metrics",
    "Monitor": "fastmon.monitor",
    "SimpleLogger": "fastmon.simple_logger",
    "compute_weight_spectral_norms": "fastmon.monitors.spectral",
}
_MODULES = ("backend", "ops", "optim")

__all__ = [
    "METRICS",
    "Moments",
    "Monitor",
    "PairMoments",
    "Polar",
    "SimpleLogger",
    "Spectral",
    "backend",
    "compute_weight_spectral_norms",
    "lanczos_norm",
    "merge_moments",
    "moments",
    "newton_schulz",
    "ops",
    "optim",
    "pair_moments",
    "spectral_norm",
    "spectral_state",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastmon.{name}")
    raise AttributeError(f"module 'fastmon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
