"""Largest singular values of a ragged list of matrices, warm: one read of every W an iteration, no host sync.

`gram` computes z = W'^T (W' v) for W' = W 2^-e; the kernel here turns it into sigma, residual and |W|_F and moves
the state on: v <- z / |z|, e <- floor(log2 |W|_F). All of it depends on device values only, selected on the device:
a zero matrix reports 0, a non-finite one NaN, and both leave their state as it was; a vector that missed W (W v = 0)
reports 0 with the residual sqrt(2) |W|_F, which is all that is known then. Where the exponent is so far
off that the squares left fp32's range (W grew or shrank by 2^50 since the last call), this call reports NaN and
sets the exponent from the absmax, so that the next one is right.

States of one vector a matrix (block 1).
"""

# Kernels' parameters are Triton values, which have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram import Gram, floats, layout, row_major
from .lanczos import lanczos
from .pointers import FUSION, exponent_of, pow2

__all__ = ["gram_matvec", "lanczos", "spectral_finish", "spectral_norm"]

BLOCK = 1024
FINISH_LAUNCH = {"num_warps": 8, "num_stages": 1}


@triton.jit
def sum_parts(pointers, inside, parts, padded):
    """Return the sum of `parts` vectors that lie `padded` floats apart, in order."""
    z = tl.load(pointers, mask=inside, other=0.0)
    for p in range(1, parts):
        z += tl.load(pointers + p * padded, mask=inside, other=0.0)
    return z


@triton.jit(do_not_specialize=["count", "programs"])
def finish(
    meta,  # (10, count) int64
    partial,  # fp32
    sums,  # (3, programs) fp32: |y|^2, |W'|_F^2, absmax
    state,  # fp32
    sigma_out,  # (count,) fp32
    residual_out,
    fro_out,
    count,
    programs,
    SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Finish one matrix a program. SUMMED: the one part of a matrix is z itself, and there is no absmax."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(meta + count + i)
    padded = (n + 15) // 16 * 16
    v_ptr = state + tl.multiple_of(tl.load(meta + 3 * count + i), 16)
    e_ptr = state + tl.load(meta + 4 * count + i)
    e = tl.load(e_ptr).to(tl.int32)
    if SUMMED:
        first = i
        own = i * 0 + 1
        z_ptr = partial + tl.multiple_of(tl.load(meta + 9 * count + i), 16)
    else:
        first = tl.load(meta + 6 * count + i)
        own = tl.load(meta + 7 * count + i)
        z_ptr = partial + tl.multiple_of(tl.load(meta + 8 * count + i), 16)
    lane = tl.arange(0, BLOCK)
    length_lanes = tl.zeros([BLOCK], tl.float32)
    square_lanes = tl.zeros([BLOCK], tl.float32)
    high_lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, own, BLOCK):
        live = start + lane < own
        at = first + start + lane
        length_lanes += tl.load(sums + at, mask=live, other=0.0)
        square_lanes += tl.load(sums + programs + at, mask=live, other=0.0)
        if not SUMMED:
            high_lanes = tl.maximum(high_lanes, tl.load(sums + 2 * programs + at, mask=live, other=0.0))
    s0 = tl.sqrt(tl.sum(length_lanes, 0))  # |W'v|
    fro2 = tl.sum(square_lanes, 0)
    high = tl.max(high_lanes, 0)

    over = tl.where(s0 > 0.0, 1.0 / s0, 0.0)
    norm_lanes = tl.zeros([BLOCK], tl.float32)
    slip_lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, padded * tl.minimum(own, 1), BLOCK):
        column = start + lane
        inside = column < padded
        half = sum_parts(z_ptr + column, inside, own, padded) * over  # W'^T u with u = W'v / |W'v|
        slip = half - s0 * tl.load(v_ptr + column, mask=inside, other=0.0)
        norm_lanes += half * half
        slip_lanes += slip * slip
    sigma = tl.sqrt(tl.sum(norm_lanes, 0))
    slip = tl.sqrt(tl.sum(slip_lanes, 0))

    inf = float("inf")
    known = (fro2 < inf) & (fro2 == fro2)
    good = known & (s0 > 0.0) & (sigma > 0.0) & (sigma < inf)
    # |W'|_F is in [1, 2) up to one training step; far outside, the squares above are no longer all there.
    stale = False
    if not SUMMED:
        stale = (high > 0.0) & (high < inf) & (fro2 == fro2) & ((fro2 < 2.0**-80) | (fro2 > 2.0**80))
        good = good & (stale == 0)
        known = known & (stale == 0)
    nothing = tl.where(known, 0.0, float("nan"))
    unit = pow2(tl.minimum(tl.maximum(e, -126), 127))
    residual = slip * tl.sqrt(tl.maximum(3.0 * sigma - s0, 0.0) / (sigma + s0))
    fro = tl.sqrt(fro2)
    blind = tl.where(known, 1.4142135623730951 * fro, float("nan"))  # v missed W: sigma_1 <= |W|_F, no more
    tl.store(sigma_out + i, tl.where(good, sigma * unit, nothing))
    tl.store(residual_out + i, tl.where(good, residual, blind) * unit)
    tl.store(fro_out + i, tl.where(known, fro * unit, float("nan")))

    if good:
        scale = over / sigma
        for start in range(0, padded, BLOCK):
            column = start + lane
            inside = column < padded
            # Summed again: reading back a stored sum would need an ordering between threads.
            z = sum_parts(z_ptr + column, inside, own, padded)
            tl.store(v_ptr + column, scale * z, mask=inside)
        tl.store(e_ptr, tl.minimum(tl.maximum(e + exponent_of(fro), -126), 126).to(tl.float32))
    if stale:
        tl.store(e_ptr, exponent_of(high).to(tl.float32))


def run_finish(
    gram_meta: Tensor,
    partial: Tensor,
    sums: Tensor,
    state: Tensor,
    count: int,
    programs: int,
    *,
    summed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `finish` and return sigma, residual and |W|_F, (count,) each and with memory of their own."""
    sigma, residual, fro = (torch.empty(count, dtype=torch.float32, device=state.device) for _ in range(3))
    finish[(count,)](
        gram_meta,
        partial,
        sums,
        state,
        sigma,
        residual,
        fro,
        count,
        programs,
        SUMMED=summed,
        BLOCK=BLOCK,
        **FINISH_LAUNCH,
        **FUSION,
    )
    return sigma, residual, fro


def spectral_norm(ws: list[Tensor], state: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, residual, fro (count,) fp32 after `iters` iterations; the state moves on.

    Two launches an iteration where all matrices have one dtype and width class; `fastmon::spectral_norm` says what
    the numbers mean. Reads every W once an iteration.
    """
    if not ws:
        return floats(0), floats(0), floats(0)
    ws = row_major(ws)
    gram = Gram(ws, state=True)
    results = (state, state, state)
    for _ in range(iters):
        gram.partials(state, state)
        results = run_finish(
            gram.meta, gram.partial, gram.sums, state, len(ws), gram.layout.programs, summed=False
        )
    return results


def gram_matvec(ws: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return z (flat), yy (count, 1, 1) and |W'|_F^2 (count,): the half before a sum over shards."""
    if not ws:
        return floats(0), floats(0, 1, 1), floats(0)
    ws = row_major(ws)
    gram = Gram(ws, state=True)
    gram.partials(state, state)
    z = torch.empty(gram.layout.flat, dtype=torch.float32, device=state.device)
    totals = torch.empty((3, len(ws)), dtype=torch.float32, device=state.device)
    gram.total(z, totals, flat=True)
    return z, totals[0].clone().view(-1, 1, 1), totals[1].clone()


def spectral_finish(
    z: Tensor, yy: Tensor, fro2: Tensor, state: Tensor, ns: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, residual, fro from (summed) halves; the state moves on."""
    if not len(ns):
        return floats(0), floats(0), floats(0)
    described = layout(tuple((0, n, n) for n in ns), ((torch.float32, True),) * len(ns), True)
    sums = torch.stack([yy.reshape(-1), fro2])
    meta = described.tables(state.device)[0]
    return run_finish(meta, z, sums, state, len(ns), len(ns), summed=True)
