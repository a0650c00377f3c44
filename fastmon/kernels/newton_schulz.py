"""Newton-Schulz steps as three products a step, batched over matrices of one shape, in the layout they come in.

    A  = X X^T          `symmetric`: only tiles on and below the diagonal, each written twice (mirrored)
    B  = b A + c A A    `symmetric` again (A A = A A^T), the axpy in its epilogue
    X' = a X + B X      `update`: the axpy in its epilogue; the last step writes into the results

ns3 has no second product: X' = a X + b A X. A tall matrix is worked on from its smaller side by exchanging the two
strides, never by a transposed copy. The Frobenius norm comes from the scaled fp32 reduction of `moments`, and the
division happens before the cast to the compute dtype. Accumulation is fp32; fp32 products use no tf32. One program
computes one tile in one order, so a batch equals a loop bit for bit and two calls agree.

Operations for 5 steps, m <= n: 15 m^2 n + 5 m^3, where plain products take 20 m^2 n + 10 m^3.
Sources: Keller Jordan's Muon (ns5); Polar Express, arXiv 2505.16932.
"""

# Kernels' parameters are Triton values, which have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moments, pointers
from .pointers import FUSION, INTERPRET, TRITON_DTYPES, addresses, resident, rounded, typed

ELEMENTS = 1 << 28  # of one batch at most: bounds the temporaries
NORMALISE_BLOCK = 2048
NORMALISE_LAUNCH = {"num_warps": 4, "num_stages": 1}

# Coefficients (a, b, c) a step, the last repeated; the norm's margin before the division.
SCHEDULES: dict[str, tuple[tuple[tuple[float, float, float], ...], float]] = {
    "ns5": (((3.4445, -4.7750, 2.0315),), 1.0),
    "ns3": (((1.5, -0.5, 0.0),), 1.0),
    "polar-express": (
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        1.02,
    ),
}


@dataclass(frozen=True)
class Tile:
    """A tile of the result (block x block), the depth of one product, and how to launch it."""

    block: int
    depth: int
    warps: int
    stages: int


LARGE_FROM = 512  # rows of the smaller side from which a large tile still fills a card

# (target, half precision, large). "sm" and "gfx" serve every card that has no row of its own.
TILES: dict[tuple[str, bool, bool], Tile] = {
    ("cpu", True, False): Tile(32, 32, 4, 1),
    ("cpu", True, True): Tile(32, 32, 4, 1),
    ("cpu", False, False): Tile(32, 32, 4, 1),
    ("cpu", False, True): Tile(32, 32, 4, 1),
    ("sm", True, False): Tile(64, 64, 4, 3),
    ("sm", True, True): Tile(128, 64, 8, 3),
    ("sm_89", True, True): Tile(128, 32, 8, 3),
    ("sm_120", True, True): Tile(128, 32, 8, 3),
    ("sm_90", True, True): Tile(128, 64, 8, 4),
    ("sm_100", True, True): Tile(128, 64, 8, 4),
    ("sm", False, False): Tile(32, 32, 4, 2),
    ("sm", False, True): Tile(64, 16, 4, 2),
    ("gfx", True, False): Tile(64, 64, 4, 2),
    ("gfx", True, True): Tile(128, 64, 8, 2),
    ("gfx", False, False): Tile(32, 32, 4, 2),
    ("gfx", False, True): Tile(64, 32, 4, 2),
}


def tile_for(target: str, dtype: torch.dtype, rows: int, columns: int) -> Tile:
    """Return the tile for a card, a compute dtype and a shape; it must not depend on the batch.

    Rows that do not start on 16 bytes are loaded element by element, which costs registers: a shallow small tile.
    """
    half, large = dtype != torch.float32, min(rows, columns) >= LARGE_FROM
    if target != "cpu" and (rows % 8 or columns % 8):
        return Tile(64, 32, 4, 2) if half else Tile(32, 16, 4, 2)
    family = "sm" if target.startswith("sm") else "gfx" if target.startswith("gfx") else "cpu"
    return TILES.get((target, half, large)) or TILES[family, half, large]


@triton.jit
def normalise(
    table,  # (batch,) int64 addresses of contiguous matrices
    norms,  # (batch,) fp32
    out,  # (batch, numel)
    numel,
    margin,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write x / (|x|_F margin) in the compute dtype; a zero matrix stays zero, NaN or Inf makes it NaN."""
    b = tl.program_id(1).to(tl.int64)
    norm = tl.load(norms + b) * margin
    norm = tl.where(norm == 0.0, 1.0, norm)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offset < numel
    x = tl.load(typed(tl.load(table + b), DTYPE, ALIGNED) + offset, mask=live, other=0.0).to(tl.float32)
    tl.store(out + b * numel + offset, rounded(x / norm, OUT_DTYPE, INTERPRETED), mask=live)


@triton.jit
def product(a, b, acc, INTERPRETED: tl.constexpr):
    """Return acc + a b in fp32; the interpreter's bf16 products are wrong, so there the operands are widened."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def symmetric(
    x,  # (batch, m, k) by strides
    add,  # (batch, m, m) symmetric, or anything where ADD is off
    out,  # (batch, m, m)
    m,
    k,
    stride_b,
    stride_m,
    stride_k,
    alpha,
    beta,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return alpha X X^T + beta add: program t computes tile (i, j), i >= j, and writes it and its mirror image."""
    t = tl.program_id(0)
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root may be off by one either way
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    j = t - i * (i + 1) // 2
    b = tl.program_id(1).to(tl.int64)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    # Indices beyond m wrap round: what they load is computed and not stored, and no load needs a mask.
    left = x + b * stride_b + (rows % m).to(tl.int64)[:, None] * stride_m + depth[None, :] * stride_k
    right = x + b * stride_b + (columns % m).to(tl.int64)[None, :] * stride_m + depth[:, None] * stride_k
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, k, DEPTH):
        if EVEN:
            p = tl.load(left)
            q = tl.load(right)
        else:
            p = tl.load(left, mask=(depth < k - start)[None, :], other=0.0)
            q = tl.load(right, mask=(depth < k - start)[:, None], other=0.0)
        acc = product(p, q, acc, INTERPRETED)
        left += DEPTH * stride_k
        right += DEPTH * stride_k
    acc *= alpha
    square = b * m * m
    live = (rows < m)[:, None] & (columns < m)[None, :]
    here = square + rows.to(tl.int64)[:, None] * m + columns[None, :]
    if ADD:
        acc += beta * tl.load(add + here, mask=live, other=0.0).to(tl.float32)
    result = rounded(acc, out.dtype.element_ty, INTERPRETED)
    tl.store(out + here, result, mask=live)
    if i != j:
        mirror = square + columns.to(tl.int64)[:, None] * m + rows[None, :]
        tl.store(out + mirror, tl.trans(result), mask=(columns < m)[:, None] & (rows < m)[None, :])


@triton.jit
def update(
    x,  # (batch, m, n) by strides
    square,  # (batch, m, m)
    out,  # like x; or (batch,) int64 addresses of results with x's strides inside a matrix
    m,
    n,
    stride_b,
    stride_m,
    stride_n,
    alpha,
    beta,
    TABLE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write alpha X + beta S X: one tile a program, neighbours in groups of 8 rows so that S and X stay in cache."""
    t = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    tiles_m = tl.cdiv(m, BLOCK)
    tiles_n = tl.cdiv(n, BLOCK)
    group = t // (8 * tiles_n)
    tall = tl.minimum(tiles_m - group * 8, 8)
    i = group * 8 + (t % (8 * tiles_n)) % tall
    j = (t % (8 * tiles_n)) // tall
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    left = square + b * m * m + (rows % m).to(tl.int64)[:, None] * m + depth[None, :]
    base = x + b * stride_b
    right = base + depth.to(tl.int64)[:, None] * stride_m + (columns % n).to(tl.int64)[None, :] * stride_n
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, m, DEPTH):
        if EVEN:
            p = tl.load(left)
            q = tl.load(right)
        else:
            p = tl.load(left, mask=(depth < m - start)[None, :], other=0.0)
            q = tl.load(right, mask=(depth < m - start)[:, None], other=0.0)
        acc = product(p, q, acc, INTERPRETED)
        left += DEPTH
        right += DEPTH * stride_m
    here = rows.to(tl.int64)[:, None] * stride_m + columns.to(tl.int64)[None, :] * stride_n
    live = (rows < m)[:, None] & (columns < n)[None, :]
    acc = beta * acc + alpha * tl.load(base + here, mask=live, other=0.0).to(tl.float32)
    target = out + b * stride_b
    if TABLE:
        target = typed(tl.load(out + b), OUT_DTYPE, ALIGNED)
    tl.store(target + here, rounded(acc, OUT_DTYPE, INTERPRETED), mask=live)


def launch(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> list[Tensor]:
    """Return the approximate polar factors of (..., m, n) tensors, contiguous; `fastmon::newton_schulz` says more.

    compute_dtype: bf16, fp16 or fp32. Matrices of one shape and dtype are one batch: two launches for their norms
    (shared by all batches of a call), one to normalise, three a step (two for ns3). Non-contiguous inputs are
    copied once. No host sync.
    """
    return run(xs, method, steps, compute_dtype, out_dtype)[0]


def run(
    xs: list[Tensor],
    method: str,
    steps: int,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    probe: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Return the factors; and with `probe` also |X|_F and the largest singular value, (2, count) fp32.

    probe: the largest eigenvalues (batch,) of a batch of Gram matrices, which it must not write. It sees the first
    one of every batch, X X^T / (margin |X|_F)^2 as the compute dtype rounded it, between two launches: the factors
    are bit for bit those without it.
    """
    outs = [torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device) for x in xs]
    counts = [x.shape[:-2].numel() for x in xs]
    found = None
    if probe is not None:
        device = xs[0].device if sum(counts) else None
        found = torch.zeros((2, sum(counts)), dtype=torch.float32, device=device)
    slots: list[int] = []  # column of every pair in `found`
    pairs: list[tuple[Tensor, Tensor]] = []  # (contiguous matrix, its result)
    end = 0
    for x, out, count in zip(xs, outs, counts, strict=True):
        end += count
        if x.numel() == 0:
            continue
        slots.extend(range(end - count, end))
        x = x.contiguous()
        if x.ndim == 2:
            pairs.append((x, out))
        else:
            pairs.extend(zip(x.flatten(0, -3).unbind(), out.flatten(0, -3).unbind(), strict=True))
    if not pairs:
        return outs, found
    norms = moments.launch([x for x, _ in pairs], 2)[1][6]
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, (x, out) in enumerate(pairs):
        groups.setdefault((tuple(x.shape), x.dtype, out.dtype), []).append(position)
    for members in groups.values():
        size = max(1, min(ELEMENTS // pairs[members[0]][0].numel(), 65535))  # 65535: a grid's second axis
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            index = tuple(batch)
            picked = norms
            if len(index) < len(pairs):
                picked = norms[resident(index, partial(tuple, index), norms.device)]
            top = solve([pairs[i] for i in batch], picked, method, steps, compute_dtype, probe)
            if found is not None and top is not None:
                columns = tuple(slots[i] for i in batch)
                where = resident(columns, partial(tuple, columns), norms.device)
                sigma = picked * SCHEDULES[method][1] * top.float().sqrt()
                found.index_copy_(1, where, torch.stack([picked, sigma]))
    return outs, found


def solve(
    pairs: list[
        tuple[Tensor, Tensor]
    ],  # contiguous (rows, columns) of one shape and dtype, and their results
    norms: Tensor,  # (batch,) fp32
    method: str,
    steps: int,
    compute_dtype: torch.dtype,
    probe: Callable[[Tensor], Tensor] | None,
) -> Tensor | None:
    """Run one batch; return what `probe` says of its first Gram matrices."""
    x, out = pairs[0]
    device, batch = x.device, len(pairs)
    rows, columns = x.shape
    numel = rows * columns
    m, n = min(rows, columns), max(rows, columns)
    stride_m, stride_n = (columns, 1) if rows <= columns else (1, columns)
    sources, targets = addresses([x for x, _ in pairs]), addresses([out for _, out in pairs])
    kind, margin = TRITON_DTYPES[compute_dtype], SCHEDULES[method][1]
    now = torch.empty((batch, rows, columns), dtype=compute_dtype, device=device)
    normalise[(triton.cdiv(numel, NORMALISE_BLOCK), batch)](
        resident(sources, lambda: sources, device),
        norms,
        now,
        numel,
        margin,
        DTYPE=TRITON_DTYPES[x.dtype],
        OUT_DTYPE=kind,
        ALIGNED=all(p % 16 == 0 for p in sources),
        BLOCK=NORMALISE_BLOCK,
        INTERPRETED=INTERPRET,
        **NORMALISE_LAUNCH,
        **FUSION,
    )
    gram, poly = (torch.empty((batch, m, m), dtype=compute_dtype, device=device) for _ in range(2))
    after = torch.empty_like(now)
    tile = tile_for(pointers.arch(device), compute_dtype, rows, columns)
    shared = {
        "BLOCK": tile.block,
        "DEPTH": tile.depth,
        "INTERPRETED": INTERPRET,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **FUSION,
    }
    across = triton.cdiv(m, tile.block)
    triangle, rectangle = (across * (across + 1) // 2, batch), (across * triton.cdiv(n, tile.block), batch)
    even_m, even_n = m % tile.depth == 0, n % tile.depth == 0
    known, top = SCHEDULES[method][0], None
    for step in range(steps):
        a, b, c = known[min(step, len(known) - 1)]
        symmetric[triangle](
            now, now, gram, m, n, numel, stride_m, stride_n, 1.0, 0.0, ADD=False, EVEN=even_n, **shared
        )
        if probe is not None and step == 0:
            top = probe(gram)
        factor, beta = gram, b
        if c != 0.0:
            symmetric[triangle](gram, gram, poly, m, m, m * m, m, 1, c, b, ADD=True, EVEN=even_m, **shared)
            factor, beta = poly, 1.0
        last = step == steps - 1
        update[rectangle](
            now,
            factor,
            resident(targets, lambda: targets, device) if last else after,
            m,
            n,
            numel,
            stride_m,
            stride_n,
            a,
            beta,
            TABLE=last,
            OUT_DTYPE=TRITON_DTYPES[out.dtype] if last else kind,
            ALIGNED=last and all(p % 16 == 0 for p in targets),
            EVEN=even_m,
            **shared,
        )
        now, after = after, now
    return top
