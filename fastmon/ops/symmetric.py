"""Newton-Schulz iterations as batched matrix products, with symmetric ones at 10/16 of the work.

What      `dense` iterates X' = a X + (b A + c A^2) X with A = X X^T. `gram` iterates on A alone and touches X only at
          a restart and at the end. Both take (B, m, n), m <= n, normalised, and write buffers of their own.
Symmetry  X X^T and every polynomial of it are symmetric. From STRIPS rows on a CPU they are computed as four strips
          on and above the diagonal and mirrored: each entry is the dot product that the full GEMM takes, so the
          result is bit for bit the same. Where the library rounds the two halves differently, mirroring only helps.
Cost      5 steps: dense 20 m^2 n + 10 m^3, gram 8 m^2 n + 28 m^3 operations; strips take 10/16 of everything but the
          products with X. Measured with 2 cores in bf16: a strip product of 768 rows 0.71x, of 512 rows 1.0x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRIPS = 768  # rows from which strips win
BLOCKS = 4  # strips: (1 + 1/BLOCKS) / 2 of the products remain
PROBES = 20  # power iterations for the largest eigenvalue

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
        product(x, x, out=a_)
        if probe and step == 0:
            top = largest_eigenvalue(a_)
        factor, alpha = (product(a_, a_, out=p, base=a_, beta=b, alpha=c), 1.0) if c else (a_, b)
        if step == len(schedule) - 1:
            y = _last(x, factor, tall=tall, beta=a, alpha=alpha, spare=y)
        else:
            torch.baddbmm(x, factor, x, beta=a, alpha=alpha, out=y)
            x, y = y, x
    return y, top


def gram(
    x: Tensor,  # (B, m, n) with m <= n, Frobenius norm at most 1; overwritten
    schedule: Sequence[Triple],
    *,
    restart: int,  # after this many steps x is brought up to date and its Gram matrix taken afresh
    tall: bool,
    probe: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same on the m x m matrix G = X X^T: Q collects the polynomials, X' = Q X at the restart and at the end.

    With S = b G + c G^2 a step is Q' = a Q + S Q and G' = (a + S)^2 G; everything commutes and stays symmetric. `a`
    is kept out of S: folded into its diagonal, S would lose the digits of small entries to a rounded a.
    """
    g = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    s, t, q, r = (torch.empty_like(g) for _ in range(4))
    top = None
    for stage in (schedule[:restart], schedule[restart:]):
        product(x, x, out=g)
        if probe and top is None:
            top = largest_eigenvalue(g)
        for step, (a, b, c) in enumerate(stage):
            product(g, g, out=s, base=g, beta=b, alpha=c)
            if step == 0:
                q.copy_(s).diagonal(dim1=1, dim2=2).add_(a)
            else:
                product(s, q, out=r, base=q, beta=a)
                q, r = r, q
            if step < len(stage) - 1:
                product(s, g, out=t, base=g, beta=a)
                product(s, t, out=g, base=t, beta=a)
        x = _last(x, q, tall=tall and stage is not schedule[:restart] and len(stage) != restart, beta=0.0)
    return x, top


def product(
    x: Tensor,  # (B, m, k)
    y: Tensor,  # (B, m, k), x y^T symmetric
    *,
    out: Tensor,  # (B, m, m), none of the others
    base: Tensor | None = None,  # (B, m, m)
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """out = alpha x y^T + beta base for a result known to be symmetric."""
    m = x.shape[1]
    if m < STRIPS or x.device.type != "cpu":
        if base is None:
            return torch.bmm(x, y.mT, out=out)
        return torch.baddbmm(base, x, y.mT, beta=beta, alpha=alpha, out=out)
    width = -(-m // (BLOCKS * 16)) * 16
    for i in range(x.shape[0]):  # bmm copies an `out` that is a block of a larger matrix, mm writes it in place
        for low in range(0, m, width):
            high = min(low + width, m)
            rows = out[i, low:high, low:]
            if base is None:
                torch.mm(x[i, low:high], y[i, low:].T, out=rows)
            else:
                block = base[i, low:high, low:]
                torch.addmm(block, x[i, low:high], y[i, low:].T, beta=beta, alpha=alpha, out=rows)
            out[i, high:, low:high].copy_(rows[:, high - low :].T)
    return out


def largest_eigenvalue(
    g: Tensor,  # (B, m, m) symmetric, positive semi-definite
) -> Tensor:
    """The largest eigenvalue of each matrix, (B,) fp32, by PROBES power iterations in fp32 from a fixed vector.

    A lower bound up to the rounding of g. The vector is an integer hash of the row number: the same on every device,
    no generator is touched. 0 for a zero matrix, NaN for one with NaN.
    """
    g = g if g.dtype == torch.float64 else g.float()
    h = torch.arange(1, g.shape[1] + 1, device=g.device) * 2654435761 & 0xFFFFFFFF
    h = (h ^ (h >> 15)) * 2246822519 & 0xFFFFFFFF
    h = (h ^ (h >> 13)) * 3266489917 & 0xFFFFFFFF
    v = ((h >> 9).to(g.dtype) / 2**22 - 1).view(1, -1, 1).expand(g.shape[0], -1, -1)
    v = v / v.norm(dim=1, keepdim=True)
    z = torch.bmm(g, v)
    for _ in range(PROBES - 1):
        length = z.norm(dim=1, keepdim=True)
        v = z / torch.where(length > 0, length, 1)
        z = torch.bmm(g, v)
    return (v * z).sum(dim=(1, 2))
