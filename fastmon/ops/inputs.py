"""What the public functions accept: one tensor or a list, floating, on one device. Checked once, here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_list(xs: Tensor | Sequence[Tensor], op: str) -> list[Tensor]:
    """The inputs as a list of detached tensors; TypeError or ValueError says what came and what was wanted."""
    tensors = [xs] if isinstance(xs, Tensor) else list(xs)
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op} wants tensors, got {type(x).__name__} at position {i}")
        if not x.is_floating_point():
            raise TypeError(f"{op} wants floating-point tensors, got {x.dtype} at position {i}")
        if x.layout != torch.strided:
            raise TypeError(f"{op} wants dense tensors, got layout {x.layout} at position {i}")
        if x.device != tensors[0].device:
            raise ValueError(f"{op} wants all tensors on one device, got {tensors[0].device} and {x.device}")
    return [x.detach() for x in tensors]


def as_matrices(ws: Tensor | Sequence[Tensor], op: str) -> list[Tensor]:
    """The inputs as a list of 2-D views: a stack (E, m, n) gives E matrices, a filter (o, i, h, w) gives (o, i*h*w).

    ValueError for vectors and scalars.
    """
    matrices: list[Tensor] = []
    for i, w in enumerate(as_list(ws, op)):
        if w.ndim < 2:
            raise ValueError(
                f"{op} wants matrices (at least 2 dimensions), got shape {tuple(w.shape)} at position {i}"
            )
        matrices += w.unbind(0) if w.ndim == 3 else [w.flatten(1)]
    return matrices


def as_one_range(x: Tensor) -> Tensor:
    """`x`, or where its elements do not fill one range of memory, a contiguous copy."""
    return x if x.is_contiguous() or _fills_one_range(x) else x.contiguous()


def as_same_range(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The pair in one memory order, so that element i of the range of x meets element i of the range of y."""
    if x.is_contiguous() and y.is_contiguous():
        return x, y
    if x.stride() == y.stride() and _fills_one_range(x):
        return x, y
    return x.contiguous(), y.contiguous()


def _fills_one_range(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_shapes(xs: Sequence[Tensor], ys: Sequence[Tensor], op: str) -> None:
    """ValueError unless both lists have the same length, shapes and device."""
    if len(xs) != len(ys):
        raise ValueError(f"{op} wants two lists of one length, got {len(xs)} and {len(ys)}")
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if x.shape != y.shape:
            raise ValueError(
                f"{op} wants pairs of one shape, got {tuple(x.shape)} and {tuple(y.shape)} at {i}"
            )
    if xs and xs[0].device != ys[0].device:
        raise ValueError(f"{op} wants both lists on one device, got {xs[0].device} and {ys[0].device}")


def element_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all elements, each counted once."""
    return sum(t.numel() * t.element_size() for t in tensors)
