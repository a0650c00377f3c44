"""Largest singular value of every matrix in a list, by warm power iteration that reads W once.

What      sigma_1(W), with |W|_F from the same read and a residual that certifies: some singular value of W lies
          within residual / sqrt(2) of sigma. It is not proof of the maximum; |W|_F and sqrt(|W|_1 |W|_inf) bound
          sigma_1 from above. stable rank = |W|_F^2 / sigma^2.
Method    W^T (W v) is linear in blocks of rows: y = W_blk v, then z += W_blk^T y while the rows are still on chip.
          So an iteration reads W once, where two mat-vecs read it twice. One iteration from the unit vector v:
          u = Wv / |Wv|, z = W^T u, sigma = |z|, next v = z / sigma. Blocks of vectors use Rayleigh-Ritz.
Numerics  fp32 arithmetic on W 2^-e, with the exact exponent e kept in the state, so that 1e-30 and 1e30 work.
          A zero matrix gives 0, NaN or Inf gives NaN, and both leave the state as it was: one bad step poisons
          nothing. sigma is a lower bound of sigma_1 up to rounding.
Cost      iters reads of W, 4 m n operations each (block b: 4 b m n).
Source    Golub & Van Loan 4e, section 8.2; residual bound: Weyl on [[0, W], [W^T, 0]].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmon.backend import FLOATS, Facts, Impl, Op, Tolerance, Traffic
from fastmon.ops.inputs import as_matrices, element_bytes
from fastmon.ops.scaling import exponent, two_to
from fastmon.ops.spectral_state import (
    HEADER,
    block_of,
    check_state,
    pad16,
    set_exponents,
    spectral_state,
    vectors_of,
)
from fastmon.ops.tridiagonal import jacobi


class Spectral(NamedTuple):
    """Per-matrix results, each of shape (n,) fp32."""

    sigma: Tensor  # estimate of the largest singular value, from below
    residual: Tensor  # some singular value lies within residual / sqrt(2) of sigma
    fro: Tensor  # |W|_F

    @property
    def stable_rank(self) -> Tensor:
        """|W|_F^2 / sigma^2, shape (n,); NaN for a zero matrix."""
        return (self.fro / self.sigma) ** 2


def spectral_norm(
    ws: Tensor | Sequence[Tensor],  # matrices (m, n), stacks (E, m, n), filters (out, in, h, w)
    *,
    state: Tensor | None = None,  # from spectral_state; updated in place
    iters: int = 1,
) -> Spectral:
    """sigma_1 of each matrix by power iteration on W^T W, `iters` reads of W; results stay on the device.

    With a `state` kept across training steps one iteration a step tracks slowly moving weights within 0.5%. Without
    one the vectors start fresh, and `iters=1` is a rough lower bound: use `lanczos_norm` for a cold estimate.
    fp32, bf16 or fp16. Raises ValueError for vectors and for a state of another size.
    """
    matrices = as_matrices(ws, "spectral_norm")
    if not isinstance(iters, int) or iters < 1:
        raise ValueError(f"iters is an integer, at least 1, got {iters!r}")
    with torch.no_grad():
        if state is None:
            state = spectral_state(matrices)
        check_state(matrices, state)
        return Spectral(*norm_op(matrices, state, iters))


def as_three(out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of (3, count) as tensors of their own: outputs of an op may not share memory."""
    return out[0].clone(), out[1].clone(), out[2].clone()


def row_major(ws: list[Tensor]) -> list[Tensor]:
    """Row-major views; a column-major or expanded matrix is copied."""
    return [w if w.stride(1) == 1 and w.stride(0) >= w.shape[1] else w.contiguous() for w in ws]


# -- references ------------------------------------------------------------------------------------------------------


def gram_matvec_reference(ws: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With A = W 2^-e and the state's vectors V (n, b): z = A^T A V, yy = (AV)^T (AV), fro2 = |A|_F^2.

    z is flat, per matrix b rows of n floats padded to 16; yy (count, b, b); fro2 (count,). All fp32.
    """
    ns = [w.shape[1] for w in ws]
    block = block_of(ns, state)
    z, yy, fro2 = _half_outputs(ns, block, state)
    at = 0
    for i, (w, (e, v)) in enumerate(zip(ws, vectors_of(state, ns), strict=True)):
        a = w.to(torch.float32) * two_to(-e)
        y = v @ a.mT  # (block, m)
        width = pad16(ns[i])
        z[at : at + block * width].view(block, width)[:, : ns[i]] = y @ a
        yy[i] = y @ y.mT
        fro2[i] = a.square().sum()
        at += block * width
    return z, yy, fro2


def finish_reference(
    z: Tensor,  # (sum block * pad16(n),)
    yy: Tensor,  # (count, block, block)
    fro2: Tensor,  # (count,)
    state: Tensor,
    ns: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz on the half-iteration's result: sigma, residual, fro (count,), and the state moved on."""
    count, block = len(ns), block_of(ns, state)
    values, q = jacobi(yy)  # descending; columns of q are the Ritz vectors
    s0 = values[:, 0].clamp(min=0).sqrt() if count else yy.new_zeros(0)  # |A v| of the top Ritz vector v
    out = torch.empty(3, count, dtype=torch.float32, device=state.device)
    at = 0
    for i, (e, v) in enumerate(vectors_of(state, ns)):
        n, width = ns[i], pad16(ns[i])
        rotated = q[i].mT @ z[at : at + block * width].view(block, width)[:, :n]  # rows A^T A V q
        ritz = q[i, :, 0] @ v
        at += block * width
        half = rotated[0] / s0[i]  # A^T u with u = A v / |A v|
        sigma = half.norm()
        slip = (half - s0[i] * ritz).norm()
        residual = slip * ((3 * sigma - s0[i]).clamp(min=0) / (sigma + s0[i])).sqrt()
        zero = (s0[i] == 0) | (sigma == 0)
        good = torch.isfinite(sigma) & ~zero & torch.isfinite(fro2[i])
        scale = two_to(e)
        nan = torch.full_like(sigma, torch.nan)
        none = torch.where(torch.isfinite(fro2[i]), torch.zeros_like(sigma), nan)
        out[0, i] = torch.where(good, sigma * scale, none)
        blind = (
            2**0.5 * fro2[i].sqrt() * scale
        )  # v missed W altogether: all that is known is sigma_1 <= |W|_F
        out[1, i] = torch.where(good, residual * scale, torch.where(zero, blind, none))
        out[2, i] = torch.where(torch.isfinite(fro2[i]), fro2[i].sqrt() * scale, nan)
        v.copy_(torch.where(good, _orthonormal(rotated), v))
        e.copy_(torch.where(good, exponent(out[2, i]), e))
    return as_three(out)


def norm_reference(ws: list[Tensor], state: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """`iters` rounds of the two halves, after setting the exponents from |W|_F as it is now."""
    ns = [w.shape[1] for w in ws]
    out = (state.new_zeros(0),) * 3
    set_exponents(ws, state)
    for _ in range(iters):
        out = finish_reference(*gram_matvec_reference(ws, state), state, ns)
    return out


def _orthonormal(
    rows: Tensor,  # (block, n)
) -> Tensor:
    """Gram-Schmidt, twice, in the given order; a row that vanishes stays zero."""
    done: list[Tensor] = []
    for row in rows.unbind(0):
        for _ in range(2):
            row = row / row.norm().clamp(min=1e-30)
            for other in done:
                row = row - (row @ other) * other
        done.append(row / row.norm().clamp(min=1e-30))
    return torch.stack(done)


# -- C++ rows --------------------------------------------------------------------------------------------------------


def gram_matvec_native(ws: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`fastmon_C::gram_matvec`: every row block of every matrix is one task, W is read once."""
    ns = [w.shape[1] for w in ws]
    z, yy, fro2 = _half_outputs(ns, block_of(ns, state), state)
    torch.ops.fastmon_C.gram_matvec(row_major(ws), state, z, yy, fro2)
    return z, yy, fro2


def norm_native(ws: list[Tensor], state: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """`fastmon_C::spectral_norm`: both halves, all iterations, in one call."""
    out = torch.empty(3, len(ws), dtype=torch.float32)
    torch.ops.fastmon_C.spectral_norm(row_major(ws), state, out, iters)
    return as_three(out)


# -- registration ----------------------------------------------------------------------------------------------------


def _half_outputs(ns: Sequence[int], block: int, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = block * sum(pad16(n) for n in ns)
    return state.new_zeros(width), state.new_zeros(len(ns), block, block), state.new_zeros(len(ns))


def _fake_half(ws: list[Tensor], state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ns = [w.shape[1] for w in ws]
    return _half_outputs(ns, block_of(ns, state), state)


def fake_norm(ws: list[Tensor], state: Tensor, iters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of sigma, residual and fro: (count,) each."""
    return state.new_empty(len(ws)), state.new_empty(len(ws)), state.new_empty(len(ws))


def _fake_finish(
    z: Tensor, yy: Tensor, fro2: Tensor, state: Tensor, ns: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return fro2.new_empty(len(ns)), fro2.new_empty(len(ns)), fro2.new_empty(len(ns))


def traffic(ws: list[Tensor], state: Tensor, iters: int = 1) -> Traffic:
    """`iters` reads of W; 4 operations an element, a vector and an iteration, and 2 for |W|_F."""
    numel = sum(w.numel() for w in ws)
    block = block_of([w.shape[1] for w in ws], state)
    return Traffic(iters * element_bytes(ws) + 2 * 4 * state.numel(), iters * numel * (4 * block + 2))


def _finish_traffic(z: Tensor, yy: Tensor, fro2: Tensor, state: Tensor, ns: Sequence[int]) -> Traffic:
    return Traffic(4 * (z.numel() + 2 * state.numel()), 6 * z.numel())


def one_vector(facts: Facts) -> str | None:
    """The device kernels hold one vector per matrix; a state is the only flat argument of its op."""
    widths = [shape[1] for shape in facts.shapes if len(shape) == 2]
    size = sum(shape[0] for shape in facts.shapes if len(shape) == 1)
    alone = sum(HEADER + pad16(n) for n in widths)
    return None if size == alone else "holds one vector per matrix, the state has more"


def _one_by_one(facts: Facts) -> str | None:
    return None if (facts.shapes[1][1:] == (1, 1)) else "holds one vector per matrix, the state has more"


_KERNELS = "fastmon.kernels.spectral"
_WHY = "fp32 mat-vecs of width n: rounding grows as sqrt(n) 6e-8; the iteration corrects the direction itself"
TOLERANCE = {dtype: Tolerance(1e-4, 1e-6, _WHY) for dtype in FLOATS}

gram_op = Op(
    "gram_matvec(Tensor[] ws, Tensor state) -> (Tensor z, Tensor yy, Tensor fro2)",
    reference=gram_matvec_reference,
    fake=_fake_half,
    traffic=traffic,
    tolerance=TOLERANCE,
    by_shape=True,
    impls=(
        Impl(
            "triton", f"{_KERNELS}:gram_matvec", device="cuda", dtypes=FLOATS, needs="triton", fits=one_vector
        ),
        Impl("cpp", gram_matvec_native, device="cpu", dtypes=FLOATS, needs="extension"),
        Impl("compile", gram_matvec_reference, compiled=True),
        Impl("eager", gram_matvec_reference),
    ),
)
finish_op = Op(
    "spectral_finish(Tensor z, Tensor yy, Tensor fro2, Tensor(a!) state, int[] ns)"
    " -> (Tensor sigma, Tensor residual, Tensor fro)",
    reference=finish_reference,
    fake=_fake_finish,
    traffic=_finish_traffic,
    tolerance=TOLERANCE,
    by_shape=True,
    impls=(
        Impl("triton", f"{_KERNELS}:spectral_finish", device="cuda", needs="triton", fits=_one_by_one),
        Impl("eager", finish_reference),
    ),
)
norm_op = Op(
    "spectral_norm(Tensor[] ws, Tensor(a!) state, int iters) -> (Tensor sigma, Tensor residual, Tensor fro)",
    reference=norm_reference,
    fake=fake_norm,
    traffic=traffic,
    tolerance=TOLERANCE,
    by_shape=True,
    impls=(
        Impl(
            "triton",
            f"{_KERNELS}:spectral_norm",
            device="cuda",
            dtypes=FLOATS,
            needs="triton",
            fits=one_vector,
        ),
        Impl("cpp", norm_native, device="cpu", dtypes=FLOATS, needs="extension"),
        Impl("compile", norm_reference, compiled=True),
        Impl("eager", norm_reference),
    ),
)
