"""Exact power-of-two scaling, so that squares neither underflow nor overflow.

fp32 squares fail outside about 1e-19..1e19: the norm of a vector of 1e-30 would be 0. Dividing by a power of two
is exact, so every op brings its input near one first and scales the result back.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXPONENT_BITS = 0x7F800000
_EXPONENT_BITS_64 = 0x7FF0000000000000
_SMALLEST = 2.0**-126  # the smallest normal fp32; stands in for zero and denormals
_SMALLEST_64 = 2.0**-1022


def power_of_two(
    magnitude: Tensor,  # any shape, fp32 or fp64, >= 0
) -> Tensor:
    """The largest power of two <= magnitude (same shape and dtype), from 2^-126 (fp64: 2^-1022) up.

    Zero and denormals give that smallest one. Inf and NaN give 1: dividing by the result keeps them as they are.
    """
    wide = magnitude.dtype == torch.float64
    whole, mask = (torch.int64, _EXPONENT_BITS_64) if wide else (torch.int32, _EXPONENT_BITS)
    bits = (magnitude.view(whole) & mask).view(magnitude.dtype)
    bits = torch.where(torch.isfinite(magnitude), bits, torch.ones_like(bits))
    return bits.clamp(min=_SMALLEST_64 if wide else _SMALLEST)


def exponent(
    magnitude: Tensor,  # any shape, fp32, >= 0
) -> Tensor:
    """floor(log2(magnitude)) as fp32, exact; 0 for zero, denormal, Inf and NaN."""
    bits = magnitude.view(torch.int32) & _EXPONENT_BITS
    known = torch.isfinite(magnitude) & (bits > 0)
    return torch.where(known, (bits >> 23) - 127, torch.zeros_like(bits)).to(torch.float32)


def two_to(
    e: Tensor,  # any shape, fp32 holding integers
) -> Tensor:
    """2^e, exact (torch.exp2 is not); e is clamped to -126..127."""
    return ((e.clamp(-126, 127).to(torch.int32) + 127) << 23).view(torch.float32)
