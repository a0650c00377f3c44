"""Inner products of paired tensors from one read of both: dot, |x|^2, |y|^2, |x - y|^2, cosine.

What      For every pair (x_i, y_i): dot, xx, yy, dd = |x - y|^2; cosine and norm ratio per pair and over the list.
Numerics  The four sums are as fp32 stores them. Norms and cosine are computed in scaled form, cos = (dot/|x|)/|y|,
          so they are right for finite inputs from 1e-30 to 1e30. The cosine is clamped to [-1, 1] and NaN where a
          norm is 0 (undefined). The global cosine comes from summed dots, never from a mean of cosines.
          A pair with NaN or Inf has NaN results; its neighbours are untouched.
Cost      One read of both lists, 9 operations a pair of elements. The peers read x three times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmon.backend import FLOATS, Facts, Impl, Op, Tolerance, Traffic, resolve
from fastmon.ops.inputs import as_list, as_same_range, element_bytes, same_shapes
from fastmon.ops.moments import _norm_of
from fastmon.ops.scaling import power_of_two

Row = Callable[[list[Tensor], list[Tensor]], Tensor]


class PairMoments(NamedTuple):
    """Per-pair results, each (n,) fp32. The sums are as fp32 stores them, the rest is right from 1e-30 to 1e30."""

    dot: Tensor
    xx: Tensor
    yy: Tensor
    dd: Tensor  # |x - y|^2
    x_l2: Tensor  # |x|
    y_l2: Tensor  # |y|
    d_l2: Tensor  # |x - y|
    cosine: Tensor  # dot / (|x| |y|) in [-1, 1]; NaN where a norm is 0

    @property
    def norm_ratio(self) -> Tensor:
        """|x| / |y|, shape (n,); NaN where |y| is 0."""
        return torch.where(self.y_l2 > 0, self.x_l2 / self.y_l2, torch.nan)

    @property
    def global_cosine(self) -> Tensor:
        """Cosine of the concatenated lists, from summed dots, shape (); NaN where a norm is 0."""
        x, y = _norm_of(self.x_l2), _norm_of(self.y_l2)
        parts = (self.x_l2 / x) * (self.y_l2 / y) * torch.nan_to_num(self.cosine)
        total = parts.sum().clamp(-1, 1)
        defined = (x > 0) & (y > 0) & torch.isfinite(x) & torch.isfinite(y)
        return torch.where(defined, total, torch.nan)


def pair_moments(xs: Tensor | Sequence[Tensor], ys: Tensor | Sequence[Tensor]) -> PairMoments:
    """Inner products of paired tensors from one read of both; results stay on the device.

    xs, ys: tensors or lists of n tensors, pairwise of one shape, any strides; fp32, bf16, fp16. Returns (n,) fields.
    Raises TypeError for other dtypes, ValueError for unequal lengths, shapes or devices.
    """
    x, y = as_list(xs, "pair_moments"), as_list(ys, "pair_moments")
    same_shapes(x, y, "pair_moments")
    with torch.no_grad():
        return PairMoments(*op(x, y))


def reference(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """(8, n) fp32: dot, xx, yy, dd, |x|, |y|, |x - y|, cosine, a pair at a time."""
    rows = [_one_pair(*_same_type(x.reshape(-1), y.reshape(-1))) for x, y in zip(xs, ys, strict=True)]
    return torch.stack(rows, dim=1).float() if rows else _fake(xs, ys)


def _same_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64 where one is, else both in fp32."""
    wide = torch.float64 in (x.dtype, y.dtype)
    return (x.double(), y.double()) if wide else (x.float(), y.float())


def _one_pair(
    x: Tensor,  # (numel,) fp32 or fp64
    y: Tensor,  # (numel,) the same
) -> Tensor:
    if x.numel() == 0:
        return torch.cat([x.new_zeros(7), x.new_full((1,), torch.nan)])
    scale_x, scale_y = power_of_two(x.abs().amax()), power_of_two(y.abs().amax())
    scale = torch.maximum(scale_x, scale_y)
    sx, sy, d = x / scale_x, y / scale_y, x / scale - y / scale
    scale_d = power_of_two(d.abs().amax())
    sd = d / scale_d
    dot, nx, ny, nd = (sx * sy).sum(), sx.norm(), sy.norm(), sd.norm()
    cosine = torch.where((nx > 0) & (ny > 0), (dot / nx / ny).clamp(-1, 1), torch.nan)
    x_l2, y_l2, d_l2 = nx * scale_x, ny * scale_y, nd * scale_d * scale
    row = torch.stack([dot * scale_x * scale_y, x_l2**2, y_l2**2, d_l2**2, x_l2, y_l2, d_l2, cosine])
    finite = torch.isfinite(x).all() & torch.isfinite(y).all()
    return torch.where(finite, row, torch.nan)


def native(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """The C++ row: the same results, written by `fastmon_C::pair_moments`."""
    out = _fake(xs, ys)
    pairs = [as_same_range(x, y) for x, y in zip(xs, ys, strict=True)]
    torch.ops.fastmon_C.pair_moments([x for x, _ in pairs], [y for _, y in pairs], out)
    return out


def on_device(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """The Triton row; its kernels read both sides in memory order, so they are brought into one order first."""
    launch: Row = resolve("fastmon.kernels.pair_moments:launch")
    pairs = [as_same_range(x, y) for x, y in zip(xs, ys, strict=True)]
    return launch([x for x, _ in pairs], [y for _, y in pairs])


def _fake(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    return torch.empty(8, len(xs), dtype=torch.float32, device=xs[0].device if xs else None)


def traffic(xs: list[Tensor], ys: list[Tensor]) -> Traffic:
    """One read of both lists."""
    return Traffic(element_bytes(xs) + element_bytes(ys), 9 * sum(x.numel() for x in xs))


def _one_dtype(facts: Facts) -> str | None:
    return None if len(facts.dtypes) <= 1 else "pairs of mixed dtypes go to the eager row"


_WHY = "fp32 products summed in chunks, chunks added in fp64; a dot that cancels is bounded by |x||y|"
op = Op(
    "pair_moments(Tensor[] xs, Tensor[] ys) -> Tensor",
    reference=reference,
    fake=_fake,
    traffic=traffic,
    tolerance={dtype: Tolerance(2e-5, 1e-6, _WHY) for dtype in FLOATS},
    impls=(
        Impl(
            "triton",
            on_device,
            device="cuda",
            dtypes=FLOATS,
            needs="triton",
            fits=_one_dtype,
        ),
        Impl("cpp", native, device="cpu", dtypes=FLOATS, needs="extension", fits=_one_dtype),
        Impl("compile", reference, compiled=True),
        Impl("eager", reference),
    ),
)
