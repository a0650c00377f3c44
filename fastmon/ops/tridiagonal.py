"""Small eigenproblems without torch.linalg, which waits for the device: fixed iteration counts, no branches."""

from __future__ import annotations

import torch
from torch import Tensor

_SWEEPS = 6  # cyclic Jacobi converges quadratically; 6 sweeps leave rounding for 8 x 8
_SQUARINGS = 14  # T^(2^14): a relative gap of 1e-3 becomes a factor of 1e-7


def jacobi(
    g: Tensor,  # (count, b, b), symmetric
) -> tuple[Tensor, Tensor]:
    """Eigenvalues (count, b), descending, and eigenvectors (count, b, b), columns, by cyclic Jacobi rotations.

    For b = 1 it is g itself and ones. NaN in, NaN out for that matrix alone.
    """
    b = g.shape[-1]
    q = torch.eye(b, device=g.device, dtype=g.dtype).expand_as(g).clone()
    if b == 1:
        return g[..., 0], q
    for _ in range(_SWEEPS):
        for i in range(b - 1):
            for j in range(i + 1, b):
                off = g[:, i, j]
                tau = (g[:, j, j] - g[:, i, i]) / (2 * off)
                t = torch.sign(tau) / (tau.abs() + torch.sqrt(1 + tau * tau))
                t = torch.where(tau == 0, torch.ones_like(t), t)
                t = torch.where(off == 0, torch.zeros_like(t), t)
                c = 1 / torch.sqrt(1 + t * t)
                rotation = torch.eye(b, device=g.device, dtype=g.dtype).expand_as(g).clone()
                rotation[:, i, i], rotation[:, j, j] = c, c
                rotation[:, i, j], rotation[:, j, i] = t * c, -t * c
                g = rotation.mT @ g @ rotation
                q = q @ rotation
    values, order = torch.diagonal(g, dim1=-2, dim2=-1).sort(dim=-1, descending=True)
    return values, torch.gather(q, -1, order[:, None, :].expand_as(q))


def largest_eigenpair(
    diagonal: Tensor,  # (k,)
    beside: Tensor,  # (k - 1,)
) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue () and unit eigenvector (k,) of a symmetric positive semi-definite tridiagonal matrix.

    Squares the normalised matrix 14 times: its columns turn into the top eigenvector, and the Rayleigh quotient of
    that vector is right to second order, also where the two largest eigenvalues nearly agree.
    """
    t = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    scale = t.abs().amax().clamp(min=1e-30)
    t = t / scale
    power = t
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / power.abs().amax().clamp(min=1e-30)
    column = power.square().sum(0).argmax()
    q = torch.index_select(power, 1, column[None])[:, 0]
    q = q / q.norm().clamp(min=1e-30)
    return (q @ (t @ q)) * scale, q
