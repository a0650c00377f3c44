"""spectral_norm and lanczos_norm: the mathematics, on known spectra, under drift, and after bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmon import backend, ops
from fastmon.backend import OPS, Facts, force
from fastmon.ops.spectral import Spectral
from fastmon.ops.spectral_state import HEADER, pad16
from fastmon.ops.tridiagonal import jacobi, largest_eigenpair
from tests import cases
from tests.compare import assert_close, assert_equal, assert_unwritten, bits

FP32 = Facts("cpu", frozenset({torch.float32}))
ROWS = [impl.name for impl, reason in backend.explain(OPS["spectral_norm"], FP32) if reason is None]


def exact(ws):
    return torch.stack([torch.linalg.svdvals(w.double())[0] for w in ws])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_cold_lanczos_is_within_one_percent(row, dtype):
    named = cases.matrices(dtype)
    ws = list(named.values())
    before = bits(ws)
    with force(row):
        got = ops.lanczos_norm(ws)
    assert_unwritten(ws, before)
    for name, sigma, want, fro, w in zip(named, got.sigma, exact(ws), got.fro, ws, strict=True):
        assert_close(sigma, want, 1e-2, what=name)
        assert sigma.item() <= want.item() * (1 + 1e-4), name
        assert_close(fro, w.double().norm(), 1e-4, what=name)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", list(cases.spectra(4)))
def test_cold_lanczos_on_named_spectra(row, name):
    values = cases.spectra(150)[name]
    w = cases.with_spectrum(300, 180, values).float()
    with force(row):
        got = ops.lanczos_norm([w])
    assert_close(got.sigma[0], values[0], 1e-2, what=name)
    assert (values - got.sigma.double()).abs().min() <= got.residual[0] / 2**0.5 + 1e-5 * got.sigma[0], name


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_the_certificate_holds_at_every_iteration(row, block):
    """Some singular value lies within residual / sqrt(2), however far the iteration still is."""
    spectra = [cases.with_spectrum(60, 40, s).float() for s in cases.spectra(40).values()]
    truth = list(cases.spectra(40).values())
    with force(row):
        state = ops.spectral_state(spectra, block=block)
        for _ in range(12):
            got = ops.spectral_norm(spectra, state=state)
            for i, values in enumerate(truth):
                distance = (values - got.sigma[i].double()).abs().min()
                assert distance <= got.residual[i] / 2**0.5 + 1e-5 * values[0]
                assert got.sigma[i] <= values[0] * (1 + 1e-5)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("block", [1, 4])
def test_iterations_converge_and_iters_equals_calls(row, block):
    ws = [cases.gaussian(64, 48), cases.gaussian(20, 90)]
    with force(row):
        one, many = ops.spectral_state(ws, block=block), ops.spectral_state(ws, block=block)
        for _ in range(300):
            last = ops.spectral_norm(ws, state=one)
        assert_close(last.sigma, exact(ws), 1e-3)
        together = ops.spectral_norm(ws, state=many, iters=300)
    assert_close(together.sigma, last.sigma, 1e-4)
    assert_close(last.stable_rank, torch.stack([w.double().norm() for w in ws]) ** 2 / exact(ws) ** 2, 3e-3)


@pytest.mark.parametrize("row", ROWS)
def test_warm_state_tracks_drifting_weights(row):
    """Muon-like drift: every step adds a random orthogonal update of 1% of sigma."""
    w = cases.gaussian(256, 96)
    worst = 0.0
    with force(row):
        state = ops.spectral_state([w])
        ops.spectral_norm([w], state=state, iters=200)
        for _ in range(30):
            u, _, v = torch.linalg.svd(torch.randn_like(w), full_matrices=False)
            w = w + 0.01 * exact([w]).float() * (u @ v)
            worst = max(worst, abs(ops.spectral_norm([w], state=state).sigma.item() / exact([w]).item() - 1))
    assert worst <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_warm_tracking_on_a_full_size_matrix(dtype):
    """3072 x 768 Gaussian, updates of 1% of sigma a step: one iteration a step stays within 0.5%."""
    w = cases.gaussian(3072, 768)
    state = ops.spectral_state([w])
    ops.spectral_norm([w], state=state, iters=200)
    worst = 0.0
    for _ in range(30):
        update = ops.newton_schulz(torch.randn_like(w))
        w = w + 0.01 * exact([w]).float() * update
        got = ops.spectral_norm([w.to(dtype)], state=state)
        worst = max(worst, abs(got.sigma.item() / exact([w]).item() - 1))
    assert worst <= 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072), (2304, 768), (768, 768)], ids=str)
def test_cold_lanczos_on_full_size_gaussians(shape):
    for seed in range(5):
        w = cases.gaussian(*shape)
        assert_close(ops.lanczos_norm([w], seed=seed).sigma, exact([w]), 1e-2)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e12, 1e28])
def test_any_scale(row, scale):
    w = cases.gaussian(40, 30, scale=scale)
    with force(row):
        cold = ops.lanczos_norm([w])
        warm = ops.spectral_norm([w], iters=200)
        state = ops.spectral_state([cases.gaussian(40, 30)])  # a state that expects weights near one
        ops.spectral_norm([w], state=state, iters=1)
        moved = ops.spectral_norm([w], state=state, iters=200)
    for got in (cold, warm, moved):
        assert_close(got.sigma, exact([w]), 1e-2)
        assert_close(got.fro, w.double().norm()[None], 1e-4)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("block", [1, 3])
def test_nan_then_clean(row, block):
    ws = [cases.gaussian(30, 20), cases.gaussian(30, 20)]
    broken = [ws[0].clone(), ws[1]]
    broken[0][3, 4] = torch.nan
    with force(row):
        state = ops.spectral_state(ws, block=block)
        ops.spectral_norm(ws, state=state, iters=200)
        kept = state[: HEADER + block * pad16(20)].clone()
        bad = ops.spectral_norm(broken, state=state)
        assert torch.isnan(bad.sigma[0])
        assert torch.isfinite(bad.sigma[1])
        assert_equal(state[: kept.numel()], kept)
        assert_close(ops.spectral_norm(ws, state=state).sigma, exact(ws), 1e-3)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("block", [1, 3])
def test_zero_then_trained(row, block):
    """A zero-initialised projection gives 0, and the same state follows it when it moves."""
    w = torch.zeros(30, 20)
    with force(row):
        state = ops.spectral_state([w], block=block)
        zero = ops.spectral_norm([w], state=state)
        assert [x.item() for x in zero] == [0, 0, 0]
        assert ops.lanczos_norm([w]).sigma.item() == 0
        trained = cases.gaussian(30, 20) * 1e-3
        assert_close(ops.spectral_norm([trained], state=state, iters=300).sigma, exact([trained]), 1e-3)


@pytest.mark.parametrize("row", ROWS)
def test_a_vector_that_misses_the_matrix_certifies_nothing(row):
    """v orthogonal to every row: sigma is 0, and the residual says that it may be as large as |W|_F."""
    w = torch.zeros(3, 4)
    w[:, 1] = 2.0
    with force(row):
        state = ops.spectral_state([w])
        state[HEADER : HEADER + 4] = torch.tensor([1.0, 0, 0, 0])
        got = ops.spectral_norm([w], state=state)
        state[HEADER : HEADER + 4] = torch.tensor([1.0, 0, 0, 0])
        cold = Spectral(*OPS["lanczos"]([w], state, 3))
    for result in (got, cold):
        assert result.sigma.item() == 0
        assert_close(result.residual / 2**0.5, result.fro, 1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_autocast_does_not_reach_the_ops(row):
    ws = [cases.gaussian(64, 96) for _ in range(5)]
    with force(row):
        want = ops.lanczos_norm(ws)
        with torch.autocast("cpu", torch.bfloat16):
            got = ops.lanczos_norm(ws)
    for a, b in zip(got, want, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("row", ROWS)
def test_a_list_equals_a_loop_and_calls_repeat_bitwise(row):
    ws = [*cases.matrices(torch.float32).values(), torch.zeros(3, 4), torch.empty(0, 4), torch.empty(4, 0)]
    with force(row):
        together, again = ops.lanczos_norm(ws), ops.lanczos_norm(ws)
        warm = ops.spectral_norm(ws, iters=5)
        for i, w in enumerate(ws):
            for a, b, c, d, e in zip(
                together, again, ops.lanczos_norm(w), warm, ops.spectral_norm(w, iters=5), strict=True
            ):
                assert_equal(a[i], b[i])
                assert_equal(a[i], c[0])
                assert_equal(d[i], e[0])
    assert together.sigma[-3:].tolist() == [0, 0, 0]


def test_stacks_and_filters_become_matrices():
    stack, conv = cases.gaussian(3, 8, 5), cases.gaussian(6, 4, 3, 3)
    got = ops.lanczos_norm([stack, conv])
    assert_close(got.sigma, exact([*stack, conv.reshape(6, 36)]), 1e-3)


def test_orthogonal_invariance_and_homogeneity():
    w = cases.gaussian(50, 30)
    q = torch.linalg.qr(torch.randn(50, 50)).Q
    sigma = ops.spectral_norm([w, q @ w, -4 * w], iters=3).sigma
    assert_close(sigma[1], sigma[0], 1e-4)
    assert sigma[2] == 4 * sigma[0]


def test_the_two_halves_equal_the_whole():
    ws = [cases.gaussian(12, 20), cases.gaussian(31, 7)]
    for block in (1, 2):
        whole, halves = ops.spectral_state(ws, block=block), ops.spectral_state(ws, block=block)
        for _ in range(4):
            want = ops.spectral_norm(ws, state=whole)
            z, yy, fro2 = OPS["gram_matvec"](ws, halves)
            got = OPS["spectral_finish"](z, yy, fro2, halves, [20, 7])
        assert_close(got[0], want.sigma, 1e-5)
        assert_close(got[1], want.residual, 1e-3, 1e-5)


def test_row_shards_add_up():
    """The half results of row shards sum to those of the whole matrix: what sharded ranks all-reduce."""
    w = cases.gaussian(24, 10)
    state = ops.spectral_state([w])
    whole = OPS["gram_matvec"]([w], state)
    parts = [OPS["gram_matvec"]([p], state) for p in w.chunk(3)]
    for total, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert_close(sum(pieces), total, 1e-5, 1e-6)


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    ops.lanczos_norm([torch.ones(4, 4)])
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 2**31 - 1), power=st.integers(-25, 25))
def test_bounds_hold_for_any_matrix(m, n, seed, power):
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    got = ops.lanczos_norm([w], seed=seed)
    top = exact([w])[0]
    assert 0.98 * top <= got.sigma.item() <= top * (1 + 1e-4)
    assert got.sigma.item() <= got.fro.item() * (1 + 1e-5)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 8), seed=st.integers(0, 2**31 - 1))
def test_jacobi_diagonalises(b, seed):
    a = torch.randn(3, b, 2 * b, generator=torch.Generator().manual_seed(seed))
    g = a @ a.mT
    values, q = jacobi(g)
    want = torch.linalg.eigvalsh(g.double()).flip(-1)
    assert_close(values, want, 1e-4, 1e-4 * float(want.max()))
    assert_close(q @ torch.diag_embed(values) @ q.mT, g, 1e-4, 1e-4 * float(want.max()))


def test_largest_eigenpair_of_a_tridiagonal():
    diagonal, beside = torch.rand(20) + 1, torch.rand(19) * 0.3
    t = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    value, q = largest_eigenpair(diagonal, beside)
    assert_close(value, torch.linalg.eigvalsh(t.double())[-1], 1e-5)
    assert_close(t @ q, value * q, 1e-3, 1e-3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.lanczos_norm(torch.ones(3)), ValueError, "wants matrices"),
        (lambda: ops.spectral_norm([torch.ones(2, 2), torch.tensor(1.0)]), ValueError, r"position 1"),
        (lambda: ops.spectral_norm(torch.ones(2, 2, dtype=torch.int32)), TypeError, "floating-point"),
        (lambda: ops.spectral_norm(torch.ones(2, 2), state=torch.zeros(5)), ValueError, "does not belong"),
        (lambda: ops.spectral_norm(torch.ones(2, 2), state=torch.zeros(32).double()), ValueError, "float32"),
        (lambda: ops.spectral_norm(torch.ones(2, 2), iters=0), ValueError, "at least 1"),
        (lambda: ops.spectral_norm(torch.ones(2, 2), iters=1.5), ValueError, "an integer"),
        (
            lambda: ops.spectral_norm(torch.ones(2, 2), state=torch.zeros(16 + 320)),
            ValueError,
            "does not belong",
        ),
        (lambda: ops.lanczos_norm(torch.ones(2, 2), iters=1), ValueError, "at least 2"),
        (lambda: ops.spectral_state(torch.ones(2, 2), block=9), ValueError, "1 to 8"),
    ],
)
def test_bad_input_says_what_came(call, error, words):
    with pytest.raises(error, match=words):
        call()
