"""Statistics of every tensor in a list, from one read: counts, mean, variance, extremes, norms.

What      numel, zeros, non-finite count; mean, m2 = sum (x - mean)^2, sum x^2, min, max, max|x|; with order=4 also
          m3 and m4, the central third and fourth sums.
Method    Fixed chunks per tensor, summed around a pivot and merged by Chan's update (Chan, Golub, LeVeque 1979), so
          a mean of 1e4 with a deviation of 1 loses nothing, and the result does not depend on threads or grouping.
Numerics  fp32 arithmetic in the chunk, fp64 or compensated sums across chunks. `l2` is right for finite inputs from
          1e-30 to 1e30; `sumsq` is the plain fp32 value and may underflow or overflow.
          A tensor with NaN or Inf has NaN statistics and a count that says how many; its neighbours are untouched.
Cost      One read of the inputs. About 7 operations an element (order=4: 11).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmon.backend import FLOATS, Impl, Op, Tolerance, Traffic, resolve
from fastmon.ops.inputs import as_list, as_one_range
from fastmon.ops.scaling import power_of_two

Row = Callable[[list[Tensor], int], tuple[Tensor, Tensor]]


class Moments(NamedTuple):
    """Per-tensor statistics, each of shape (n,). Counts are int64, the rest fp32. See `moments`."""

    numel: Tensor
    zeros: Tensor
    nonfinite: Tensor
    mean: Tensor
    m2: Tensor  # sum (x - mean)^2
    sumsq: Tensor  # sum x^2 as fp32 stores it
    min: Tensor
    max: Tensor
    absmax: Tensor
    l2: Tensor  # sqrt(sum x^2), right where sumsq over- or underflows
    m3: Tensor | None = None  # sum (x - mean)^3
    m4: Tensor | None = None  # sum (x - mean)^4

    @property
    def std(self) -> Tensor:
        """Population standard deviation, sqrt(m2 / numel), shape (n,)."""
        return (self.m2 / self.numel).sqrt()

    @property
    def rms(self) -> Tensor:
        """Root mean square, l2 / sqrt(numel), shape (n,)."""
        return self.l2 / self.numel.to(torch.float32).sqrt()

    @property
    def zero_frac(self) -> Tensor:
        """Share of exact zeros, shape (n,); NaN for an empty tensor."""
        return self.zeros / self.numel

    @property
    def global_l2(self) -> Tensor:
        """The norm of all tensors together, shape ()."""
        return _norm_of(self.l2)

    @property
    def skewness(self) -> Tensor:
        """m3 / numel / std^3, shape (n,). Needs order=4; NaN where the deviation is 0."""
        return self._central(self.m3) / self.std**3

    @property
    def kurtosis(self) -> Tensor:
        """m4 / numel / std^4, shape (n,): 3 for a Gaussian. Needs order=4; NaN where the deviation is 0."""
        return self._central(self.m4) / (self.m2 / self.numel) ** 2

    def _central(self, m: Tensor | None) -> Tensor:
        if m is None:
            raise ValueError(
                "skewness and kurtosis need moments(..., order=4); these were computed with order=2"
            )
        return m / self.numel


def _norm_of(norms: Tensor) -> Tensor:
    """sqrt(sum norms^2) without overflow: norms (n,) fp32 -> ()."""
    if norms.numel() == 0:
        return norms.new_zeros(())
    scale = power_of_two(norms.amax())
    return (norms / scale).square().sum().sqrt() * scale


def moments(xs: Tensor | Sequence[Tensor], *, order: int = 2) -> Moments:
    """Statistics of each tensor from one read. Results stay on the inputs' device; nothing waits for it.

    xs: one tensor or a list of n tensors of any shape and strides, fp32, bf16 or fp16 (fp64 by the eager row).
    order: 2, or 4 for m3 and m4 as well. Returns Moments with fields of shape (n,).
    Raises TypeError for other dtypes and ValueError for another order or for tensors on several devices.
    """
    if order not in (2, 4):
        raise ValueError(f"order is 2 or 4, got {order}")
    tensors = as_list(xs, "moments")
    with torch.no_grad():
        counts, stats = op(tensors, order)
    return Moments(*counts, *stats)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of the concatenations a_i ++ b_i, from the moments of the parts (Chan's update), fields (n,).

    Use it over micro-batches, ranks and groups. Both sides need the same order and length.
    """
    if (a.m4 is None) != (b.m4 is None) or a.mean.shape != b.mean.shape:
        raise ValueError("merge_moments wants two results of the same length and order")
    n = (a.numel + b.numel).clamp(min=1).to(torch.float32)
    part_a, part_b = a.numel / n, b.numel / n  # ratios: powers of the counts would leave the range of fp32
    both = (a.numel > 0) & (b.numel > 0)
    d = torch.where(both, b.mean - a.mean, torch.zeros_like(a.mean))
    mean = torch.where(both, a.mean + d * part_b, torch.where(a.numel > 0, a.mean, b.mean))
    m2 = a.m2 + b.m2 + d * d * (n * part_a * part_b)
    high: tuple[Tensor, ...] = ()
    if a.m3 is not None and a.m4 is not None and b.m3 is not None and b.m4 is not None:
        m3 = a.m3 + b.m3 + d**3 * (n * part_a * part_b * (part_a - part_b))
        m3 = m3 + 3 * d * (part_a * b.m2 - part_b * a.m2)
        m4 = a.m4 + b.m4 + d**4 * (n * part_a * part_b * (part_a**2 - part_a * part_b + part_b**2))
        m4 = m4 + 6 * d**2 * (part_a**2 * b.m2 + part_b**2 * a.m2) + 4 * d * (part_a * b.m3 - part_b * a.m3)
        high = (m3, m4)
    scale = power_of_two(torch.maximum(a.l2, b.l2))
    l2 = torch.hypot(a.l2 / scale, b.l2 / scale) * scale
    return Moments(
        a.numel + b.numel,
        a.zeros + b.zeros,
        a.nonfinite + b.nonfinite,
        mean,
        m2,
        a.sumsq + b.sumsq,
        torch.minimum(a.min, b.min),
        torch.maximum(a.max, b.max),
        torch.maximum(a.absmax, b.absmax),
        l2,
        *high,
    )


def reference(xs: list[Tensor], order: int) -> tuple[Tensor, Tensor]:
    """Counts (3, n) int64 and statistics (7 or 9, n) fp32, a tensor at a time, in a form one can check by hand."""
    rows = 7 if order == 2 else 9
    counts, stats = _allocate(xs, rows)
    for i, x in enumerate(xs):
        counts[:, i] = 0
        counts[0, i] = x.numel()
        if x.numel() == 0:
            stats[:, i] = 0
            stats[3, i], stats[4, i] = torch.inf, -torch.inf
            continue
        x = x.detach().reshape(-1)
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        counts[1, i] = (x == 0).sum()
        nonfinite = (~torch.isfinite(x)).sum()
        counts[2, i] = nonfinite
        low, high = torch.aminmax(x)
        absmax = torch.maximum(-low, high)
        scale = power_of_two(absmax)
        s = x / scale
        mean = s.mean()
        d = s - mean
        slip = d.mean()  # what rounding the mean to fp32 left over
        mean, d = mean + slip, d - slip
        m2, l2 = d.square().sum(), s.square().sum().sqrt()
        row = [mean * scale, m2 * scale * scale, (l2 * scale).square(), low, high, absmax, l2 * scale]
        if order == 4:
            row += [d.pow(3).sum() * scale * scale * scale, d.pow(4).sum() * scale * scale * scale * scale]
        stats[:, i] = torch.where(nonfinite > 0, torch.full((), torch.nan, device=x.device), torch.stack(row))
    return counts, stats


def native(xs: list[Tensor], order: int) -> tuple[Tensor, Tensor]:
    """The C++ row: the same results, written by `fastmon_C::moments`."""
    counts, stats = _allocate(xs, 7 if order == 2 else 9)
    torch.ops.fastmon_C.moments([as_one_range(x) for x in xs], counts, stats, order)
    return counts, stats


def on_device(xs: list[Tensor], order: int) -> tuple[Tensor, Tensor]:
    """The Triton row; its kernels read `numel` elements in memory order, so the tensors are made dense first."""
    launch: Row = resolve("fastmon.kernels.moments:launch")
    return launch([as_one_range(x) for x in xs], order)


def _allocate(xs: list[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    where, n = xs[0].device if xs else None, len(xs)
    counts = torch.empty(3, n, dtype=torch.int64, device=where)
    return counts, torch.empty(rows, n, dtype=torch.float32, device=where)


def _fake(xs: list[Tensor], order: int) -> tuple[Tensor, Tensor]:
    return _allocate(xs, 7 if order == 2 else 9)


def traffic(xs: list[Tensor], order: int) -> Traffic:
    """One read of every element."""
    numel = sum(x.numel() for x in xs)
    return Traffic(sum(x.numel() * x.element_size() for x in xs), numel * (7 if order == 2 else 11))


_WHY = "fp32 sums of at most 16k terms per chunk, chunks merged in higher precision; bf16 inputs are exact in fp32"
op = Op(
    "moments(Tensor[] xs, int order) -> (Tensor counts, Tensor stats)",
    reference=reference,
    fake=_fake,
    traffic=traffic,
    tolerance={dtype: Tolerance(2e-5, 1e-6, _WHY) for dtype in FLOATS},
    impls=(
        Impl("triton", on_device, device="cuda", dtypes=FLOATS, needs="triton"),
        Impl("cpp", native, device="cpu", dtypes=FLOATS, needs="extension"),
        Impl("compile", reference, compiled=True),
        Impl("eager", reference),
    ),
)
