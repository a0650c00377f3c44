"""Largest singular values from cold: symmetric Lanczos on W^T W, one read of W per iteration.

What      sigma_1(W) within 1% on the hardest spectra (Gaussian), 1e-5 on power laws, from a random start; with |W|_F
          and a residual in the sense of `spectral_norm`.
Method    `iters` Lanczos steps with the one-read Gram mat-vec, reorthogonalised twice, then the top eigenpair of the
          tridiagonal in our own code (torch.linalg on a device waits for it). The top Ritz vector goes into the state.
Numerics  As `spectral_norm`: fp32 on W 2^-e. An exhausted Krylov space (rank below `iters`) ends early and exactly.
Cost      `iters` + 2 reads of W (one for the scale, one for |W|_F), 4 m n operations each; 4 iters^2 n to
          reorthogonalise.
Source    Golub & Van Loan 4e, section 10.1; Kuczynski & Wozniakowski 1992 for the random start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmon.backend import FLOATS, Impl, Op
from fastmon.ops.inputs import as_matrices
from fastmon.ops.scaling import two_to
from fastmon.ops.spectral import TOLERANCE, Spectral, as_three, fake_norm, one_vector, row_major, traffic
from fastmon.ops.spectral_state import set_exponents, spectral_state, vectors_of
from fastmon.ops.tridiagonal import largest_eigenpair


def lanczos_norm(ws: Tensor | Sequence[Tensor], *, iters: int = 20, seed: int = 0) -> Spectral:
    """sigma_1 of each matrix, cold, by `iters` steps of symmetric Lanczos on W^T W with full reorthogonalisation.

    20 iterations stay within 1% on the hardest case measured (Gaussian matrices), and within 1e-5 on power laws.
    Reads W `iters` + 2 times. Deterministic in `seed`; the global generator is untouched.
    """
    matrices = as_matrices(ws, "lanczos_norm")
    if not isinstance(iters, int) or iters < 2:
        raise ValueError(f"iters is an integer, at least 2, got {iters!r}")
    with torch.no_grad():
        return Spectral(*lanczos_op(matrices, spectral_state(matrices, seed=seed), iters))


def lanczos_reference(ws: list[Tensor], state: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric Lanczos on A^T A from the state's vectors; the top Ritz vector goes back into the state."""
    ns = [w.shape[1] for w in ws]
    set_exponents(ws, state)
    results = [_lanczos_one(w, e, v, iters) for w, (e, v) in zip(ws, vectors_of(state, ns), strict=True)]
    out = torch.stack(results, dim=1) if results else state.new_zeros(3, 0)
    return as_three(out)


def _lanczos_one(
    w: Tensor,  # (m, n)
    e: Tensor,  # (), view into the state
    v: Tensor,  # (1, n), view into the state
    iters: int,
) -> Tensor:
    a = w.to(torch.float32) * two_to(-e)
    m, n = a.shape
    if n == 0 or m == 0:
        return a.new_zeros(3)
    steps = min(iters, n)
    basis = a.new_zeros(steps + 1, n)
    basis[0] = v[0]
    alpha, beta = a.new_zeros(steps), a.new_zeros(steps)
    for k in range(steps):
        z = (a @ basis[k]) @ a
        alpha[k] = z @ basis[k]
        for _ in range(2):
            z = z - (basis[: k + 1] @ z) @ basis[: k + 1]
        beta[k] = z.norm()
        going = beta[k] > 1e-6 * alpha[: k + 1].max()  # else the Krylov space is exhausted
        basis[k + 1] = torch.where(going, z / beta[k], torch.zeros_like(z))
        beta[k] = torch.where(going | ~torch.isfinite(beta[k]), beta[k], torch.zeros_like(beta[k]))
    value, q = largest_eigenpair(alpha, beta[:-1])
    ritz = q @ basis[:-1]
    ritz = ritz / ritz.norm()
    sigma, fro2 = value.clamp(min=0).sqrt(), a.square().sum()
    residual = 2**0.5 * beta[-1] * q[-1].abs() / sigma
    good = torch.isfinite(sigma) & (sigma > 0) & torch.isfinite(ritz).all()
    v[0].copy_(torch.where(good, ritz, v[0]))
    none = torch.where(torch.isfinite(fro2), torch.zeros_like(sigma), torch.full_like(sigma, torch.nan))
    blind = torch.where(sigma == 0, 2**0.5 * fro2.sqrt(), none)  # v missed W: only sigma_1 <= |W|_F is known
    pair = torch.where(good, torch.stack([sigma, residual]), torch.stack([none, blind]))
    return torch.cat([pair, fro2.sqrt()[None]]) * two_to(e)


def lanczos_native(ws: list[Tensor], state: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """`fastmon_C::lanczos`: one sweep over all matrices per iteration."""
    out = torch.empty(3, len(ws), dtype=torch.float32)
    torch.ops.fastmon_C.lanczos(row_major(ws), state, out, iters)
    return as_three(out)


_TRITON = "fastmon.kernels.spectral:lanczos"
lanczos_op = Op(
    "lanczos(Tensor[] ws, Tensor(a!) state, int iters) -> (Tensor sigma, Tensor residual, Tensor fro)",
    reference=lanczos_reference,
    fake=fake_norm,
    traffic=traffic,
    tolerance=TOLERANCE,
    by_shape=True,
    impls=(
        Impl("triton", _TRITON, device="cuda", dtypes=FLOATS, needs="triton", fits=one_vector),
        Impl("cpp", lanczos_native, device="cpu", dtypes=FLOATS, needs="extension"),
        Impl("compile", lanczos_reference, compiled=True),
        Impl("eager", lanczos_reference),
    ),
)
