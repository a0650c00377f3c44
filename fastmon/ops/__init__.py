"""Ops: fused numerics over lists of tensors, each one contract with several implementations.

    from fastmon import ops
    sigma = ops.lanczos_norm([p for p in model.parameters() if p.ndim == 2]).sigma     # (n,), no sync

Every public function takes a tensor or a list of ragged tensors, accumulates in fp32 or better, returns on the
inputs' device and never waits for it.
"""

from fastmon.backend import OPS
from fastmon.ops.lanczos import lanczos_norm
from fastmon.ops.moments import Moments, merge_moments, moments
from fastmon.ops.newton_schulz import Polar, newton_schulz
from fastmon.ops.pair_moments import PairMoments, pair_moments
from fastmon.ops.spectral import Spectral, spectral_norm
from fastmon.ops.spectral_state import spectral_state

__all__ = [
    "OPS",
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
]
