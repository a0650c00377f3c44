"""The assertion vocabulary: messages append what was compared, never replace it."""

import torch
from torch import Tensor


def assert_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Bitwise, NaN equal to NaN; shapes and dtypes too."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 0.0, what: str = "") -> None:
    """Within atol + rtol |expected|; compared in fp64; NaN must meet NaN."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of the raw bytes, to prove that inputs are not written."""
    return [t.contiguous().reshape(-1).view(torch.uint8).clone() for t in tensors]


def assert_unwritten(tensors: list[Tensor], before: list[Tensor]) -> None:
    for i, (now, then) in enumerate(zip(bits(tensors), before, strict=True)):
        assert torch.equal(now, then), f"input {i} was written"
