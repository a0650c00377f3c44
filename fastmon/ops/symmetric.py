"""Newton-Schulz iterations as batched matrix products, exactly symmetric ones at 10/16 of the work.

What      `dense` iterates X' = a X + (b A + c A^2) X with A = X X^T. `gram` iterates on A alone and touches X only at
          a restart and at the end. Both take (B, m, n), m <= n, normalised, and write buffers of their own.
Symmetry  X X^T and A^2 are symmetric. On a CPU, for large matrices (STRIPS, STRIP_WORK), they are computed as four
          strips on and above the diagonal and mirrored: each entry is the dot product that the full GEMM takes, so
          the result is bit for bit the same. Products of two different polynomials of A commute only up to rounding;
          mirroring those would turn the harmless antisymmetric part of the error into a symmetric one (measured:
          3.7e-2 instead of 1.8e-2 at 512 x 1024), so they are computed in full.
Cost      5 steps: dense 20 m^2 n + 10 m^3, gram 8 m^2 n + 28 m^3 operations; strips take 10/16 of X X^T and A^2.
          Measured with 2 cores in bf16: 768 x 3072 in 0.73x, 768 x 768 in 0.79x the time of the full product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRIPS = 512  # rows from which strips may win, with
STRIP_WORK = (
    768 * 768
)  # at least so many elements in an operand (512 x 512: 1.07x the time, 512 x 2048: 0.81x)
BLOCKS = 4  # strips: (1 + 1/BLOCKS) / 2 of the products remain
PROBES = 16  # Lanczos steps for the largest eigenvalue
SQUARINGS = 12  # T^(2^12) leaves the top eigenvector alone

Triple = tuple[float, float, float]


def dense(
    x: Tensor,  # (B, m, n) with m <= n, Frobenius norm at most 1; overwritten
    schedule: Sequence[Triple],
    *,
    tall: bool,  # the result is wanted as (B, n, m)
    probe: bool,  # also the largest eigenvalue of x x^T
) -> tuple[Tensor, Tensor | None]:
    """The polynomials one after the other: the result, contiguous, and the eigenvalue (B,) fp32 if asked."""
    a_ = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    p = torch.empty_like(a_)
    y = torch.empty_like(x)
    top = None
    for step, (a, b, c) in enumerate(schedule):
        square(x, out=a_)
        if probe and step == 0:
            top = largest_eigenvalue(a_)
        factor, alpha = (square(a_, out=p, base=a_, beta=b, alpha=c), 1.0) if c else (a_, b)
        if tall and step == len(schedule) - 1:
            y, flat = y.view(y.shape[0], y.shape[2], y.shape[1]), x.mT
            torch.baddbmm(flat, flat, factor, beta=a, alpha=alpha, out=y)
        else:
            torch.baddbmm(x, factor, x, beta=a, alpha=alpha, out=y)
        x, y = y, x
    return x, top


def gram(
    x: Tensor,  # (B, m, n) with m <= n, Frobenius norm at most 1; overwritten
    schedule: Sequence[Triple],
    *,
    restart: int,  # after this many steps x is brought up to date and its Gram matrix taken afresh
    tall: bool,
    probe: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same on the m x m matrix G = X X^T: Q collects the polynomials, X' = Q X at the restart and at the end.

    With S = b G + c G^2 a step is Q' = a Q + S Q and G' = (a + S) (a + S) G. `a` stays out of S: a rounded `a` on
    its diagonal would double the error.
    """
    g = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    s, t, q, r = (torch.empty_like(g) for _ in range(4))
    y = torch.empty_like(x)
    top = None
    assert 0 < restart < len(schedule)
    first, second = schedule[:restart], schedule[restart:]
    for stage in (first, second):
        square(x, out=g)
        if probe and top is None:
            top = largest_eigenvalue(g)
        for step, (a, b, c) in enumerate(stage):
            square(g, out=s, base=g, beta=b, alpha=c)
            if step == 0:
                q.copy_(s).diagonal(dim1=1, dim2=2).add_(a)
            else:
                torch.baddbmm(q, s, q, beta=a, out=r)
                q, r = r, q
            if step < len(stage) - 1:
                torch.baddbmm(g, s, g, beta=a, out=t)
                torch.baddbmm(t, s, t, beta=a, out=g)
        if tall and stage is second:
            torch.bmm(x.mT, q.mT, out=y.view(x.mT.shape))  # q is symmetric up to rounding only
        else:
            torch.bmm(q, x, out=y)
        x, y = y, x
    return (x.view(x.mT.shape) if tall else x), top


def square(
    x: Tensor,  # (B, m, k)
    *,
    out: Tensor,  # (B, m, m)
    base: Tensor | None = None,  # (B, m, m), symmetric
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """out = alpha x x^T + beta base."""
    m = x.shape[1]
    if x.device.type != "cpu" or m < STRIPS or m * x.shape[2] < STRIP_WORK:
        if base is None:
            return torch.bmm(x, x.mT, out=out)
        return torch.baddbmm(base, x, x.mT, beta=beta, alpha=alpha, out=out)
    width = -(-m // (BLOCKS * 16)) * 16
    for i in range(
        x.shape[0]
    ):  # bmm copies an `out` that is a block of a larger matrix, mm writes it in place
        for low in range(0, m, width):
            high = min(low + width, m)
            rows = out[i, low:high, low:]
            if base is None:
                torch.mm(x[i, low:high], x[i, low:].T, out=rows)
            else:
                block = base[i, low:high, low:]
                torch.addmm(block, x[i, low:high], x[i, low:].T, beta=beta, alpha=alpha, out=rows)
            out[i, high:, low:high].copy_(rows[:, high - low :].T)
    return out


def largest_eigenvalue(
    g: Tensor,  # (B, m, m) symmetric, positive semi-definite
) -> Tensor:
    """The largest eigenvalue of each matrix, (B,) fp32, by PROBES steps of Lanczos in fp32 from a fixed vector.

    A lower bound up to the rounding of g. Vectors are not reorthogonalised: that costs copies of small eigenvalues,
    not the largest. The start is an integer hash of the row number: the same on every device, no generator is
    touched. 0 for a zero matrix, NaN for one with NaN.
    """
    g = g if g.dtype == torch.float64 else g.float()
    v = _hashed(g.shape[1], g).expand(g.shape[0], -1, 1)
    before = torch.zeros_like(v)
    beside = g.new_zeros(g.shape[0], 1, 1)
    t = g.new_zeros(g.shape[0], PROBES, PROBES)
    for k in range(PROBES):
        z = torch.bmm(g, v)
        on = (v * z).sum(dim=(1, 2), keepdim=True)
        t[:, k, k] = on[:, 0, 0]
        z = z - on * v - beside * before
        beside = z.norm(dim=1, keepdim=True)
        if k + 1 < PROBES:
            t[:, k, k + 1] = t[:, k + 1, k] = beside[:, 0, 0]
        before, v = v, z / torch.where(beside == 0, 1, beside)
    power = t
    for _ in range(SQUARINGS):
        size = power.abs().amax(dim=(1, 2), keepdim=True)
        power = power / torch.where(size == 0, 1, size)
        power = power @ power
    trace = power.diagonal(dim1=1, dim2=2).sum(1)
    return (power * t).sum(dim=(1, 2)) / torch.where(trace == 0, 1, trace)


def _hashed(
    m: int,
    like: Tensor,
) -> Tensor:
    """A fixed unit vector, (1, m, 1), with entries as good as independent."""
    h = torch.arange(1, m + 1, dtype=torch.int64, device=like.device) * 2654435761 & 0xFFFFFFFF
    h = (h ^ (h >> 15)) * 2246822519 & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 3266489917 & 0xFFFFFFFF
    v: Tensor = (h >> 9).to(like.dtype) / 2**22 - 1
    return v.div(v.norm()).view(1, -1, 1)
