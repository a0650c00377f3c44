"""z = W^T (W v) for a ragged list of matrices, every W read once.

W^T (W v) is linear in blocks of rows: with a block on chip, y = W_blk v and then z += W_blk^T y. A program owns a
run of rows of one matrix and leaves one partial z, |y|^2, |W_blk|_F^2 and absmax; the number of rows follows from
the width alone (about 256 KiB of W), so results do not depend on the list or the card. Partials are summed in
order by the kernels that use them: no atomics, two calls agree bit for bit.

Up to 4096 columns a block of rows stays in registers between its two uses; wider rows are swept twice, 8 at a
time, the second time from the cache. Everything is computed on W 2^-e, with e kept beside the vector.
"""

# Kernels' parameters are Triton values, which have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pointers import FUSION, TRITON_DTYPES, addresses, pow2, resident, typed

HEADER = 16  # floats before a vector in the state; the first is the exponent
BYTES = 262_144  # of W a program
# Columns up to which a variant serves, rows and columns of one step, warps. The last one sweeps its rows twice.
WIDTHS = ((1024, 8, 1024, 4), (4096, 2, 4096, 8), (1 << 62, 8, 512, 8))
UNALIGNED_STEP = 2  # rows of one step where loads are element by element and their addresses fill registers
SUM_BLOCK = 512
SUM_LAUNCH = {"num_warps": 4, "num_stages": 1}

# Rows of the table that describes the matrices, (10, count) int64.
ROWS, COLUMNS, STRIDE, VECTOR, EXPONENT, SHARE, FIRST, PROGRAMS, PARTIAL, FLAT = range(10)


class Layout:
    """Where the parts of a list of matrices lie: vectors, exponents, programs and partials.

    state: vectors lie as in the spectral state (16 floats of header, n floats padded to a multiple of 16); else
    matrix i's vector is row i of a (count, width) buffer and its exponent element i of another.
    """

    def __init__(
        self,
        shapes: tuple[tuple[int, int, int], ...],  # rows, columns, row stride
        kinds: tuple[tuple[torch.dtype, bool], ...],
        state: bool,
    ) -> None:
        count = len(shapes)
        padded = [-(-n // 16) * 16 for _, n, _ in shapes]
        self.count, self.width = count, max(padded, default=0)
        self.flat = sum(padded)
        table = [[0] * count for _ in range(10)]
        owner: list[int] = []
        self.groups: list[tuple[torch.dtype, bool, int, int, int]] = []  # dtype, aligned, variant, begin, end
        variants = [next(i for i, limit in enumerate(WIDTHS) if n <= limit[0]) for _, n, _ in shapes]
        self.partials = at = flat = 0
        for i, (m, n, stride) in enumerate(shapes):
            step = WIDTHS[variants[i]][1] if kinds[i][1] else UNALIGNED_STEP
            share = max(1, BYTES // max(1, n * kinds[i][0].itemsize * step)) * step
            programs = -(-m // share) if n else 0
            vector, exponent = (at + HEADER, at) if state else (i * self.width, i)
            column = (m, n, stride, vector, exponent, share, 0, programs, self.partials, flat)
            for row, value in zip(table, column, strict=True):
                row[i] = value
            at += HEADER + padded[i]
            flat += padded[i]
            self.partials += programs * padded[i]
        for kind in dict.fromkeys(zip(kinds, variants, strict=True)):
            begin = len(owner)
            for i in range(count):
                if (kinds[i], variants[i]) == kind:
                    table[FIRST][i] = len(owner)
                    owner.extend([i] * table[PROGRAMS][i])
            if len(owner) > begin:
                self.groups.append((*kind[0], kind[1], begin, len(owner)))
        self.programs = len(owner)
        fill = [0] * (10 * count % 2)
        self._words = [word for row in table for word in row] + fill + owner

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the description (10 * count,) and the owner of every program (programs,), int64 on the device."""
        words = resident(self, lambda: self._words, device)
        return words, words[len(self._words) - self.programs :]


@lru_cache(maxsize=64)
def layout(
    shapes: tuple[tuple[int, int, int], ...], kinds: tuple[tuple[torch.dtype, bool], ...], state: bool
) -> Layout:
    """Return the one `Layout` of these matrices."""
    return Layout(shapes, kinds, state)


def row_major(ws: Sequence[Tensor]) -> list[Tensor]:
    """Return the matrices with contiguous rows; a column-major or expanded one is copied."""
    return [w if w.stride(1) == 1 and w.stride(0) >= w.shape[1] else w.contiguous() for w in ws]


def floats(*shape: int) -> Tensor:
    """Return an empty fp32 tensor for an empty list, whatever torch's default dtype is."""
    return torch.empty(shape, dtype=torch.float32)


def layout_of(ws: Sequence[Tensor], *, state: bool) -> Layout:
    """Return the `Layout` of row-major matrices."""
    shapes = tuple((w.shape[0], w.shape[1], w.stride(0)) for w in ws)
    kinds = []
    for w, (_, n, stride) in zip(ws, shapes, strict=True):
        vector = 16 // w.itemsize  # elements of a 16-byte load
        kinds.append((w.dtype, w.data_ptr() % 16 == 0 and stride % vector == 0 and n % vector == 0))
    return layout(shapes, tuple(kinds), state)


@triton.jit(do_not_specialize=["begin", "count", "programs"])
def gram_narrow(
    table,  # (count,) int64 addresses
    meta,  # (10, count) int64
    owner,  # (programs,) int64
    vectors,  # fp32
    exponents,  # fp32
    partial,  # fp32
    sums,  # (3, programs) fp32: |y|^2, |W'|_F^2, absmax of W
    begin,
    count,
    programs,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program's rows, STEP at a time, at most WIDTH columns: each block stays in registers."""
    p = begin + tl.program_id(0)
    i = tl.load(owner + p)
    m = tl.load(meta + i)
    n = tl.load(meta + count + i)
    stride = tl.load(meta + 2 * count + i)
    if ALIGNED:
        n = tl.multiple_of(n, 128 // DTYPE.primitive_bitwidth)
        stride = tl.multiple_of(stride, 128 // DTYPE.primitive_bitwidth)
    v_ptr = vectors + tl.multiple_of(tl.load(meta + 3 * count + i), 16)
    scale = pow2(-tl.load(exponents + tl.load(meta + 4 * count + i)).to(tl.int32))
    share = tl.load(meta + 5 * count + i)
    local = p - tl.load(meta + 6 * count + i)
    w = typed(tl.load(table + i), DTYPE, ALIGNED)
    column = tl.arange(0, WIDTH)
    inside = column < n
    v = tl.load(v_ptr + column, mask=inside, other=0.0)
    z = tl.zeros([WIDTH], tl.float32)
    square = tl.zeros([WIDTH], tl.float32)
    high = tl.zeros([WIDTH], tl.float32)
    length = tl.zeros([STEP], tl.float32)
    for r in range(local * share, tl.minimum(local * share + share, m), STEP):
        row = r + tl.arange(0, STEP)
        x = tl.load(
            w + row[:, None] * stride + column[None, :], mask=(row < m)[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        high = tl.maximum(high, tl.max(tl.abs(x), 0))
        x *= scale
        y = tl.sum(x * v[None, :], 1)
        square += tl.sum(x * x, 0)
        z += tl.sum(x * y[:, None], 0)
        length += y * y
    padded = (n + 15) // 16 * 16
    out = partial + tl.multiple_of(tl.load(meta + 8 * count + i) + local * padded, 16)
    tl.store(out + column, z, mask=column < padded)
    tl.store(sums + p, tl.sum(length, 0))
    tl.store(sums + programs + p, tl.sum(square, 0))
    tl.store(sums + 2 * programs + p, tl.max(high, 0))


@triton.jit(do_not_specialize=["begin", "count", "programs"])
def gram_wide(
    table,
    meta,
    owner,
    vectors,
    exponents,
    partial,
    sums,
    begin,
    count,
    programs,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The same for any number of columns, WIDTH at a time: STEP rows are swept for y and again for z."""
    p = begin + tl.program_id(0)
    i = tl.load(owner + p)
    m = tl.load(meta + i)
    n = tl.load(meta + count + i)
    stride = tl.load(meta + 2 * count + i)
    if ALIGNED:
        n = tl.multiple_of(n, 128 // DTYPE.primitive_bitwidth)
        stride = tl.multiple_of(stride, 128 // DTYPE.primitive_bitwidth)
    v_ptr = vectors + tl.multiple_of(tl.load(meta + 3 * count + i), 16)
    scale = pow2(-tl.load(exponents + tl.load(meta + 4 * count + i)).to(tl.int32))
    share = tl.load(meta + 5 * count + i)
    local = p - tl.load(meta + 6 * count + i)
    w = typed(tl.load(table + i), DTYPE, ALIGNED)
    padded = (n + 15) // 16 * 16
    out = partial + tl.multiple_of(tl.load(meta + 8 * count + i) + local * padded, 16)
    lane = tl.arange(0, WIDTH)
    full = n // WIDTH * WIDTH
    high = tl.zeros([STEP, WIDTH], tl.float32)
    square = tl.zeros([STEP, WIDTH], tl.float32)
    length = tl.zeros([STEP], tl.float32)
    for r in range(local * share, tl.minimum(local * share + share, m), STEP):
        row = r + tl.arange(0, STEP)
        live = row < m
        # Rows beyond the last one repeat it unmasked; their y is 0, and `square` leaves them out below.
        line = w + tl.minimum(row, m - 1)[:, None] * stride
        weight = tl.where(live, scale, 0.0)[:, None]
        y_lanes = tl.zeros([STEP, WIDTH], tl.float32)
        for c in range(0, full, WIDTH):
            x = tl.load(line + (c + lane)[None, :]).to(tl.float32)
            high = tl.maximum(high, tl.abs(x))
            x *= weight
            y_lanes += x * tl.load(v_ptr + c + lane)[None, :]
            square += x * x
        if full < n:
            inside = full + lane < n
            x = tl.load(line + (full + lane)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            high = tl.maximum(high, tl.abs(x))
            x *= weight
            y_lanes += x * tl.load(v_ptr + full + lane, mask=inside, other=0.0)[None, :]
            square += x * x
        y = tl.sum(y_lanes, 1)
        length += y * y
        again = lane * 0 + r > local * share
        for c in range(0, full, WIDTH):
            x = tl.load(line + (c + lane)[None, :]).to(tl.float32) * weight
            target = out + c + lane  # one pointer tensor, so that a thread adds to what it wrote itself
            before = tl.load(target, mask=again, other=0.0)
            tl.store(target, before + tl.sum(x * y[:, None], 0))
        if full < n:
            inside = full + lane < n
            x = (
                tl.load(line + (full + lane)[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
                * weight
            )
            kept = full + lane < padded
            target = out + full + lane
            before = tl.load(target, mask=kept & again, other=0.0)
            tl.store(target, before + tl.sum(x * y[:, None], 0), mask=kept)
    tl.store(sums + p, tl.sum(length, 0))
    tl.store(sums + programs + p, tl.sum(tl.sum(square, 1), 0))
    tl.store(sums + 2 * programs + p, tl.max(tl.max(high, 1), 0))


@triton.jit(do_not_specialize=["count", "programs", "width"])
def gram_sum(
    meta,  # (10, count) int64
    partial,  # fp32
    sums,  # (3, programs) fp32
    z,  # fp32, matrix i's at meta[FLAT] or i * width
    totals,  # (3, count) fp32: |y|^2, |W'|_F^2, absmax
    count,
    programs,
    width,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up one matrix's partials, BLOCK columns a program, in the order of the rows."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(meta + count + i)
    padded = (n + 15) // 16 * 16
    first = tl.load(meta + 6 * count + i)
    own = tl.load(meta + 7 * count + i)
    source = partial + tl.load(meta + 8 * count + i)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(0, own):
        total += tl.load(source + p * padded + column, mask=column < padded, other=0.0)
    if FLAT:
        tl.store(z + tl.load(meta + 9 * count + i) + column, total, mask=column < padded)
    else:
        tl.store(z + i * width + column, total, mask=column < width)
    if tl.program_id(1) == 0:
        lane = tl.arange(0, BLOCK)
        length = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        high = tl.zeros([BLOCK], tl.float32)
        for start in range(0, own, BLOCK):
            live = start + lane < own
            length += tl.load(sums + first + start + lane, mask=live, other=0.0)
            square += tl.load(sums + programs + first + start + lane, mask=live, other=0.0)
            high = tl.maximum(high, tl.load(sums + 2 * programs + first + start + lane, mask=live, other=0.0))
        tl.store(totals + i, tl.sum(length, 0))
        tl.store(totals + count + i, tl.sum(square, 0))
        tl.store(totals + 2 * count + i, tl.max(high, 0))


class Gram:
    """One list of matrices, ready to be multiplied repeatedly: tables and buffers are made once."""

    def __init__(self, ws: Sequence[Tensor], *, state: bool) -> None:
        self.layout = layout_of(ws, state=state)
        self.device = ws[0].device
        pointers = addresses(ws)
        self.table = resident(pointers, lambda: pointers, self.device)
        self.meta, self.owner = self.layout.tables(self.device)
        self.partial = torch.empty(self.layout.partials, dtype=torch.float32, device=self.device)
        self.sums = torch.empty((3, self.layout.programs), dtype=torch.float32, device=self.device)

    def partials(self, vectors: Tensor, exponents: Tensor) -> None:
        """Read every W once and fill `partial` and `sums`; one launch for a dtype, alignment and width class."""
        for dtype, aligned, variant, begin, end in self.layout.groups:
            _, step, width, warps = WIDTHS[variant]
            kernel = gram_wide if variant == len(WIDTHS) - 1 else gram_narrow
            kernel[(end - begin,)](
                self.table,
                self.meta,
                self.owner,
                vectors,
                exponents,
                self.partial,
                self.sums,
                begin,
                self.layout.count,
                self.layout.programs,
                DTYPE=TRITON_DTYPES[dtype],
                ALIGNED=aligned,
                STEP=step if aligned else UNALIGNED_STEP,
                WIDTH=width,
                num_warps=warps,
                num_stages=1,
                **FUSION,
            )

    def total(self, z: Tensor, totals: Tensor, *, flat: bool) -> None:
        """Sum the partials into z (flat, or (count, width)) and totals (3, count)."""
        blocks = max(1, triton.cdiv(self.layout.width, SUM_BLOCK))
        gram_sum[(self.layout.count, blocks)](
            self.meta,
            self.partial,
            self.sums,
            z,
            totals,
            self.layout.count,
            self.layout.programs,
            self.layout.width,
            FLAT=flat,
            BLOCK=SUM_BLOCK,
            **SUM_LAUNCH,
            **FUSION,
        )
