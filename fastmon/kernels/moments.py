"""Counts, extremes and central moments of a ragged list in one read, two launches for a list of one dtype.

Stage one cuts every tensor into chunks of 2^16 elements, one program each. A lane of the program sees every
TILE-th element and keeps Welford's running mean and central sums: all lanes are at the same count, so the
division is one scalar per tile. Values are taken relative to the chunk's first one, which keeps a large
common mean (1e4 beside a spread of 1) from eating the bits of the higher moments. Lanes, and in stage two
chunks, are joined by Chan's formulas, where the joint mean comes first and the rest are plain sums; stage
two works in fp64, whose range holds any fp32 number to the fourth power. No atomics: two calls agree bit
for bit, and a tensor's result does not depend on its neighbours in the list.

Range: fp32 squares lose numbers below 1e-19 and above 1e19. A chunk whose absmax leaves the safe range is
read once more, scaled by a power of two (it lies in the L2 cache; ordinary data never does this).

Sources: Chan, Golub, LeVeque 1979; Pebay, SAND2008-6212 (third and fourth order).
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

CHUNK = 65536  # elements a program; counts below 2^24 stay exact in an fp32 partial
THREAD = 8  # elements a thread and step: one 16-byte load in bf16, two in fp32
TILE_4 = 1024  # elements a step for order 4, on any card: its sums fill the registers of 64 lanes otherwise
UNROLL = 4  # steps whose loads are in flight together
MERGE_BLOCK = 256  # chunks a step of stage two
CHUNK_LAUNCH = {"num_warps": 4, "num_stages": 1}
MERGE_LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit
def accumulate(x, k, mean, m2, m3, m4, ORDER: tl.constexpr):
    """Add each lane's k-th value; a lane given its own mean is left as it is: so tails are masked."""
    delta = x - mean
    step = delta * (1.0 / k)
    if ORDER == 2:
        mean += step
        m2 += delta * (x - mean)
    else:
        square = step * step
        term = delta * step * (k - 1.0)
        mean += step
        m4 += term * square * (k * k - 3.0 * k + 3.0) + 6.0 * square * m2 - 4.0 * step * m3
        m3 += term * step * (k - 2.0) - 3.0 * step * m2
        m2 += term
    return mean, m2, m3, m4


@triton.jit
def scan_chunk(x_ptr, length, scale, ORDER: tl.constexpr, TILE: tl.constexpr, UNROLL: tl.constexpr):
    """Read x[:length] once; return (zeros, nonfinite, min, max, shift, mean, m2, m3, m4).

    min and max are of x; the rest describes x * scale, its mean being shift + mean.
    """
    lane = tl.arange(0, TILE)
    shift = tl.load(x_ptr).to(tl.float32) * scale
    mean = tl.zeros([TILE], tl.float32)
    m2 = tl.zeros([TILE], tl.float32)
    m3 = tl.zeros([TILE], tl.float32)
    m4 = tl.zeros([TILE], tl.float32)
    low = tl.full([TILE], float("inf"), tl.float32)
    high = tl.full([TILE], float("-inf"), tl.float32)
    zeros = tl.zeros([TILE], tl.int32)
    bad = tl.zeros([TILE], tl.int32)

    unrolled = length // (TILE * UNROLL)
    k = (unrolled * 0).to(tl.float32)  # values a lane has seen
    for i in range(0, unrolled):
        for j in tl.static_range(UNROLL):
            x = tl.load(x_ptr + (i * UNROLL + j) * TILE + lane).to(tl.float32)
            zeros += (x == 0.0).to(tl.int32)
            bad += (tl.abs(x) < float("inf")).to(tl.int32)  # finite ones; turned round below
            low = tl.minimum(low, x)
            high = tl.maximum(high, x)
            k += 1.0
            mean, m2, m3, m4 = accumulate(x * scale - shift, k, mean, m2, m3, m4, ORDER)
    seen = unrolled * UNROLL
    bad = seen - bad

    for i in range(0, tl.cdiv(length - seen * TILE, TILE)):
        position = (seen + i) * TILE + lane
        live = position < length
        x = tl.load(x_ptr + position, mask=live, other=0.0).to(tl.float32)
        zeros += (live & (x == 0.0)).to(tl.int32)
        bad += (tl.abs(x) < float("inf")).to(tl.int32) ^ 1
        low = tl.minimum(low, tl.where(live, x, float("inf")))
        high = tl.maximum(high, tl.where(live, x, float("-inf")))
        k += 1.0
        mean, m2, m3, m4 = accumulate(tl.where(live, x * scale - shift, mean), k, mean, m2, m3, m4, ORDER)

    # Chan over lanes: lane l saw ceil((length - l) / TILE) values.
    count = ((length - lane + TILE - 1) // TILE).to(tl.float32)
    centre = tl.sum(mean * count, 0) / tl.sum(count, 0)
    d = mean - centre
    total2 = tl.sum(m2 + count * d * d, 0)
    total3 = total2
    total4 = total2
    if ORDER == 4:
        total3 = tl.sum(m3 + d * (3.0 * m2 + count * d * d), 0)
        total4 = tl.sum(m4 + d * (4.0 * m3 + d * (6.0 * m2 + count * d * d)), 0)
    return (
        tl.sum(zeros, 0),
        tl.sum(bad, 0),
        tl.min(low, 0),
        tl.max(high, 0),
        shift,
        centre,
        total2,
        total3,
        total4,
    )


@triton.jit(do_not_specialize=["begin", "chunks"])
def moments_chunks(
    table,  # (n,) int64 addresses
    numels,  # (n,) int64
    first,  # (n,) int64
    owner,  # (chunks,) int64
    partial,  # (8 | 10, chunks) fp32: zeros, nonfinite, min, max, exponent, shift, mean, m2[, m3, m4]
    begin,
    chunks,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Reduce one chunk a program."""
    c = begin + tl.program_id(0)
    t = tl.load(owner + c)
    start = (c - tl.load(first + t)) * CHUNK
    length = tl.minimum(tl.load(numels + t) - start, CHUNK).to(tl.int32)
    x_ptr = typed(tl.load(table + t), DTYPE, ALIGNED) + start

    zeros, bad, low, high, shift, mean, m2, m3, m4 = scan_chunk(x_ptr, length, 1.0, ORDER, TILE, UNROLL)
    absmax = tl.maximum(-low, high)
    exponent = 0
    # Within these bounds every sum below keeps fp32's relative precision: m4 needs absmax^4 * 2^16 < 2^127.
    if ORDER == 2:
        safe = (absmax > 2.0**-40) & (absmax < 2.0**50)
    else:
        safe = (absmax > 2.0**-24) & (absmax < 2.0**24)
    if (bad == 0) & (absmax > 0.0) & (safe == 0):
        exponent = exponent_of(absmax)
        _, _, _, _, shift, mean, m2, m3, m4 = scan_chunk(x_ptr, length, pow2(-exponent), ORDER, TILE, UNROLL)

    out = partial + c
    row = chunks.to(tl.int64)
    tl.store(out, zeros.to(tl.float32))
    tl.store(out + row, bad.to(tl.float32))
    tl.store(out + 2 * row, low)
    tl.store(out + 3 * row, high)
    tl.store(out + 4 * row, exponent)
    tl.store(out + 5 * row, shift)
    tl.store(out + 6 * row, mean)
    tl.store(out + 7 * row, m2)
    if ORDER == 4:
        tl.store(out + 8 * row, m3)
        tl.store(out + 9 * row, m4)


@triton.jit(do_not_specialize=["chunks", "n"])
def moments_merge(
    partial,  # (8 | 10, chunks) fp32
    numels,  # (n,) int64
    first,  # (n,) int64
    counts,  # (3, n) int64
    stats,  # (7 | 9, n) fp32
    chunks,
    n,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join one tensor's chunks a program, in fp64: the joint mean first, then sums about it."""
    t = tl.program_id(0).to(tl.int64)
    row = chunks.to(tl.int64)
    numel = tl.load(numels + t)
    own = tl.cdiv(numel, CHUNK)
    source = partial + tl.load(first + t)
    lane = tl.arange(0, BLOCK).to(tl.int64)

    zeros = tl.zeros([BLOCK], tl.int64)
    bad = tl.zeros([BLOCK], tl.int64)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, tl.cdiv(own, BLOCK)):
        c = i * BLOCK + lane
        live = c < own
        zeros += tl.load(source + c, mask=live, other=0.0).to(tl.int64)
        bad += tl.load(source + row + c, mask=live, other=0.0).to(tl.int64)
        low = tl.minimum(low, tl.load(source + 2 * row + c, mask=live, other=float("inf")))
        high = tl.maximum(high, tl.load(source + 3 * row + c, mask=live, other=float("-inf")))
        unit = pow2_double(tl.load(source + 4 * row + c, mask=live, other=0.0).to(tl.int32))
        count = tl.where(live, tl.minimum(numel - c * CHUNK, CHUNK), 0).to(tl.float64)
        part = tl.load(source + 5 * row + c, mask=live, other=0.0).to(tl.float64)
        part += tl.load(source + 6 * row + c, mask=live, other=0.0).to(tl.float64)
        total += count * unit * part
    mean = tl.sum(total, 0) / tl.maximum(numel, 1).to(tl.float64)

    sum2 = tl.zeros([BLOCK], tl.float64)
    sum3 = tl.zeros([BLOCK], tl.float64)
    sum4 = tl.zeros([BLOCK], tl.float64)
    for i in range(0, tl.cdiv(own, BLOCK)):
        c = i * BLOCK + lane
        live = c < own
        unit = pow2_double(tl.load(source + 4 * row + c, mask=live, other=0.0).to(tl.int32))
        count = tl.where(live, tl.minimum(numel - c * CHUNK, CHUNK), 0).to(tl.float64)
        part = tl.load(source + 5 * row + c, mask=live, other=0.0).to(tl.float64)
        part += tl.load(source + 6 * row + c, mask=live, other=0.0).to(tl.float64)
        d = tl.where(live, unit * part - mean, 0.0)
        m2 = unit * unit * tl.load(source + 7 * row + c, mask=live, other=0.0).to(tl.float64)
        sum2 += m2 + count * d * d
        if ORDER == 4:
            m3 = unit * unit * unit * tl.load(source + 8 * row + c, mask=live, other=0.0).to(tl.float64)
            m4 = (
                unit * unit * unit * unit * tl.load(source + 9 * row + c, mask=live, other=0.0).to(tl.float64)
            )
            sum3 += m3 + d * (3.0 * m2 + count * d * d)
            sum4 += m4 + d * (4.0 * m3 + d * (6.0 * m2 + count * d * d))

    nonfinite = tl.sum(bad, 0)
    m2 = tl.sum(sum2, 0)
    sumsq = m2 + numel.to(tl.float64) * mean * mean
    smallest = tl.min(low, 0)
    largest = tl.max(high, 0)
    absmax = tl.where(numel == 0, 0.0, tl.maximum(-smallest, largest))
    nan = tl.where(nonfinite > 0, float("nan"), 0.0)  # added to every statistic: 0 changes none of them
    columns = n.to(tl.int64)
    tl.store(counts + t, numel)
    tl.store(counts + columns + t, tl.sum(zeros, 0))
    tl.store(counts + 2 * columns + t, nonfinite)
    tl.store(stats + t, mean.to(tl.float32) + nan)
    tl.store(stats + columns + t, m2.to(tl.float32) + nan)
    tl.store(stats + 2 * columns + t, sumsq.to(tl.float32) + nan)
    tl.store(stats + 3 * columns + t, smallest + nan)
    tl.store(stats + 4 * columns + t, largest + nan)
    tl.store(stats + 5 * columns + t, absmax + nan)
    tl.store(stats + 6 * columns + t, tl.sqrt(sumsq).to(tl.float32) + nan)
    if ORDER == 4:
        tl.store(stats + 7 * columns + t, tl.sum(sum3, 0).to(tl.float32) + nan)
        tl.store(stats + 8 * columns + t, tl.sum(sum4, 0).to(tl.float32) + nan)


def launch(xs: list[Tensor], order: int) -> tuple[Tensor, Tensor]:
    """Return counts int64 (3, n) and stats fp32 (7 | 9, n) of dense tensors; `fastmon::moments` says what
    they mean.

    Each tensor's numel elements are read linearly from its first one. One launch a dtype (two where some
    tensors are not 16-byte aligned) and one to join.
    """
    n = len(xs)
    rows = 7 if order == 2 else 9
    device = xs[0].device if n else torch.device("cpu")
    counts = torch.empty((3, n), dtype=torch.int64, device=device)
    stats = torch.empty((rows, n), dtype=torch.float32, device=device)
    if n == 0:
        return counts, stats
    pointers = addresses(xs)
    cuts = chunking_at(pointers, numels_of(xs), dtypes_of(xs), CHUNK)
    table = resident(pointers, lambda: pointers, device)
    numel, first, owner = cuts.tables(device)
    partial = torch.empty((rows + 1, cuts.chunks), dtype=torch.float32, device=device)
    tile = THREAD * CHUNK_LAUNCH["num_warps"] * lanes(device) if order == 2 else TILE_4
    for group in cuts.groups:
        moments_chunks[(group.end - group.begin,)](
            table,
            numel,
            first,
            owner,
            partial,
            group.begin,
            cuts.chunks,
            DTYPE=TRITON_DTYPES[group.dtype],
            ALIGNED=group.aligned,
            ORDER=order,
            CHUNK=CHUNK,
            TILE=tile,
            UNROLL=UNROLL,
            **CHUNK_LAUNCH,
            **FUSION,
        )
    moments_merge[(n,)](
        partial,
        numel,
        first,
        counts,
        stats,
        cuts.chunks,
        n,
        ORDER=order,
        CHUNK=CHUNK,
        BLOCK=MERGE_BLOCK,
        **MERGE_LAUNCH,
        **FUSION,
    )
    return counts, stats
