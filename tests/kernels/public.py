"""The public functions with every op forced onto its Triton row: what a user's tensors look like, against fp64."""

import pytest
import torch
from torch import Tensor

from fastmon import ops
from fastmon.backend import OPS, force
from tests import cases
from tests.compare import assert_close, assert_equal, assert_unwritten, bits
from tests.kernels.conftest import DEVICE, NAN

DTYPES = [torch.float32, torch.bfloat16]


def moved(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same on the device, strides and alignment kept."""
    if DEVICE == "cpu":
        return named
    found = {}
    for name, x in named.items():
        base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE)
        found[name] = base.as_strided(x.shape, x.stride(), x.storage_offset())
    return found


def test_every_op_with_kernels_has_a_triton_row():
    rows = {name for name, op in OPS.items() if any(impl.name == "triton" for impl in op.impls)}
    assert rows == set(OPS) - {"spectral_state"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(dtype):
    named = moved(cases.tensors(dtype))
    xs = list(named.values())
    before = bits(xs)
    with force("triton"):
        got = ops.moments(xs, order=4)
    assert_unwritten(xs, before)
    for i, (name, x) in enumerate(named.items()):
        a = x.double().cpu().flatten()
        d = a - a.mean() if a.numel() else a
        assert got.numel[i] == a.numel(), name
        assert got.zeros[i] == (a == 0).sum(), name
        assert_close(got.l2[i].cpu(), a.norm(), 1e-5, what=name)
        assert_close(got.m2[i].cpu(), d.square().sum(), 1e-5, 1e-6, what=name)
        assert_close(got.m4[i].cpu(), d.pow(4).sum(), 1e-4, 1e-6, what=name)
        if a.numel():
            assert_close(got.mean[i].cpu(), a.mean(), 1e-5, 1e-6, what=name)
            assert got.min[i] == a.min(), name
            assert got.max[i] == a.max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["alike", "dense other"])
def test_pair_moments(dtype, order):
    """Element i of x meets element i of y, whatever order in memory the two have."""
    named = moved(cases.tensors(dtype))
    xs = list(named.values())
    ys = [(x + torch.randn_like(x)) for x in xs]  # randn_like keeps the order of a dense tensor
    if order == "dense other":
        ys = [y.contiguous() for y in ys]
    before = bits(xs + ys)
    with force("triton"):
        got = ops.pair_moments(xs, ys)
    assert_unwritten(xs + ys, before)
    for i, (name, x) in enumerate(named.items()):
        a, b = x.double().cpu().flatten(), ys[i].double().cpu().flatten()
        norms = a.norm(), b.norm(), (a - b).norm()
        assert_close(got.dot[i].cpu(), a @ b, 0, 2e-5 * float(norms[0] * norms[1]) + 1e-6, what=name)
        for field, want in zip((got.x_l2, got.y_l2, got.d_l2), norms, strict=True):
            assert_close(field[i].cpu(), want, 1e-5, what=name)
        cosine = (a @ b) / norms[0] / norms[1] if norms[0] > 0 and norms[1] > 0 else torch.tensor(NAN)
        assert_close(got.cosine[i].cpu(), cosine, 0, 2e-5, what=name)


def test_spectral_norm_and_lanczos():
    named = cases.matrices(torch.float32)
    half = {f"bf16 {name}": w for name, w in cases.matrices(torch.bfloat16).items() if w.shape[0] < 48}
    named |= half | {"unaligned": cases.gaussian(20 * 37 + 1)[1:].view(20, 37)}
    named = moved(named)
    ws = list(named.values())
    before = bits(ws)
    with force("triton"):
        warm = ops.spectral_norm(ws, iters=1)
        cold = ops.lanczos_norm(ws, iters=8)
    assert_unwritten(ws, before)
    for i, (name, w) in enumerate(named.items()):
        a = w.double().cpu()
        s = torch.linalg.svdvals(a)
        for got in (warm, cold):
            assert_close(got.fro[i].cpu(), a.norm(), 1e-5, what=name)
            assert got.sigma[i] <= s[0] * (1 + 1e-5), name
            near = (s - got.sigma[i].double().cpu()).abs().min()
            assert near <= got.residual[i].item() / 2**0.5 + 2e-6 * s[0], name
        assert_close(cold.sigma[i].cpu(), s[0], 5e-2, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_newton_schulz(dtype):
    named = moved(cases.matrices(dtype) | {"empty": torch.empty(0, 5, dtype=dtype)})
    xs = list(named.values())
    before = bits(xs)
    with force("triton"):
        got = ops.newton_schulz(xs, compute_dtype=torch.float32, out_dtype=torch.float32, steps=3)
        observed = ops.newton_schulz(
            xs, compute_dtype=torch.float32, out_dtype=torch.float32, steps=3, return_moments=True
        )
    assert_unwritten(xs, before)
    a, b, c = 3.4445, -4.7750, 2.0315
    for i, (name, x) in enumerate(named.items()):
        assert_equal(observed.factor[i], got[i], f"{name}: observing changes nothing")
        if not x.numel():
            continue
        u, s, vh = torch.linalg.svd(x.double().cpu(), full_matrices=False)
        assert_close(observed.fro[i].cpu(), s.norm(), 1e-5, what=name)
        assert_close(observed.sigma[i].cpu(), s[0], 5e-3, what=name)
        s = s / s.norm()
        for _ in range(3):
            s = a * s + b * s**3 + c * s**5
        assert_close(got[i].cpu(), (u * s) @ vh, 0, 1e-4, what=name)


def every_result(xs: list[Tensor]) -> list[Tensor]:
    """What every op gives for these matrices, and for an empty list."""
    polar = ops.newton_schulz(xs, steps=2, return_moments=True)
    found = [*ops.moments(xs, order=4), *ops.pair_moments(xs[:1], xs[1:2]), *ops.spectral_norm(xs)]
    found += [*ops.lanczos_norm(xs, iters=3), *ops.newton_schulz(xs, steps=2), *polar.factor, *polar[1:]]
    return [*found, *ops.spectral_norm([]), *ops.lanczos_norm([])]


def test_results_do_not_depend_on_the_default_dtype():
    xs = [torch.randn(20, 33), torch.randn(20, 33), torch.randn(40, 9).bfloat16()]
    xs = [x.to(DEVICE) for x in xs]
    with force("triton"):
        want = every_result(xs)
        torch.set_default_dtype(torch.float64)
        try:
            got = every_result(xs)
        finally:
            torch.set_default_dtype(torch.float32)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_equal(one, other, f"result {i}")
