"""Hostile inputs that every op must take: shapes, strides, values. One place, used by all op tests."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian(*shape: int, dtype=torch.float32, scale=1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    """Any shape and stride; finite."""
    return {
        "one": gaussian(1, dtype=dtype),
        "empty": torch.empty(0, dtype=dtype),
        "empty_matrix": torch.empty(0, 5, dtype=dtype),
        "odd": gaussian(37, dtype=dtype),
        "matrix": gaussian(33, 65, dtype=dtype),
        "long": gaussian(40_001, dtype=dtype),
        "zeros": torch.zeros(100, dtype=dtype),
        "some_zeros": gaussian(64, 8, dtype=dtype).relu(),
        "transposed": gaussian(17, 40, dtype=dtype).T,
        "strided": gaussian(50, 20, dtype=dtype)[::2, ::3],
        "expanded": gaussian(1, 30, dtype=dtype).expand(9, 30),
        "unaligned": gaussian(1001, dtype=dtype)[1:],
        "stack": gaussian(3, 8, 5, dtype=dtype),
        "scalar": gaussian(1, dtype=dtype)[0],
        "shifted": gaussian(5000, dtype=dtype) + 100,
    }


def matrices(dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices for the spectral ops; finite, not zero."""
    return {
        "square": gaussian(48, 48, dtype=dtype),
        "tall": gaussian(200, 30, dtype=dtype),
        "wide": gaussian(30, 200, dtype=dtype),
        "row": gaussian(1, 19, dtype=dtype),
        "column": gaussian(19, 1, dtype=dtype),
        "one": gaussian(1, 1, dtype=dtype),
        "four": gaussian(4, 33, dtype=dtype),
        "rank_one": (gaussian(40, 1) @ gaussian(1, 24)).to(dtype),
        "deficient": (gaussian(40, 3) @ gaussian(3, 50)).to(dtype),
        "transposed": gaussian(60, 20, dtype=dtype).T,
        "sliced": gaussian(40, 60, dtype=dtype)[:, 7:50],
        "expanded": gaussian(1, 12, dtype=dtype).expand(7, 12),
    }


def with_spectrum(m: int, n: int, singular_values: Tensor) -> Tensor:
    """An (m, n) fp64 matrix U diag(s) V^T with Haar-like U, V."""
    k = singular_values.numel()
    u = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64)).Q
    return (u * singular_values.double()) @ v.mT


def spectra(k: int) -> dict[str, Tensor]:
    """Named singular-value profiles, largest first."""
    i = torch.arange(1, k + 1, dtype=torch.float64)
    return {
        "power_0.2": i**-0.2,
        "power_0.5": i**-0.5,
        "power_1": i**-1,
        "clustered_top": torch.where(i <= 5, 1 - 1e-3 * (i - 1), 0.5 / i),
        "one_outlier": torch.where(i == 1, 10.0, 1.0),
        "orthogonal": torch.ones(k, dtype=torch.float64),
        "hilbert_like": torch.exp(-1.5 * (i - 1)),
    }
