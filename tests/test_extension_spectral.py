"""The raw spectral launchers of fastmon_C against fp64 references."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmon import backend
from tests.launchers import (
    DTYPES,
    SHAPES,
    assert_certified,
    fresh_state,
    lanczos,
    matrix_of,
    padded,
    segments,
    spectral_norm,
)

missing = backend.extension()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))

# -- spectral --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("exponent", [0, 7, -9])
def test_gram_matvec_matches_fp64(dtype, block, exponent):
    ws = [torch.randn(s).to(dtype) for s in SHAPES] + [torch.empty(0, 4, dtype=dtype)]
    state = fresh_state(ws, block)
    for e, _ in segments(state, ws, block):
        e.fill_(exponent)
    sizes = [block * padded(w.shape[1]) for w in ws]
    z, yy, fro2 = (
        torch.full((sum(sizes),), -1.0),
        torch.full((len(ws), block, block), -1.0),
        torch.ones(len(ws)),
    )
    before = state.clone()
    torch.ops.fastmon_C.gram_matvec(ws, state, z, yy, fro2)
    assert torch.equal(state, before)
    for i, (w, (_, v), part) in enumerate(zip(ws, segments(state, ws, block), z.split(sizes), strict=True)):
        a = w.double() * 2.0**-exponent
        y = a @ v.double().T
        want = (a.T @ y).T
        got = part.view(block, -1).double()
        size = float(torch.linalg.matrix_norm(a) ** 2)
        torch.testing.assert_close(got[:, : w.shape[1]], want, rtol=0, atol=2e-6 * size)
        assert not got[:, w.shape[1] :].any()
        torch.testing.assert_close(yy[i].double(), y.T @ y, rtol=0, atol=2e-6 * size)
        torch.testing.assert_close(fro2[i].double(), (a**2).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-30, 1e30])
def test_one_iteration_is_the_formula(dtype, scale):
    ws = [(torch.randn(s) * scale).to(dtype) for s in SHAPES]
    ws = [w for w in ws if torch.isfinite(w).all() and w.abs().min() > 0]
    state = fresh_state(ws)
    vs = [v[0].double().clone() for _, v in segments(state, ws)]
    sigma, residual, fro = spectral_norm(ws, state)
    for i, (w, v, (e, moved)) in enumerate(zip(ws, vs, segments(state, ws), strict=True)):
        w = w.double()
        y = w @ v
        s0 = y.norm()
        z = w.T @ (y / s0)
        r = (z - s0 * v).norm() * ((3 * z.norm() - s0) / (z.norm() + s0)) ** 0.5
        torch.testing.assert_close(sigma[i], z.norm(), rtol=2e-6, atol=0)
        torch.testing.assert_close(residual[i], r, rtol=1e-5, atol=2e-6 * float(sigma[i]))
        torch.testing.assert_close(fro[i], w.norm(), rtol=1e-6, atol=0)
        torch.testing.assert_close(moved[0].double(), z / z.norm(), rtol=0, atol=2e-6)
        assert 1 <= float(w.norm() * 2.0 ** -float(e)) < 2


@pytest.mark.parametrize("block", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_iterations_find_the_largest_singular_value(dtype, block):
    ws = [torch.randn(s).to(dtype) for s in SHAPES]
    state = fresh_state(ws, block)
    sigma, residual, _ = spectral_norm(ws, state, 100)
    exact = torch.stack([torch.linalg.svdvals(w.double())[0] for w in ws])
    torch.testing.assert_close(sigma, exact, rtol=5e-3 if block == 1 else 1e-3, atol=0)
    assert (sigma <= exact * (1 + 1e-6)).all()
    assert_certified(ws, sigma, residual)
    for w, (_, rows) in zip(ws, segments(state, ws, block), strict=True):
        rank = min(block, w.shape[1])
        gram = (rows.double() @ rows.double().T)[:rank, :rank]
        torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)
        exact_rows = torch.linalg.svdvals(w.double())[0]
        torch.testing.assert_close((w.double() @ rows[0].double()).norm(), exact_rows, rtol=1e-2, atol=0)


@pytest.mark.parametrize("block", [1, 4])
def test_a_bad_step_poisons_nothing(block):
    w = torch.randn(50, 40)
    nan, inf = w.clone(), w.clone()
    nan[3, 5], inf[0, 0] = float("nan"), float("inf")
    ws = [w, w, w, w]
    state = fresh_state(ws, block)
    spectral_norm(ws, state, 3)
    before = state.clone()
    sigma, residual, fro = spectral_norm([w, nan, inf, torch.zeros_like(w)], state)
    assert torch.isnan(sigma[1:3]).all()
    assert torch.isnan(fro[1:3]).all()
    assert (sigma[3], residual[3], fro[3]) == (0, 0, 0)
    kept = before.view(4, -1)[1:]
    assert torch.equal(state.view(4, -1)[1:], kept)
    after = spectral_norm(ws, state, 30)
    exact = torch.linalg.svdvals(w.double())[0]
    torch.testing.assert_close(after[0], exact.expand(4), rtol=1e-3, atol=0)
    zero = fresh_state([w], block)
    spectral_norm([torch.zeros_like(w)], zero)
    torch.testing.assert_close(spectral_norm([w * 1e-25], zero, 100)[0, 0], exact * 1e-25, rtol=1e-3, atol=0)


SPECTRA = {
    "power 0.2": [(i + 1) ** -0.2 for i in range(60)],
    "power 0.5": [(i + 1) ** -0.5 for i in range(60)],
    "power 1": [1 / (i + 1) for i in range(60)],
    "one outlier": [100.0] + [1.0] * 59,
    "clustered top": [1.0, 0.999, 0.998] + [0.5] * 57,
    "orthogonal": [1.0] * 60,
    "rank 1": [1.3],
    "rank 3": [3.0, 2.0, 1.0],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_lanczos_finds_the_top_of_known_spectra(spectrum, scale):
    ws = [(matrix_of(SPECTRA[spectrum], *shape) * scale).float() for shape in ((60, 80), (200, 60), (60, 60))]
    state = fresh_state(ws)
    sigma, residual, fro = lanczos(ws, state)
    exact = torch.stack([torch.linalg.svdvals(w.double())[0] for w in ws])
    torch.testing.assert_close(sigma, exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(fro, torch.stack([w.double().norm() for w in ws]), rtol=1e-6, atol=0)
    assert_certified(ws, sigma, residual)
    for w, s, (e, v) in zip(ws, sigma, segments(state, ws), strict=True):
        torch.testing.assert_close((w.double() @ v[0].double()).norm(), s, rtol=1e-5, atol=0)
        torch.testing.assert_close(v[0].double().norm().item(), 1.0, rtol=0, atol=1e-6)
        assert 1 <= float(w.double().norm() * 2.0 ** -float(e)) < 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_lanczos_is_within_one_percent_on_gaussian_matrices(dtype):
    ws = [torch.randn(s).to(dtype) for s in (*SHAPES, (1500, 384))]
    sigma, residual, _ = lanczos(ws, fresh_state(ws))
    exact = torch.stack([torch.linalg.svdvals(w.double())[0] for w in ws])
    torch.testing.assert_close(sigma, exact, rtol=1e-2, atol=0)
    assert_certified(ws, sigma, residual)
    one, _, _ = lanczos(ws, fresh_state(ws), 1)  # one step: the Rayleigh quotient of the start vector
    starts = [v[0].double() for _, v in segments(fresh_state(ws), ws)]
    want = torch.stack([(w.double() @ v).norm() for w, v in zip(ws, starts, strict=True)])
    torch.testing.assert_close(one, want, rtol=2e-6, atol=0)


def test_lanczos_leaves_the_state_of_zero_and_non_finite_matrices():
    w = torch.randn(30, 20)
    bad = w.clone()
    bad[0, 0] = float("nan")
    ws = [torch.zeros(30, 20), bad, w, torch.empty(0, 20), torch.empty(5, 0)]
    state = fresh_state(ws)
    before = state.clone()
    sigma, residual, fro = lanczos(ws, state)
    assert sigma[[0, 3, 4]].tolist() == residual[[0, 3, 4]].tolist() == fro[[0, 3, 4]].tolist() == [0, 0, 0]
    assert torch.isnan(torch.stack([sigma[1], residual[1], fro[1]])).all()
    assert torch.equal(state[:96], before[:96])
    torch.testing.assert_close(sigma[2], torch.linalg.svdvals(w.double())[0], rtol=1e-5, atol=0)


FLUSHED = """
import sys, torch
from fastmon import backend
from tests.launchers import fresh_state, lanczos, segments, spectral_norm
assert backend.extension() is None
torch.set_num_threads(4)
torch.randn(600, 600) @ torch.randn(600, 600)  # the pool's threads start before, so that they flush nothing
ws = [torch.full((128, 128), 1e-40)] * 64
start = fresh_state(ws)
if not torch.set_flush_denormal(True):
    sys.exit(77)
for serial, call in [(True, lanczos), (True, spectral_norm)] + [(False, lanczos), (False, spectral_norm)] * 20:
    given = ws[:1] if serial else ws
    state = start[: start.numel() // 64 * len(given)].clone()
    out = call(given, state, 3)
    exponents = {float(e) for e, _ in segments(state, given)}
    assert exponents <= {0.0, -126.0}, (call, exponents)  # |W|_F = 1.28e-38 = 1.09 * 2^-126
    if serial:  # the calling thread alone, which sees a zero matrix
        assert not out.any(), (call, out)
        assert torch.equal(state, start[: state.numel()])
"""


def test_flushed_denormals_leave_the_exponent_in_range():
    """Threads that flush denormals may find |W|_F = 0 in the middle of a run; the state stays sane all the same."""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", FLUSHED], cwd=root, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this processor cannot flush denormals")
    assert done.returncode == 0, done.stderr
