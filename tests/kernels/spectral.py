"""The Gram mat-vec, the warm iteration and Lanczos against fp64 torch."""

import torch
from torch import Tensor

from fastmon.kernels import spectral
from tests.compare import assert_close, assert_equal, assert_unwritten, bits
from tests.kernels.conftest import DEVICE, INF, NAN


def fresh_state(ws: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A spectral state with Gaussian unit vectors and the exponents of |W|_F; and the vectors, in fp64."""
    parts, starts = [], []
    for w in ws:
        n = w.shape[1]
        v = torch.randn(n, dtype=torch.float64)
        v = (v / v.norm()).float()
        fro = w.double().norm()
        header = torch.zeros(16)
        if fro > 0 and fro.isfinite():
            header[0] = fro.log2().floor()
        parts += [header, v, torch.zeros(-n % 16)]
        starts.append(v.double())
    return torch.cat(parts).to(DEVICE), starts


def vectors(state: Tensor, ws: list[Tensor]) -> list[tuple[float, Tensor, Tensor]]:
    """(exponent, vector, padding) of every matrix."""
    found, at = [], 0
    for w in ws:
        n = w.shape[1]
        width = (n + 15) // 16 * 16
        segment = state[at : at + 16 + width].double().cpu()
        assert not segment[1:16].any(), "the header holds the exponent and zeros"
        found.append((float(segment[0]), segment[16 : 16 + n], segment[16 + n :]))
        at += 16 + width
    return found


def hostile() -> list[Tensor]:
    return [
        torch.randn(40, 70),
        torch.randn(300, 48),
        torch.randn(37, 33).bfloat16(),
        torch.randn(24, 64).half(),
        torch.randn(30, 100) * 1e-30,
        torch.randn(33, 32) * 1e30,
        torch.randn(1, 9),
        torch.randn(9, 1),
        torch.randn(50, 20)[:, 3:19],
        torch.randn(20, 30).t(),
        torch.randn(5, 1100),
        torch.randn(21, 4112).bfloat16(),
        torch.randn(11, 4099),
    ]


def test_spectral_iteration():
    ws = [w.to(DEVICE) for w in hostile()]
    before = bits(ws)
    state, starts = fresh_state([w.cpu() for w in ws])
    twin = state.clone()
    sigma, residual, fro = spectral.spectral_norm(ws, state, 1)
    again = spectral.spectral_norm(ws, twin, 1)
    assert_equal(twin, state, "state of two calls")
    assert_equal(again[0], sigma, "two calls")
    for i, (w, v, (e, after, padding)) in enumerate(zip(ws, starts, vectors(state, ws), strict=True)):
        a = w.double().cpu()
        y = a @ v
        z = a.mT @ y / y.norm()
        expected = z.norm()
        slip = (z - y.norm() * v).norm()
        expected_residual = slip * ((3 * expected - y.norm()) / (expected + y.norm())).sqrt()
        what = f"matrix {i} {tuple(w.shape)}"
        assert_close(sigma[i].cpu(), expected, rtol=3e-6, what=what)
        assert abs(residual[i].item() - expected_residual) <= 1e-5 * expected, what
        assert_close(fro[i].cpu(), a.norm(), rtol=3e-6, what=what)
        assert_close(after, z / expected, rtol=0, atol=2e-6, what=what)
        assert e == a.norm().log2().floor(), what
        assert not padding.any(), what
        near = (torch.linalg.svdvals(a) - expected).abs().min()
        assert near <= residual[i].item() / 2**0.5 + 1e-6 * expected, what
    assert_unwritten(ws, before)


def test_spectral_power_iterations_converge_and_halves_equal_the_whole():
    ws = [torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.1])), torch.randn(60, 40)]
    ws = [w.to(DEVICE) for w in ws]
    state, _ = fresh_state([w.cpu() for w in ws])
    twin, ns = state.clone(), [4, 40]
    sigma, residual, _ = spectral.spectral_norm(ws, state, 12)
    assert_close(sigma[0].cpu(), torch.tensor(3.0), rtol=1e-5)
    assert residual[0] < 1e-3
    for _ in range(12):
        z, yy, fro2 = spectral.gram_matvec(ws, twin)
        assert z.shape == (16 + 48,)
        assert yy.shape == (2, 1, 1)
        kept = z.clone()
        halves = spectral.spectral_finish(z, yy, fro2, twin, ns)
        assert_equal(z, kept, "z is an input")
    assert_close(halves[0].cpu(), sigma.cpu(), rtol=1e-6)
    assert_close(twin.cpu(), state.cpu(), rtol=0, atol=1e-5)


def test_spectral_state_survives_a_zero_a_nan_and_a_leap():
    good = torch.randn(20, 30)
    state, _ = fresh_state([good, good, good])
    for bad, expected in ((torch.zeros(20, 30), 0.0), (good * NAN, NAN), (good.clone().fill_(INF), NAN)):
        before = state.clone()
        sigma, residual, fro = spectral.spectral_norm(
            [w.to(DEVICE) for w in (good, bad, good)], twin := state.clone(), 1
        )
        for result in (sigma, residual, fro):
            assert_close(result[1].cpu(), torch.tensor(expected), rtol=0)
        assert sigma[[0, 2]].isfinite().all()
        assert_equal(twin[48:96], before[48:96], "the bad matrix's state")
        clean = spectral.spectral_norm([good.to(DEVICE)] * 3, twin, 1)[0]
        assert clean.isfinite().all()
        assert (clean > 0).all()
    # A matrix 2^100 times larger than its exponent says: unknown now, right at the next call.
    leap = [(good * 2.0**100).to(DEVICE)]
    alone = state[:48].clone()
    assert spectral.spectral_norm(leap, alone, 1)[0].isnan().all()
    sigma = spectral.spectral_norm(leap, alone, 40)[0]
    assert_close(sigma.cpu(), torch.linalg.matrix_norm(good.double(), 2)[None] * 2.0**100, rtol=1e-3)


def test_spectral_norm_of_nothing():
    assert [r.shape for r in spectral.spectral_norm([], torch.empty(0), 1)] == [(0,)] * 3
    empty = [torch.empty(0, 5, device=DEVICE)]
    results = spectral.spectral_norm(empty, fresh_state([e.cpu() for e in empty])[0], 1)
    assert [float(r) for r in results] == [0, 0, 0]


def test_lanczos():
    ws = [
        torch.randn(25, 18),
        torch.zeros(6, 5),
        torch.randn(12, 1) @ torch.randn(1, 9),
        torch.randn(7, 7) * NAN,
    ]
    ws = [w.to(DEVICE) for w in [*ws, torch.randn(10, 24).bfloat16(), torch.randn(30, 16) * 1e-30]]
    state, _ = fresh_state([w.cpu() for w in ws])
    before = state.clone()
    sigma, residual, fro = spectral.lanczos(ws, state, 10)
    for i, (w, (_, v, padding)) in enumerate(zip(ws, vectors(state, ws), strict=True)):
        a = w.double().cpu()
        if i == 3:
            assert all(r[i].isnan() for r in (sigma, residual, fro))
            continue
        s = torch.linalg.svdvals(a)
        assert_close(sigma[i].cpu(), s[0], rtol=3e-3, what=f"matrix {i}")
        assert sigma[i] <= s[0] * (1 + 1e-5)
        assert (s - sigma[i].item()).abs().min() <= residual[i].item() / 2**0.5 + 1e-6 * s[0]
        assert_close(fro[i].cpu(), a.norm(), rtol=1e-5)
        if i != 1:
            assert abs(v.norm() - 1) < 1e-5
            assert_close((a @ v).norm(), s[0], rtol=3e-3)
        assert not padding.any()
    head = sum(16 + (w.shape[1] + 15) // 16 * 16 for w in ws[:1])
    assert_equal(state[head : head + 32], before[head : head + 32], "the zero matrix's state")


def blind() -> tuple[Tensor, Tensor]:
    """A matrix and a state whose vector is orthogonal to all of its rows."""
    w = torch.zeros(4, 16, device=DEVICE)
    w[0, 3] = 5.0
    state = torch.zeros(32, device=DEVICE)
    state[0], state[16] = 2.0, 1.0  # |W|_F is in [2^2, 2^3), v = e_0
    return w, state


def test_a_vector_that_missed_the_matrix_certifies_nothing():
    w, state = blind()
    runs = {
        "spectral_norm": lambda s: spectral.spectral_norm([w], s, 1),
        "halves": lambda s: spectral.spectral_finish(*spectral.gram_matvec([w], s), s, [16]),
        "lanczos": lambda s: spectral.lanczos([w], s, 4),
    }
    for name, run in runs.items():
        after = state.clone()
        sigma, residual, fro = (r.item() for r in run(after))
        assert sigma == 0, name
        assert abs(residual - 5 * 2**0.5) < 1e-5, name
        assert fro == 5, name
        assert_equal(after, state, f"{name}: the state stays")
