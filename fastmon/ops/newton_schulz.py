"""Newton-Schulz: the polar factor of a matrix by matrix products alone, batched over matrices of one shape.

What      X = U S V^T -> about U V^T: the nearest matrix with orthonormal rows or columns, Muon's update direction.
Method    X_0 = X / |X|_F, then a few steps of an odd polynomial of the singular values,
          X' = a X + b (X X^T) X + c (X X^T)^2 X, always from the smaller side. Three sets of coefficients, METHODS.
Numerics  |X|_F is taken in fp32 after an exact power-of-two scaling (1e-30 and 1e30 work) and divided out before
          the cast to `compute_dtype`: a norm rounded to bf16 can put a rank-1 matrix outside the interval where
          the polynomial stays bounded (up to 1.26 for ns5, 1.022 for polar-express). A zero matrix gives zeros;
          NaN or Inf gives NaN for that matrix alone. The caller's tensors are never written.
Speed     Matrices of one shape form a batch, except where one alone fills a CPU. There symmetric products run as
          strips, and for n >= 3 m the Gram form iterates on X X^T (fastmon/ops/symmetric.py).
Gram form It is fragile: the Gram matrix forgets singular values below sqrt(eps), and what rounding puts in their
          place grows with the slope of the polynomial. Worst output singular value in bf16 over the spectra of the
          tests: ns5 1.21 with a restart after step 3, polar-express 2e9. So: ns5, 5 steps, bf16, 512 rows and up, n
          at least 3 m; there its error is 0.6 to 2.1 times the dense form's (below 512 rows up to 3 times). fp32
          stays dense too (Gram: up to 5 times). A CPU never multiplies in fp16 (100 times slower than bf16).
Cost      5 steps, m <= n: dense 20 m^2 n + 10 m^3 operations, symmetric 15 + 5, Gram 8 + 28 (symmetric 6 + 14).
Sources   Keller Jordan's Muon (ns5); Polar Express, arXiv 2505.16932; Gram form with restart, Dao-AILab (2026).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastmon.backend import FLOATS, Impl, Op, Tolerance, Traffic, resolve
from fastmon.ops import symmetric
from fastmon.ops.inputs import as_list, element_bytes
from fastmon.ops.scaling import power_of_two
from fastmon.ops.symmetric import Triple

ALONE = (
    512  # rows of the smaller side from which a CPU takes one matrix at a time, and the Gram form is accurate
)
GRAM_ASPECT = 3  # n / m from which the Gram form is used; at 2 it would gain 6%
_CAPABILITIES = torch._C._cpu._get_cpu_capability()
CPU_BF16 = any(_CAPABILITIES.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
BATCH = {"cpu": 1 << 22, "cuda": 1 << 27}  # elements of one batch at most: bounds the temporaries


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
    """Polar factors, and what the first Gram matrix tells about the inputs: (count,) fp32, one entry per matrix."""

    factor: Tensor | list[Tensor]  # like the input
    fro: Tensor  # |X|_F
    sigma: Tensor  # the largest singular value of X
    stable_rank: Tensor  # |X|_F^2 / sigma^2; NaN for a zero matrix


@overload
def newton_schulz(
    x: Tensor,
    *,
    method: str | Method = ...,
    steps: int | None = ...,
    compute_dtype: torch.dtype | None = ...,
    out_dtype: torch.dtype | None = ...,
    return_moments: Literal[False] = ...,
) -> Tensor: ...
@overload
def newton_schulz(
    x: Sequence[Tensor],
    *,
    method: str | Method = ...,
    steps: int | None = ...,
    compute_dtype: torch.dtype | None = ...,
    out_dtype: torch.dtype | None = ...,
    return_moments: Literal[False] = ...,
) -> list[Tensor]: ...
@overload
def newton_schulz(
    x: Tensor | Sequence[Tensor],
    *,
    method: str | Method = ...,
    steps: int | None = ...,
    compute_dtype: torch.dtype | None = ...,
    out_dtype: torch.dtype | None = ...,
    return_moments: Literal[True],
) -> Polar: ...


def newton_schulz(
    x: Tensor | Sequence[Tensor],  # (..., m, n), any strides; leading dimensions are a batch of matrices
    *,
    method: str | Method = "ns5",
    steps: int | None = None,
    compute_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    return_moments: bool = False,
) -> Tensor | list[Tensor] | Polar:
    """The approximate polar factor U V^T of every matrix X = U S V^T; same shapes, no host sync.

    method: "ns5" (5 steps by default), "ns3" (8), "polar-express" (5), or a Method with coefficients of your own:
    that one always runs the plain products of the reference, autocast off, whatever backend is forced.
    compute_dtype: dtype of the products, bf16 by default (fp32 on a CPU without bf16 arithmetic). out_dtype: the
    input's by default. fp64 matrices are scaled in fp64, so their whole range works; products are fp64 only where
    compute_dtype says so. return_moments: a `Polar` with |X|_F, sigma_max and the stable rank besides, which
    changes no bit of the factors; sigma_max comes from 16 Lanczos steps on the first Gram matrix as compute_dtype
    rounded it: within 0.5% on every spectrum of the tests.
    Raises TypeError for tensors that are not floating and for dtypes that are not a torch.dtype, ValueError for
    vectors, unknown methods and dtypes that do not serve.
    """
    tensors = as_list(x, "newton_schulz")
    for i, t in enumerate(tensors):
        if t.ndim < 2:
            raise ValueError(
                f"newton_schulz wants matrices (..., m, n), got shape {tuple(t.shape)} at position {i}"
            )
    known = _method(method)
    steps = known.steps if steps is None else steps
    if not isinstance(steps, int) or not 1 <= steps < 100:
        raise ValueError(f"steps is an integer from 1 to 99, got {steps!r}")
    for name, dtype in (("compute_dtype", compute_dtype), ("out_dtype", out_dtype)):
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"{name} is a torch.dtype such as torch.bfloat16, or None, got {dtype!r}")
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype is a floating dtype, got {out_dtype}")
    kind = tensors[0].device.type if tensors else "cpu"
    compute = _compute_dtype(kind, compute_dtype)
    with torch.no_grad():
        if isinstance(method, Method):
            autocast = torch.amp.is_autocast_available(kind)  # else there is nothing to switch off
            with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
                factors, moments = _solve(
                    tensors, method, steps, compute, out_dtype, _plain, probe=return_moments
                )
        elif return_moments:
            factors, moments = moments_op(tensors, method, steps, compute, out_dtype)
        else:
            factors = op(tensors, method, steps, compute, out_dtype)
    result = factors[0] if isinstance(x, Tensor) else factors
    if not return_moments:
        return result
    return Polar(result, moments[0], moments[1], (moments[0] / moments[1]) ** 2)


def _method(method: str | Method) -> Method:
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def _compute_dtype(kind: str, wish: torch.dtype | None) -> torch.dtype:
    if wish is None:
        return torch.bfloat16 if kind != "cpu" or CPU_BF16 else torch.float32
    if wish not in FLOATS | {torch.float64}:
        raise ValueError(f"compute_dtype is bfloat16, float16, float32 or float64, got {wish}")
    if wish == torch.float16 and kind == "cpu":
        raise ValueError(
            "compute_dtype float16 is for GPUs: a CPU multiplies it 100 times slower than bfloat16"
        )
    return wish


Solver = Callable[..., tuple[Tensor, Tensor | None]]
Moments = tuple[list[Tensor], Tensor]


def reference(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> list[Tensor]:
    """The dense form in plain products, a batch per shape."""
    return _solve(xs, METHODS[method], steps, compute_dtype, out_dtype, _plain, probe=False)[0]


def moments_reference(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> Moments:
    """The same with (2, count) fp32: |X|_F and sigma_max of every matrix."""
    return _solve(xs, METHODS[method], steps, compute_dtype, out_dtype, _plain, probe=True)


def fused(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> list[Tensor]:
    """The CPU row: symmetric strips, the Gram form where it is sound, buffers reused."""
    return _solve(xs, METHODS[method], steps, compute_dtype, out_dtype, _fused, probe=False)[0]


def moments_fused(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> Moments:
    """The CPU row with the moments."""
    return _solve(xs, METHODS[method], steps, compute_dtype, out_dtype, _fused, probe=True)


def moments_on_device(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> Moments:
    """The Triton row with the moments: the same launches, and a look at the first Gram matrix in between."""
    run: Callable[..., Moments] = resolve("fastmon.kernels.newton_schulz:run")
    return run(xs, method, steps, compute_dtype, out_dtype, symmetric.largest_eigenvalue)


def _solve(
    xs: list[Tensor],
    method: Method,
    steps: int,
    compute: torch.dtype,
    out_dtype: torch.dtype | None,
    solver: Solver,
    *,
    probe: bool,
) -> Moments:
    """Group the matrices by shape, normalise, iterate with `solver`, write the results back in order."""
    outs = [torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device) for x in xs]
    sources = [matrix for x in xs for matrix in _matrices(x)]
    targets = [matrix for out in outs for matrix in _matrices(out)]
    moments = [torch.zeros(2, dtype=torch.float32, device=x.device) for x in sources] if probe else []
    for chunk in _chunks(sources):
        m, n = sources[chunk[0]].shape
        x, fro = _normalised([sources[k] for k in chunk], compute, method.margin)
        y, top = solver(x, method, method.schedule(steps), tall=m > n, probe=probe)
        for i, k in enumerate(chunk):
            targets[k].copy_(y[i])
            if top is not None:
                moments[k] = torch.stack([fro[i], fro[i] * method.margin * top[i].sqrt()]).float()
    return outs, torch.stack(moments, dim=1) if moments else torch.zeros(2, 0, dtype=torch.float32)


def _matrices(x: Tensor) -> list[Tensor]:
    return [x] if x.ndim == 2 else list(x.flatten(0, -3).unbind(0))


def _chunks(matrices: list[Tensor]) -> list[list[int]]:
    """Positions of the matrices of one shape, in batches that fit the machine; empty matrices are left out.

    fp64 matrices keep to themselves: their norms are taken in fp64.
    """
    shapes: dict[tuple[torch.Size, bool], list[int]] = {}
    for k, matrix in enumerate(matrices):
        if matrix.numel():
            shapes.setdefault((matrix.shape, matrix.dtype == torch.float64), []).append(k)
    chunks = []
    for (shape, _), members in shapes.items():
        kind = matrices[members[0]].device.type
        size = max(1, BATCH.get(kind, BATCH["cuda"]) // shape.numel())
        if kind == "cpu" and min(shape) >= ALONE:
            size = 1
        chunks += [members[low : low + size] for low in range(0, len(members), size)]
    return chunks


def _normalised(
    matrices: list[Tensor],  # each (m, n) or each (n, m)
    dtype: torch.dtype,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """X / (margin |X|_F) as (B, m, n) with m <= n in `dtype`, and |X|_F, (B,)."""
    rows, columns = matrices[0].shape
    exact = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    x = torch.empty(len(matrices), rows, columns, dtype=exact, device=matrices[0].device)
    for i, matrix in enumerate(matrices):
        x[i].copy_(matrix)
    peak = torch.maximum(x.amax(dim=(1, 2), keepdim=True), -x.amin(dim=(1, 2), keepdim=True))
    scale = power_of_two(peak)
    lines = torch.linalg.vector_norm(
        x.mul_(1 / scale), dim=2, keepdim=True
    )  # (B, rows, 1): one long fp32 sum drifts
    norm = torch.linalg.vector_norm(lines, dim=1, keepdim=True)
    x = x.mul_(1 / torch.where(norm == 0, 1, norm * margin)).to(dtype)
    wide = x if rows <= columns else _transposed(x)
    return wide, (norm * scale).flatten()


def _transposed(x: Tensor) -> Tensor:
    """A contiguous (B, n, m): a matrix at a time, where torch's copy has its fast path."""
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    for target, source in zip(out.unbind(0), x.unbind(0), strict=True):
        target.copy_(source.T)
    return out


def _plain(
    x: Tensor, method: Method, schedule: Sequence[Triple], *, tall: bool, probe: bool
) -> tuple[Tensor, Tensor | None]:
    top = None
    for a, b, c in schedule:
        gram = x @ x.mT  # (B, m, m)
        top = symmetric.largest_eigenvalue(gram) if probe and top is None else top
        factor, alpha = (torch.baddbmm(gram, gram, gram, beta=b, alpha=c), 1.0) if c else (gram, b)
        x = torch.baddbmm(x, factor, x, beta=a, alpha=alpha)
    return x.mT if tall else x, top


def _fused(
    x: Tensor, method: Method, schedule: Sequence[Triple], *, tall: bool, probe: bool
) -> tuple[Tensor, Tensor | None]:
    _, m, n = x.shape
    sound = method.restart is not None and len(schedule) == method.steps and x.dtype == torch.bfloat16
    if sound and m >= ALONE and n >= GRAM_ASPECT * m:
        assert method.restart is not None
        return symmetric.gram(x, schedule, restart=method.restart, tall=tall, probe=probe)
    return symmetric.dense(x, schedule, tall=tall, probe=probe)


def _fake(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device) for x in xs]


def _moments_fake(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> Moments:
    count = sum(x.shape[:-2].numel() for x in xs)
    moments = torch.empty(2, count, dtype=torch.float32, device=xs[0].device if count else "cpu")
    return _fake(xs, method, steps, compute_dtype, out_dtype), moments


def traffic(
    xs: list[Tensor], method: str, steps: int, compute_dtype: torch.dtype, out_dtype: torch.dtype | None
) -> Traffic:
    """Each input read and each output written once; operations of the cheapest form, symmetric products halved."""
    flops = 0
    for x in xs:
        m, n = sorted(x.shape[-2:])
        flat = all(c == 0 for _, _, c in METHODS[method].schedule(steps))
        symmetric_dense = steps * (3 * m * m * n + (0 if flat else m**3))
        gram = 6 * m * m * n + 14 * m**3
        best = min(symmetric_dense, gram) if method == "ns5" and steps == 5 else symmetric_dense
        flops += best * x.shape[:-2].numel()
    written = element_bytes(_fake(xs, method, steps, compute_dtype, out_dtype))
    return Traffic(element_bytes(xs) + written, flops)


_ARGUMENTS = "(Tensor[] xs, str method, int steps, ScalarType compute_dtype, ScalarType? out_dtype)"
_WHY = "relative to |result|_F, in bf16 products; five steps amplify rounding by the polynomials' slope"
_TOLERANCE = {dtype: Tolerance(5e-2, 0.0, _WHY) for dtype in FLOATS}
op = Op(
    f"newton_schulz{_ARGUMENTS} -> Tensor[]",
    reference=reference,
    fake=_fake,
    traffic=traffic,
    tolerance=_TOLERANCE,
    impls=(
        Impl("triton", "fastmon.kernels.newton_schulz:launch", device="cuda", dtypes=FLOATS, needs="triton"),
        Impl("fused", fused, device="cpu"),
        Impl("compile", reference, compiled=True),
        Impl("eager", reference),
    ),
)
moments_op = Op(
    f"newton_schulz_moments{_ARGUMENTS} -> (Tensor[] factors, Tensor moments)",
    reference=moments_reference,
    fake=_moments_fake,
    traffic=traffic,
    tolerance=_TOLERANCE,
    impls=(
        Impl("triton", moments_on_device, device="cuda", dtypes=FLOATS, needs="triton"),
        Impl("fused", moments_fused, device="cpu"),
        Impl("compile", moments_reference, compiled=True),
        Impl("eager", moments_reference),
    ),
)
