"""Cold largest singular values: symmetric Lanczos on W^T W for a ragged list at once, without a host sync.

The mat-vec is `gram`'s, one read of every W an iteration. Vectors of all matrices form one zero-padded batch, which
torch reorthogonalises twice (sums of products, not a matrix product that might round to tf32). The tridiagonal's
top eigenpair comes from one kernel: 128 Sturm counts at a time narrow the eigenvalue to fp64 precision in ten
rounds, and a twisted factorisation at that value gives the vector (Fernando, Parlett, Dhillon 1997).
"""

# Kernels' parameters are Triton values, which have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gram import Gram, floats, row_major
from .pointers import FUSION, exponent_of, pow2

LANES = 128  # Sturm counts at a time: log2(129) bits a round
ROUNDS = 10
BLOCK = 1024
LAUNCH = {"num_warps": 4, "num_stages": 1}


@triton.jit(do_not_specialize=["count", "width"])
def unpack(meta, state, vectors, exponents, count, width, BLOCK: tl.constexpr):
    """Copy the state's vectors into rows of (count, width), zero-padded, and its exponents into (count,)."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(meta + count + i)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(state + tl.load(meta + 3 * count + i) + column, mask=column < n, other=0.0)
    tl.store(vectors + i * width + column, v, mask=column < width)
    tl.store(exponents + i, tl.load(state + tl.load(meta + 4 * count + i)))


@triton.jit(do_not_specialize=["count", "width"])
def pack(
    meta,
    ritz,  # (count, width) fp32
    value,  # (count,) fp32: sigma'^2
    slip,  # (count,) fp32: residual' sigma'
    fro2,  # (count,) fp32: |W'|_F^2
    exponents,  # (count,) fp32
    state,
    sigma_out,
    residual_out,
    fro_out,
    count,
    width,
    BLOCK: tl.constexpr,
):
    """Write results and, where they are sound, the normalised Ritz vector and the exponent; one matrix a program."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.load(meta + count + i)
    e = tl.load(exponents + i).to(tl.int32)
    sigma = tl.sqrt(tl.maximum(tl.load(value + i), 0.0))
    square = tl.load(fro2 + i)
    lane = tl.arange(0, BLOCK)
    lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        x = tl.load(ritz + i * width + start + lane, mask=start + lane < n, other=0.0)
        lanes += x * x
    norm = tl.sqrt(tl.sum(lanes, 0))
    inf = float("inf")
    known = (square < inf) & (square == square)
    good = known & (sigma > 0.0) & (sigma < inf) & (norm > 0.0) & (norm < inf)
    nothing = tl.where(known, 0.0, float("nan"))
    unit = pow2(e)
    tl.store(sigma_out + i, tl.where(good, sigma * unit, nothing))
    # A start that missed W says nothing but sigma_1 <= |W|_F.
    blind = tl.where(known, 1.4142135623730951 * tl.sqrt(square), float("nan"))
    tl.store(residual_out + i, tl.where(good, tl.load(slip + i) / sigma, blind) * unit)
    tl.store(fro_out + i, tl.where(known, tl.sqrt(square) * unit, float("nan")))
    if good:
        v_ptr = state + tl.load(meta + 3 * count + i)
        for start in range(0, n, BLOCK):
            inside = start + lane < n
            x = tl.load(ritz + i * width + start + lane, mask=inside, other=0.0)
            tl.store(v_ptr + start + lane, x / norm, mask=inside)
        moved = tl.minimum(tl.maximum(e + exponent_of(tl.sqrt(square)), -126), 126)
        tl.store(state + tl.load(meta + 4 * count + i), moved.to(tl.float32))


@triton.jit
def nonzero(d, tiny):
    """Replace a vanishing pivot by a tiny one of its sign."""
    return tl.where(tl.abs(d) < tiny, tl.where(d < 0.0, -tiny, tiny), d)


@triton.jit(do_not_specialize=["steps"])
def top_eigenpair(
    alpha,  # (count, steps) fp32: diagonal, >= 0 up to rounding
    beta,  # (count, steps) fp32: beta[:, j] couples j and j + 1; the last one couples to nothing here
    value,  # (count,) fp32
    vector,  # (count, steps) fp32, unit
    steps,
    SIZE: tl.constexpr,  # a power of two, at least steps
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Find the largest eigenvalue and its vector of one symmetric tridiagonal matrix a program, in fp64."""
    i = tl.program_id(0).to(tl.int64)
    a_ptr = alpha + i * steps
    b_ptr = beta + i * steps
    index = tl.arange(0, SIZE)
    a = tl.load(a_ptr + index, mask=index < steps, other=0.0).to(tl.float64)
    b = tl.load(b_ptr + index, mask=index < steps - 1, other=0.0).to(tl.float64)
    b_before = tl.load(b_ptr + index - 1, mask=(index > 0) & (index < steps), other=0.0).to(tl.float64)
    high = tl.max(tl.abs(a) + tl.abs(b) + tl.abs(b_before), 0) * (1.0 + 1e-6)  # Gershgorin
    low = high * 0.0
    tiny = high * 1e-30 + 1e-290
    lane = tl.arange(0, LANES)
    # Sturm: as many pivots of T - x are negative as eigenvalues lie below x; all of them, and x is above the top.
    for _ in range(0, ROUNDS):
        x = low + (high - low) * ((lane + 1).to(tl.float64) / (LANES + 1))
        pivot = nonzero(tl.load(a_ptr).to(tl.float64) - x, tiny)
        negative = (pivot < 0.0).to(tl.int32)
        for j in range(1, steps):
            coupling = tl.load(b_ptr + j - 1).to(tl.float64)
            pivot = nonzero(tl.load(a_ptr + j).to(tl.float64) - x - coupling * coupling / pivot, tiny)
            negative += (pivot < 0.0).to(tl.int32)
        above = negative == steps
        new_high = tl.min(tl.where(above, x, high), 0)
        low = tl.max(tl.where(above, low, x), 0)
        high = new_high
    top = (low + high) * 0.5

    # Pivots from the top and from the bottom; the vector is anchored where the two meet best.
    down = tl.zeros([SIZE], tl.float64)
    pivot = nonzero(tl.load(a_ptr).to(tl.float64) - top, tiny)
    down = tl.where(index == 0, pivot, down)
    for j in range(1, steps):
        coupling = tl.load(b_ptr + j - 1).to(tl.float64)
        pivot = nonzero(tl.load(a_ptr + j).to(tl.float64) - top - coupling * coupling / pivot, tiny)
        down = tl.where(index == j, pivot, down)
    up = tl.zeros([SIZE], tl.float64)
    pivot = nonzero(tl.load(a_ptr + steps - 1).to(tl.float64) - top, tiny)
    up = tl.where(index == steps - 1, pivot, up)
    for back in range(1, steps):
        j = steps - 1 - back
        coupling = tl.load(b_ptr + j).to(tl.float64)
        pivot = nonzero(tl.load(a_ptr + j).to(tl.float64) - top - coupling * coupling / pivot, tiny)
        up = tl.where(index == j, pivot, up)
    gap = tl.where(index < steps, tl.abs(down + up - (a - top)), float("inf"))
    anchor = tl.min(tl.where(gap == tl.min(gap, 0), index, SIZE), 0)
    q = tl.where(index == anchor, 1.0, 0.0).to(tl.float64)
    last = top * 0.0 + 1.0
    for back in range(1, steps):
        j = steps - 1 - back
        d = tl.sum(tl.where(index == j, down, 0.0), 0)
        last = tl.where(j < anchor, -tl.load(b_ptr + j).to(tl.float64) / nonzero(d, tiny) * last, 1.0)
        q = tl.where((index == j) & (j < anchor), last, q)
    last = top * 0.0 + 1.0
    for j in range(1, steps):
        d = tl.sum(tl.where(index == j, up, 0.0), 0)
        last = tl.where(j > anchor, -tl.load(b_ptr + j - 1).to(tl.float64) / nonzero(d, tiny) * last, 1.0)
        q = tl.where((index == j) & (j > anchor), last, q)
    finite = tl.sum(a, 0) + tl.sum(b, 0)
    nan = finite - finite  # 0, or NaN where the matrix is not finite
    tl.store(value + i, (top + nan).to(tl.float32))
    tl.store(
        vector + i * steps + index, (q / tl.sqrt(tl.sum(q * q, 0)) + nan).to(tl.float32), mask=index < steps
    )


def lanczos(ws: list[Tensor], state: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sigma, residual, fro (count,) fp32; the state (one vector a matrix) ends on the top Ritz vectors.

    Reads every W `iters` times; about 20 small launches an iteration whatever the number of matrices.
    """
    if not ws:
        return floats(0), floats(0), floats(0)
    ws = row_major(ws)
    gram = Gram(ws, state=False)
    packed = Gram(ws, state=True)
    device, count, width = state.device, len(ws), gram.layout.width
    basis = torch.zeros((iters + 1, count, width), dtype=torch.float32, device=device)
    exponents = torch.empty(count, dtype=torch.float32, device=device)
    blocks = max(1, triton.cdiv(width, BLOCK))
    unpack[(count, blocks)](
        packed.meta, state, basis[0], exponents, count, width, BLOCK=BLOCK, **LAUNCH, **FUSION
    )
    alpha = torch.zeros((count, iters), dtype=torch.float32, device=device)
    beta = torch.zeros((count, iters), dtype=torch.float32, device=device)
    totals = torch.empty((3, count), dtype=torch.float32, device=device)
    columns = gram.meta[count : 2 * count]
    z = torch.empty((count, width), dtype=torch.float32, device=device)
    for k in range(iters):
        gram.partials(basis[k], exponents)
        gram.total(z, totals, flat=False)
        alpha[:, k] = (z * basis[k]).sum(-1)
        rest = z
        for _ in range(2):
            along = (basis[: k + 1] * rest).sum(-1, keepdim=True)
            rest = rest - (basis[: k + 1] * along).sum(0)
        length = rest.square().sum(-1).sqrt()
        # A vanishing rest means that the Krylov space is exhausted: so it is, at the latest, after n vectors.
        going = (length > 1e-6 * alpha[:, : k + 1].amax(1)) & (columns > k + 1)
        length = torch.where(going | ~torch.isfinite(length), length, 0.0)
        beta[:, k] = length
        basis[k + 1] = torch.where(going[:, None], rest / length[:, None], 0.0)
    value = torch.empty(count, dtype=torch.float32, device=device)
    vector = torch.empty((count, iters), dtype=torch.float32, device=device)
    top_eigenpair[(count,)](
        alpha,
        beta,
        value,
        vector,
        iters,
        SIZE=max(2, triton.next_power_of_2(iters)),
        LANES=LANES,
        ROUNDS=ROUNDS,
        **LAUNCH,
        **FUSION,
    )
    ritz = (basis[:iters] * vector.T[:, :, None]).sum(0)
    slip = 2**0.5 * beta[:, -1] * vector[:, -1].abs()
    sigma, residual, fro = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(3))
    pack[(count,)](
        packed.meta,
        ritz,
        value,
        slip,
        totals[1],
        exponents,
        state,
        sigma,
        residual,
        fro,
        count,
        width,
        BLOCK=BLOCK,
        **LAUNCH,
        **FUSION,
    )
    return sigma, residual, fro
