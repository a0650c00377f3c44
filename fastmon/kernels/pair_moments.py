"""Inner product, norms and distance of paired tensors in one read of both, two launches for a list of one
dtype.

Stage one reduces chunks of 2^16 pairs, one program each, to <x, y>, |x|^2, |y|^2 and |x - y|^2 in fp32;
stage two joins a tensor's chunks in fp64, so that a cosine formed there is right from 1e-30 to 1e30. A
chunk with numbers whose fp32 squares would under- or overflow is read once more (from the L2 cache), x and
y each scaled by a power of two of their own, and x - y by the larger one's. Deterministic: no atomics, no
dependence on neighbours.
"""

# Kernels' parameters are Triton values, which have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointers import (
    FUSION,
    TRITON_DTYPES,
    addresses,
    chunking_at,
    dtypes_of,
    exponent_of,
    lanes,
    numels_of,
    pow2,
    pow2_double,
    resident,
    typed,
)

CHUNK = 65536  # pairs a program
THREAD = 8  # pairs a thread and step: one 16-byte load of each list in bf16, two in fp32
UNROLL = 2  # steps whose loads are in flight together
MERGE_BLOCK = 256  # chunks a step of stage two
CHUNK_LAUNCH = {"num_warps": 4, "num_stages": 1}
MERGE_LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def scan_pair(x_ptr, y_ptr, length, x_scale, y_scale, d_scale, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Read both once; return (dot, xx, yy, dd) of the scaled values and the absmax of each unscaled one."""
    lane = tl.arange(0, TILE)
    dot = tl.zeros([TILE], tl.float32)
    xx = tl.zeros([TILE], tl.float32)
    yy = tl.zeros([TILE], tl.float32)
    dd = tl.zeros([TILE], tl.float32)
    x_max = tl.zeros([TILE], tl.float32)
    y_max = tl.zeros([TILE], tl.float32)
    step = TILE * UNROLL
    unrolled = length // step
    for i in range(0, unrolled):
        for j in tl.static_range(UNROLL):
            offset = i * step + j * TILE + lane
            x = tl.load(x_ptr + offset).to(tl.float32)
            y = tl.load(y_ptr + offset).to(tl.float32)
            x_max = tl.maximum(x_max, tl.abs(x))
            y_max = tl.maximum(y_max, tl.abs(y))
            xs = x * x_scale
            ys = y * y_scale
            d = x * d_scale - y * d_scale
            dot += xs * ys
            xx += xs * xs
            yy += ys * ys
            dd += d * d
    for i in range(0, tl.cdiv(length - unrolled * step, TILE)):
        offset = unrolled * step + i * TILE + lane
        live = offset < length
        x = tl.load(x_ptr + offset, mask=live, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offset, mask=live, other=0.0).to(tl.float32)
        x_max = tl.maximum(x_max, tl.abs(x))
        y_max = tl.maximum(y_max, tl.abs(y))
        xs = x * x_scale
        ys = y * y_scale
        d = x * d_scale - y * d_scale
        dot += xs * ys
        xx += xs * xs
        yy += ys * ys
        dd += d * d
    return (
        tl.sum(dot, 0),
        tl.sum(xx, 0),
        tl.sum(yy, 0),
        tl.sum(dd, 0),
        tl.max(x_max, 0),
        tl.max(y_max, 0),
    )


@triton.jit
def safe(absmax):
    """Say whether 2^16 squares up to absmax^2 keep fp32's relative precision; zeros and non-finites need no
    scale.
    """
    return ((absmax > 2.0**-30) & (absmax < 2.0**50)) | (absmax == 0.0) | (absmax == float("inf"))


@triton.jit(do_not_specialize=["begin", "chunks", "n"])
def pair_chunks(
    table,  # (2, n) int64 addresses, xs then ys
    numels,  # (n,) int64
    first,  # (n,) int64
    owner,  # (chunks,) int64
    partial,  # (7, chunks) fp32: dot, xx, yy, dd, exponents of x, y and x - y
    begin,
    chunks,
    n,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Reduce one chunk of a pair a program."""
    c = begin + tl.program_id(0)
    t = tl.load(owner + c)
    start = (c - tl.load(first + t)) * CHUNK
    length = tl.minimum(tl.load(numels + t) - start, CHUNK).to(tl.int32)
    x_ptr = typed(tl.load(table + t), DTYPE, ALIGNED) + start
    y_ptr = typed(tl.load(table + n + t), DTYPE, ALIGNED) + start

    dot, xx, yy, dd, x_max, y_max = scan_pair(x_ptr, y_ptr, length, 1.0, 1.0, 1.0, TILE, UNROLL)
    x_exponent = 0
    y_exponent = 0
    d_exponent = 0
    # The maximum of several values skips NaN, but a NaN among them is in xx or yy for good.
    if (safe(x_max) & safe(y_max)) == 0:
        x_exponent = tl.where(x_max > 0.0, exponent_of(x_max), 0)
        y_exponent = tl.where(y_max > 0.0, exponent_of(y_max), 0)
        d_exponent = exponent_of(tl.maximum(x_max, y_max))
        dot, xx, yy, dd, _, _ = scan_pair(
            x_ptr, y_ptr, length, pow2(-x_exponent), pow2(-y_exponent), pow2(-d_exponent), TILE, UNROLL
        )
    # An infinite input would leave some of the sums finite or infinite; the pair is NaN as a whole.
    bad = (x_max == float("inf")) | (y_max == float("inf"))
    xx = tl.where(bad, float("nan"), xx)

    out = partial + c
    row = chunks.to(tl.int64)
    tl.store(out, dot)
    tl.store(out + row, xx)
    tl.store(out + 2 * row, yy)
    tl.store(out + 3 * row, dd)
    tl.store(out + 4 * row, x_exponent)
    tl.store(out + 5 * row, y_exponent)
    tl.store(out + 6 * row, d_exponent)


@triton.jit(do_not_specialize=["chunks", "n"])
def pair_merge(
    partial,  # (7, chunks) fp32
    numels,  # (n,) int64
    first,  # (n,) int64
    out,  # (8, n) fp32: dot, xx, yy, dd, x_l2, y_l2, d_l2, cosine
    chunks,
    n,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join one pair's chunks a program, in fp64, and form the norms and the cosine there."""
    t = tl.program_id(0).to(tl.int64)
    row = chunks.to(tl.int64)
    own = tl.cdiv(tl.load(numels + t), CHUNK)
    source = partial + tl.load(first + t)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    dot = tl.zeros([BLOCK], tl.float64)
    xx = tl.zeros([BLOCK], tl.float64)
    yy = tl.zeros([BLOCK], tl.float64)
    dd = tl.zeros([BLOCK], tl.float64)
    for i in range(0, tl.cdiv(own, BLOCK)):
        c = i * BLOCK + lane
        live = c < own
        x_unit = pow2_double(tl.load(source + 4 * row + c, mask=live, other=0.0).to(tl.int32))
        y_unit = pow2_double(tl.load(source + 5 * row + c, mask=live, other=0.0).to(tl.int32))
        d_unit = pow2_double(tl.load(source + 6 * row + c, mask=live, other=0.0).to(tl.int32))
        dot += x_unit * y_unit * tl.load(source + c, mask=live, other=0.0).to(tl.float64)
        xx += x_unit * x_unit * tl.load(source + row + c, mask=live, other=0.0).to(tl.float64)
        yy += y_unit * y_unit * tl.load(source + 2 * row + c, mask=live, other=0.0).to(tl.float64)
        dd += d_unit * d_unit * tl.load(source + 3 * row + c, mask=live, other=0.0).to(tl.float64)
    dot_all = tl.sum(dot, 0)
    xx_all = tl.sum(xx, 0)
    yy_all = tl.sum(yy, 0)
    dd_all = tl.sum(dd, 0)
    x_l2 = tl.sqrt(xx_all)
    y_l2 = tl.sqrt(yy_all)
    defined = (xx_all > 0.0) & (yy_all > 0.0)
    cosine = dot_all / tl.where(defined, x_l2, 1.0) / tl.where(defined, y_l2, 1.0)
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    nonfinite = (xx_all + yy_all) != (xx_all + yy_all)
    nan = tl.where(nonfinite, float("nan"), 0.0)
    columns = n.to(tl.int64)
    tl.store(out + t, dot_all.to(tl.float32) + nan)
    tl.store(out + columns + t, xx_all.to(tl.float32) + nan)
    tl.store(out + 2 * columns + t, yy_all.to(tl.float32) + nan)
    tl.store(out + 3 * columns + t, dd_all.to(tl.float32) + nan)
    tl.store(out + 4 * columns + t, x_l2.to(tl.float32) + nan)
    tl.store(out + 5 * columns + t, y_l2.to(tl.float32) + nan)
    tl.store(out + 6 * columns + t, tl.sqrt(dd_all).to(tl.float32) + nan)
    tl.store(out + 7 * columns + t, tl.where(defined, cosine.to(tl.float32), float("nan")) + nan)


def launch(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Return fp32 (8, n): dot, xx, yy, dd, x_l2, y_l2, d_l2, cosine; `fastmon::pair_moments` says what they
    mean.

    The tensors of a pair have one dtype and one dense layout; their elements are read linearly. One launch
    a dtype (two where some pairs are not 16-byte aligned) and one to join.
    """
    n = len(xs)
    device = xs[0].device if n else torch.device("cpu")
    out = torch.empty((8, n), dtype=torch.float32, device=device)
    if n == 0:
        return out
    pointers = addresses(xs) + addresses(ys)
    cuts = chunking_at(pointers, numels_of(xs), dtypes_of(xs), CHUNK)
    table = resident(pointers, lambda: pointers, device)
    numel, first, owner = cuts.tables(device)
    partial = torch.empty((7, cuts.chunks), dtype=torch.float32, device=device)
    tile = THREAD * CHUNK_LAUNCH["num_warps"] * lanes(device)
    for group in cuts.groups:
        pair_chunks[(group.end - group.begin,)](
            table,
            numel,
            first,
            owner,
            partial,
            group.begin,
            cuts.chunks,
            n,
            DTYPE=TRITON_DTYPES[group.dtype],
            ALIGNED=group.aligned,
            CHUNK=CHUNK,
            TILE=tile,
            UNROLL=UNROLL,
            **CHUNK_LAUNCH,
            **FUSION,
        )
    pair_merge[(n,)](
        partial, numel, first, out, cuts.chunks, n, CHUNK=CHUNK, BLOCK=MERGE_BLOCK, **MERGE_LAUNCH, **FUSION
    )
    return out
