"""newton_schulz: fp64 inputs, torch's default dtype, and autocast around it."""

import importlib

import pytest
import torch

from fastmon import backend
from fastmon.backend import OPS, Facts, force
from fastmon.ops import newton_schulz
from tests import cases
from tests.compare import assert_close, assert_equal

module = importlib.import_module("fastmon.ops.newton_schulz")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
ROWS = [
    r.name for r, why in backend.explain(OPS["newton_schulz"], Facts("cpu", frozenset({FP32}))) if not why
]


def exact(x, method="ns5"):
    """The polynomials on the singular values in fp64, the matrix scaled to 1 first."""
    known = module.METHODS[method]
    x = x.double() / x.double().abs().max()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm() * known.margin)
    for a, b, c in known.schedule(known.steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vh


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("scale", [1e-300, 1e-100, 1e100, 1e300])
def test_fp64_keeps_its_range(row, scale):
    x = cases.gaussian(9, 14, dtype=FP64)
    with force(row):
        got = newton_schulz(x * scale, compute_dtype=FP64)
        rounded = newton_schulz(x * scale, compute_dtype=FP32)
        corner = newton_schulz(
            torch.diag(torch.tensor([scale, scale * 1e-9], dtype=FP64)), compute_dtype=FP64
        )
    assert got.dtype == FP64
    assert_close(got, exact(x), 0, 1e-12)
    assert_close(rounded, exact(x), 0, 1e-5)
    assert_close(corner, exact(torch.diag(torch.tensor([1, 1e-9], dtype=FP64))), 1e-9, 1e-12)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("first", [0, 1])
def test_fp64_and_fp32_of_one_shape_do_not_share_a_batch(row, first):
    wide, narrow = cases.gaussian(8, 12, dtype=FP64) * 1e200, cases.gaussian(8, 12)
    xs = [wide, narrow] if first == 0 else [narrow, wide]
    with force(row):
        got = newton_schulz(xs, compute_dtype=FP64, return_moments=True)
        alone = [newton_schulz(x, compute_dtype=FP64) for x in xs]
    for x, y, other in zip(xs, got.factor, alone, strict=True):
        assert y.dtype == x.dtype
        assert_equal(y, other)
        assert_close(y, exact(x), 0, 1e-6)
    assert_close(got.fro[1 - first], narrow.double().norm(), 1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_results_do_not_depend_on_the_default_dtype(row):
    xs = [cases.gaussian(8, 12), cases.gaussian(12, 8, dtype=BF16), torch.empty(0, 3, dtype=FP32)]
    arguments = (xs, "ns5", 5, FP32, None)
    with force(row):
        want = newton_schulz(xs, return_moments=True)
        none = newton_schulz([], return_moments=True)
        torch.set_default_dtype(FP64)
        try:
            got = newton_schulz(xs, return_moments=True)
            plain = newton_schulz(xs)
            still = newton_schulz([], return_moments=True)
            torch.library.opcheck(module.moments_op.overload, arguments)
        finally:
            torch.set_default_dtype(FP32)
    for one, same, other in zip(got.factor, plain, want.factor, strict=True):
        assert_equal(one, other)
        assert_equal(same, other)
    for one, other in zip((*got[1:], *still[1:]), (*want[1:], *none[1:]), strict=True):
        assert_equal(one, other)


def test_autocast_changes_nothing():
    """A Method of one's own does not pass the backend, which switches autocast off for the named ones."""
    xs = [cases.gaussian(20, 30), cases.gaussian(30, 20)]
    mine = module.Method(((1.875, -1.25, 0.375),), steps=12)
    for method in (mine, "ns3"):
        want = newton_schulz(xs, method=method, compute_dtype=FP32, return_moments=True)
        with torch.autocast("cpu", BF16):
            got = newton_schulz(xs, method=method, compute_dtype=FP32, return_moments=True)
            assert torch.is_autocast_enabled("cpu")
        for one, other in zip((*got.factor, *got[1:]), (*want.factor, *want[1:]), strict=True):
            assert_equal(one, other)


def test_a_method_of_ones_own_is_the_reference_whatever_is_forced():
    x = cases.gaussian(64, 256)
    known = module.METHODS["polar-express"]
    mine = module.Method(known.coefficients, known.steps, known.margin)
    with force("eager"):
        want = newton_schulz(x, method="polar-express")
    for row in ROWS:
        with force(row):
            assert_equal(newton_schulz(x, method=mine), want, row)


def test_stacks_of_empty_matrices():
    got = newton_schulz([torch.empty(3, 0, 4), torch.empty(0, 2, 2)], return_moments=True)
    assert [tuple(y.shape) for y in got.factor] == [(3, 0, 4), (0, 2, 2)]
    assert got.fro.tolist() == [0, 0, 0]
