"""Newton-Schulz against the polynomial applied to the singular values in fp64."""

import pytest
import torch
from torch import Tensor

from fastmon.kernels import newton_schulz
from fastmon.ops.newton_schulz import METHODS
from fastmon.ops.symmetric import largest_eigenvalue
from tests.compare import assert_close, assert_equal, assert_unwritten, bits
from tests.kernels.conftest import DEVICE, INF, NAN


def polar_in_fp64(x: Tensor, method: str, steps: int) -> Tensor:
    """The polynomial on the singular values: an independent route to the same factor."""
    keller, pe = (3.4445, -4.7750, 2.0315), newton_schulz.SCHEDULES["polar-express"][0]
    x = x.double()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / (x.norm() * (1.02 if method == "polar-express" else 1)) if x.norm() > 0 else s
    for step in range(steps):
        a, b, c = {"ns5": keller, "ns3": (1.5, -0.5, 0.0)}.get(method) or pe[min(step, 4)]
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def test_polar_express_coefficients():
    # Output 0.86-1.14 for inputs in [0.001, 1]: a mistyped digit leaves this band.
    s = torch.logspace(-3, 0, 2000, dtype=torch.float64)
    for a, b, c in newton_schulz.SCHEDULES["polar-express"][0]:
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.858
    assert s.max() < 1.142


def test_the_kernels_coefficients_are_the_ops():
    ours = {name: (known.coefficients, known.margin) for name, known in METHODS.items()}
    assert ours == newton_schulz.SCHEDULES


MATRICES = {
    "wide": torch.Size([40, 70]),
    "tall": torch.Size([70, 40]),
    "tall again": torch.Size([70, 40]),
    "stack": torch.Size([3, 9, 33]),
    "square": torch.Size([64, 64]),
    "row": torch.Size([1, 9]),
    "column": torch.Size([7, 1]),
    "one": torch.Size([1, 1]),
    "empty": torch.Size([0, 4]),
}


@pytest.mark.parametrize(("method", "steps"), [("ns5", 3), ("ns3", 3), ("polar-express", 6)])
def test_newton_schulz_in_fp32(method, steps):
    xs = [torch.randn(shape, device=DEVICE) for shape in MATRICES.values()]
    xs += [xs[0] * 1e-30, xs[1] * 1e30, xs[0].t(), xs[4].bfloat16(), torch.zeros(5, 6, device=DEVICE)]
    xs += [torch.full((4, 4), NAN, device=DEVICE), torch.full((4, 4), INF, device=DEVICE)]
    before = bits(xs)
    outs = newton_schulz.launch(xs, method, steps, torch.float32, torch.float32)
    for x, out in zip(xs, outs, strict=True):
        assert out.shape == x.shape
        assert out.is_contiguous()
        if not x.numel():
            continue
        for one, got in zip(x.reshape(-1, *x.shape[-2:]), out.reshape(-1, *x.shape[-2:]), strict=True):
            if one.isfinite().all():
                expected = polar_in_fp64(one.cpu(), method, steps)
                error = (got.double().cpu() - expected).norm()
                assert error <= 4e-5 * expected.norm(), f"{tuple(x.shape)} {error}"
            else:
                assert got.isnan().all()
    assert_unwritten(xs, before)


def test_newton_schulz_in_bf16_is_as_close_as_torch_and_rounds_to_nearest():
    # Without an output conversion in its last step, an fp32 result rounds to the bf16 one: the casts are right.
    x = [torch.randn(40, 72, device=DEVICE).bfloat16(), torch.randn(72, 40, device=DEVICE)]
    full = newton_schulz.launch(x, "ns5", 5, torch.bfloat16, torch.float32)
    half = newton_schulz.launch(x, "ns5", 5, torch.bfloat16, None)
    assert half[0].dtype == torch.bfloat16
    assert_equal(half[0], full[0].bfloat16(), "rounded to nearest")
    assert_equal(half[1], full[1], "fp32 out")
    for one, got in zip(x, full, strict=True):
        truth = polar_in_fp64(one.cpu(), "ns5", 5)
        y = one.float().cpu()
        y = (y / y.norm()).bfloat16()
        for _ in range(5):
            a = y @ y.mT
            y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
        error, torchs = (got.double().cpu() - truth).norm(), (y.double() - truth).norm()
        assert error <= 2 * torchs, f"{error} against torch's {torchs}"


def test_newton_schulz_batch_equals_loop_and_repeats_bit_for_bit():
    xs = [torch.randn(33, 40, device=DEVICE) for _ in range(3)]
    together = newton_schulz.launch(xs, "ns5", 2, torch.bfloat16, None)
    again = newton_schulz.launch(xs, "ns5", 2, torch.bfloat16, None)
    for i, x in enumerate(xs):
        assert_equal(together[i], again[i], "two calls")
        assert_equal(together[i], newton_schulz.launch([x], "ns5", 2, torch.bfloat16, None)[0], "alone")


@pytest.mark.parametrize(("method", "compute"), [("ns5", torch.bfloat16), ("polar-express", torch.float32)])
def test_moments_change_no_bit_of_the_factors(method, compute):
    xs = [torch.randn(shape, device=DEVICE) for shape in MATRICES.values()]
    xs += [xs[0] * 1e-30, xs[1] * 1e30, xs[3].mT, xs[4].bfloat16(), torch.zeros(5, 6, device=DEVICE)]
    xs += [torch.full((4, 4), NAN, device=DEVICE), torch.empty(2, 0, 3, device=DEVICE)]
    plain = newton_schulz.launch(xs, method, 2, compute, None)
    factors, moments = newton_schulz.run(xs, method, 2, compute, None, largest_eigenvalue)
    for want, got in zip(plain, factors, strict=True):
        assert_equal(got, want, "with moments")
    singles = [one.double().cpu() for x in xs for one in (x.flatten(0, -3) if x.ndim > 2 else [x])]
    fro, sigma = moments.cpu()
    assert moments.dtype == torch.float32
    assert len(singles) == moments.shape[1]
    assert_close(fro, torch.stack([one.norm() for one in singles]), rtol=1e-5)
    known = [one.isfinite().all() and one.numel() > 0 for one in singles]
    largest = [
        torch.linalg.svdvals(one)[0] if k else one.sum() for one, k in zip(singles, known, strict=True)
    ]
    assert_close(sigma, torch.stack(largest), rtol=1e-2 if compute == torch.bfloat16 else 5e-3)
