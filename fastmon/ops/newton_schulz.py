"""Newton-Schulz: the polar factor of a matrix by matrix products alone, batched over matrices of one shape.

What      X = U S V^T -> about U V^T: the nearest matrix with orthonormal rows or columns, Muon's update direction.
Method    X_0 = X / |X|_F, then a few steps of an odd polynomial of the singular values,
          X' = a X + b (X X^T) X + c (X X^T)^2 X, always from the smaller side. Three sets of coefficients, METHODS.
Numerics  |X|_F is taken in fp32 after an exact power-of-two scaling (1e-30 and 1e30 work) and divided out before
          the cast to `compute_dtype`: a norm rounded to bf16 can put a rank-1 matrix outside the interval where
          the polynomial stays bounded (above 1.26 for ns5, 1.022 for polar-express). A zero matrix gives zeros;
          NaN or Inf gives NaN for that matrix alone. The caller's tensors are never written.
Speed     Matrices of one shape form a batch. Where one matrix fills the machine (CPU, 768 rows and up) each runs
          alone: X X^T and the polynomial are symmetric, so they are computed as strips on and above the diagonal
          and mirrored (10/16 of the products), bit for bit what the full product gives. For n >= 2 m the Gram
          form iterates on the m x m matrix X X^T and touches X only at a restart and at the end.
Gram form It is fragile: the Gram matrix forgets singular values below sqrt(eps), and what bf16 puts in their place
          grows with the slope of the polynomial. Measured worst output singular value over the spectra of the
          tests: ns5 1.21 with a restart after step 3; polar-express 2e9. So: ns5 in 5 bf16 steps only, at 512 rows
          and up (below that the error exceeds twice the dense form's). fp32 stays dense too: its Gram form is up
          to 5 times less accurate. A CPU never multiplies in fp16 (100 times slower than bf16).
Cost      5 steps, m <= n: dense 20 m^2 n + 10 m^3, symmetric 15 + 5, Gram 8 + 28 (symmetric 6 + 14).
Sources   Keller Jordan's Muon (ns5); Polar Express, arXiv 2505.16932; Gram form and restart, Dao-AILab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor

from fastmon.backend import FLOATS, Facts, Impl, Op, Tolerance, Traffic
from fastmon.ops.inputs import as_list, element_bytes
from fastmon.ops.scaling import power_of_two

Triple = tuple[float, float, float]

ALONE = 512  # rows of the smaller side: from here a CPU takes one matrix at a time, and the Gram form is accurate
STRIPS = 768  # rows: from here symmetric products run as strips (measured 0.72x at 768, 1.0x at 512)
GRAM_ASPECT = 2.0  # n / m from which the Gram form wins (by operations 1.5, with strips 1.3)
PROBES = 20  # power iterations on the Gram matrix for sigma_max


@dataclass(frozen=True, slots=True)
class Method:
    """One set of coefficients (a, b, c), one triple per step; the last one repeats when more steps are asked."""

    coefficients: tuple[Triple, ...]
    steps: int  # by default
    margin: float = 1.0  # the norm is multiplied by this before the division
    restart: int | None = None  # step after which the bf16 Gram form restarts; None: the dense form only

    def schedule(self, steps: int) -> tuple[Triple, ...]:
        """The triples of `steps` steps."""
        known = self.coefficients[:steps]
        return known + (self.coefficients[-1],) * (steps - len(known))


METHODS = {
    # Output singular values 0.68-1.13 for inputs in [0.01, 1]; fast at small values, never settles at 1.
    "ns5": Method(((3.4445, -4.7750, 2.0315),), steps=5, restart=3),
    # The classic convergent cubic: to 1 from below, but slope 1.5 a step, so small values stay small.
    "ns3": Method(((1.5, -0.5, 0.0),), steps=8),
    # Output 0.86-1.14 for inputs in [0.001, 1]; minimax optimal step by step.
    "polar-express": Method(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        steps=5,
        margin=1.02,
    ),
}


class Polar(NamedTuple):
    """The polar factors, and what the first Gram matrix tells about the inputs, one entry per matrix."""

    factor: Tensor | list[Tensor]  # shaped like the input
    fro: Tensor  # (count,) fp32: |X|_F
    sigma: Tensor  # (count,) fp32: largest singular value of X, by power iteration on the Gram matrix
    stable_rank: Tensor  # (count,) fp32: |X|_F^2 / sigma^2


@overload
def newton_schulz(x: Tensor, *, method: str = ..., steps: int | None = ..., compute_dtype: torch.dtype | None = ...,
                  out_dtype: torch.dtype | None = ...) -> Tensor: ...  # fmt: skip
@overload
def newton_schulz(x: Sequence[Tensor], *, method: str = ..., steps: int | None = ...,
                  compute_dtype: torch.dtype | None = ..., out_dtype: torch.dtype | None = ...) -> list[Tensor]: ...  # fmt: skip


def newton_schulz(
    x: Tensor | Sequence[Tensor],  # (..., m, n): leading dimensions are a batch of matrices
    *,
    method: str = "ns5",
    steps: int | None = None,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | list[Tensor]:
    """The approximate polar factor U V^T of every matrix X = U S V^T; same shapes, any strides, no host sync.

    method: "ns5" (default, 5 steps), "ns3" (8) or "polar-express" (5). compute_dtype: the dtype of the products,
    bf16 by default (fp32 on a CPU without bf16 arithmetic; fp16 is refused on a CPU). out_dtype: the input's.
    Raises TypeError for tensors that are not floating, ValueError for vectors, unknown methods and dtypes.
    """
    tensors, arguments = _arguments(x, method, steps, compute_dtype, out_dtype)
    with torch.no_grad():
        factors: list[Tensor] = op(tensors, *arguments)
    return factors[0] if isinstance(x, Tensor) else factors
