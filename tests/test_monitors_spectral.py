"""Spectral norms of moving, zero and broken weights, and the one-off function."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import fastmon
from fastmon.monitors import spectral
from fastmon.plan import split_param
from tests.cases import spectra, with_spectrum
from tests.tiny import Tiny, watch


def pieces(model, of):
    return [(n, t) for name, p in model.named_parameters() for n, t in split_param(name, of(p))]


class Matrices(nn.Module):
    def __init__(self, *weights):
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(w.float()) for w in weights])


def test_spectral_norms_track_moving_weights():
    model = Matrices(
        torch.randn(60, 40), torch.randn(30, 90), with_spectrum(50, 50, spectra(50)["power_0.5"])
    )
    mon, sink = watch(model)
    for step in range(1, 31):
        mon.step(step)
        sigmas = []
        for i, w in enumerate(model.layers):
            exact = torch.linalg.svdvals(w.detach().double())
            sigma, residual = (
                sink[-1][f"Model/spectral_norm/layers.{i}"],
                sink[-1][f"Model/spectral_residual/layers.{i}"],
            )
            assert sigma == pytest.approx(exact[0].item(), rel=5e-3)
            assert (exact - sigma).abs().min() <= residual / 2**0.5 + 1e-6 * sigma
            stable = w.detach().double().square().sum().item() / sigma**2
            assert sink[-1][f"Model/stable_rank/layers.{i}"] == pytest.approx(stable, rel=1e-5)
            sigmas.append(sigma)
        assert sink[-1]["Model/spectral_norm_max"] == max(sigmas)
        assert sink[-1]["Model/spectral_norm_mean"] == pytest.approx(np.mean(sigmas))
        assert sink[-1]["Model/spectral_norm_std"] == pytest.approx(np.std(sigmas))
        with torch.no_grad():
            for w in model.layers:
                w.add_(torch.randn_like(w), alpha=0.01 * w.norm() / w.numel() ** 0.5)


def moved(w, turn, seed):
    """w with both its singular bases turned: an orthogonal step of size `turn` on either side, fp64 and back."""
    g = torch.Generator().manual_seed(seed)
    for dim in (0, 1):
        skew = torch.randn(w.shape[dim], w.shape[dim], generator=g, dtype=torch.float64)
        step = torch.matrix_exp((skew - skew.T) * (turn / (2 * w.shape[dim]) ** 0.5))
        w = step @ w if dim == 0 else w @ step
    return w


def test_spectral_norms_follow_weights_that_turn_fast():
    # As in a warm-up: values close together, and vectors that turn further than one power iteration follows.
    torch.manual_seed(0)
    n = 96
    exact = torch.linspace(1, 0.5, n, dtype=torch.float64).pow(0.8)
    exact[:3] = torch.tensor([1.0, 0.97, 0.94])
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2))
    w = u @ torch.diag(exact) @ v.T
    model = Matrices(w)
    mon, sink = watch(model)
    for step in range(1, 51):
        mon.step(step)
        low = 1 - sink[-1]["Model/spectral_norm/layers.0"]
        assert low < 0.01, f"step {step}: a lower bound within 1%"
        assert low > -1e-5
        w = moved(w, 0.25, step)
        with torch.no_grad():
            model.layers[0].copy_(w)


def test_refinements_thin_out_on_resting_weights_and_come_back(monkeypatch):
    model = Matrices(with_spectrum(50, 40, spectra(40)["power_1"]))
    mon, _ = watch(model)
    calls = []
    lanczos = spectral.lanczos_op
    monkeypatch.setattr(
        spectral, "lanczos_op", lambda ws, s, k: (calls.append((mon._scene.step, k)), lanczos(ws, s, k))[1]
    )
    for step in range(1, 90):
        mon.step(step)
        if step == 79:
            with torch.no_grad():
                model.layers[0].copy_(with_spectrum(50, 40, spectra(40)["power_1"]).T.reshape(50, 40))
    assert [step for step, k in calls if k == spectral.LANCZOS_STEPS] == [1, 2, 4, 8, 16, 32, 64]
    refined = [step for step, k in calls if k == spectral.REFINE_STEPS]
    assert [step for step in refined if 64 <= step <= 80] == [64, 72, 80], "at rest: every 8 steps"
    assert 81 in refined, "a gain in step 80 calls for another"


def test_restarts_thin_out():
    steps = [1]
    while steps[-1] < 300:
        steps.append(spectral.next_restart(steps[-1]))
    assert steps == [1, 2, 4, 8, 16, 32, 64, 100, 200, 300]
    assert spectral.next_restart(73) == 100


def test_a_restart_finds_a_value_that_has_overtaken_and_says_so():
    # The second direction grows past the first; the warm vector has no part in it, so it cannot notice by itself.
    w = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.25]))
    model = Matrices(w)
    mon, sink = watch(model)
    for step in range(1, 66):
        mon.step(step)
    observer = next(o for o in mon._observers if type(o).__name__ == "SpectralNorms")
    observer._state[16:20] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    with torch.no_grad():
        model.layers[0][1, 1] = 8.0
    for step in range(66, 102):
        mon.step(step)
    name = "Model/spectral_norm/layers.0"
    assert sink[98][name] == pytest.approx(4.0), "step 99: still on the old value"
    assert sink[99][name] == pytest.approx(8.0), "step 100: the restart keeps the larger one"
    assert sink[100][name] == pytest.approx(8.0), "and its vector"
    assert [(r.step, e) for r in sink.rows for e in r.events] == [
        (100, {"event": "spectral_restart", "parameter": "layers.0", "sigma": pytest.approx(8.0)})
    ]


def test_zero_and_nan_matrices_do_not_poison_the_state():
    model = Matrices(torch.zeros(8, 6), torch.randn(7, 5))
    mon, sink = watch(model)
    mon.step(1)
    assert sink[0]["Model/spectral_norm/layers.0"] == 0
    assert "Model/stable_rank/layers.0" not in sink[0]
    good = torch.randn(8, 6)
    with torch.no_grad():
        model.layers[0].fill_(math.nan)
    mon.step(2)
    assert math.isnan(sink[1]["Model/spectral_norm/layers.0"])
    assert math.isnan(sink[1]["Model/stable_rank/layers.0"])
    with torch.no_grad():
        model.layers[0].copy_(good)
    for step in range(3, 40):
        mon.step(step)
    assert sink[-1]["Model/spectral_norm/layers.0"] == pytest.approx(
        torch.linalg.matrix_norm(good, ord=2).item(), rel=5e-3
    )


def test_spectral_norms_every_few_steps_catch_up():
    model = Matrices(torch.randn(40, 30))
    mon, sink = watch(model, every={"Model/spectral*": 4})
    for step in range(1, 22):
        mon.step(step)
        with torch.no_grad():
            model.layers[0].add_(torch.randn(40, 30), alpha=0.02)
    fired = [i + 1 for i in range(21) if "Model/spectral_norm_max" in sink[i]]
    assert fired == [1, 4, 8, 12, 16, 20]


@pytest.mark.parametrize("mode", ["lanczos", "power", "svd", "ns5-fast", "ns3-accurate"])
def test_compute_weight_spectral_norms(mode):
    model = Tiny(d=32)
    exact = {
        n: torch.linalg.matrix_norm(w.double(), ord=2).item()
        for n, w in pieces(model, torch.Tensor.detach)
        if w.ndim == 2
    }
    found = fastmon.compute_weight_spectral_norms(model, mode=mode)
    assert found.keys() == exact.keys()
    assert all(isinstance(v, float) for v in found.values())
    allowed = {"lanczos": 0.01, "svd": 1e-6, "power": 0.2, "ns3-accurate": 0.4, "ns5-fast": 0.5}[mode]
    for name, sigma in found.items():
        assert sigma == pytest.approx(exact[name], rel=allowed), name


def test_compute_weight_spectral_norms_chooses_targets():
    model = Tiny()
    by_regex = fastmon.compute_weight_spectral_norms(model, r"blocks\.1.*proj")
    assert list(by_regex) == ["blocks.1.proj.weight"]
    assert fastmon.compute_weight_spectral_norms(model, ["blocks.1.proj.weight"]) == by_regex
    assert fastmon.compute_weight_spectral_norms(model, [model.blocks[1].proj.weight]) == by_regex
    for wrong in ("nothing", ["blocks.9"], [nn.Parameter(torch.zeros(2, 2))]):
        with pytest.raises(ValueError, match="target_params"):
            fastmon.compute_weight_spectral_norms(model, wrong)
    with pytest.raises(ValueError, match=r"lanczos, power, svd, ns5-fast or ns3-accurate, got 'svds'"):
        fastmon.compute_weight_spectral_norms(model, mode="svds")
    with pytest.raises(ValueError, match="power_iters"):
        fastmon.compute_weight_spectral_norms(model, mode="power", power_iters=0)


def test_more_power_iterations_come_closer():
    model = Matrices(torch.randn(64, 64))
    exact = torch.linalg.matrix_norm(model.layers[0].detach().double(), ord=2).item()
    few, many = (
        fastmon.compute_weight_spectral_norms(model, mode="power", power_iters=k)["layers.0"] for k in (1, 60)
    )
    assert few < many <= exact * (1 + 1e-5)
    assert many == pytest.approx(exact, rel=0.02)


def test_a_filter_and_a_stack_are_measured_as_matrices():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            self.experts = nn.Parameter(torch.randn(2, 6, 5))

    model = Odd()
    mon, sink = watch(model)
    mon.step(1)
    wanted = {
        "conv.weight": model.conv.weight.flatten(1),
        "experts.0": model.experts[0],
        "experts.1": model.experts[1],
    }
    for name, w in wanted.items():
        exact = torch.linalg.matrix_norm(w.detach().double(), ord=2).item()
        assert sink[0][f"Model/spectral_norm/{name}"] == pytest.approx(exact, rel=1e-3)
    assert fastmon.compute_weight_spectral_norms(model).keys() == wanted.keys()


def test_positions_are_measured_as_one_table():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.randn(1, 12, 6))

    model = Positions()
    exact = torch.linalg.matrix_norm(model.pos_embed.detach()[0].double(), ord=2).item()
    assert fastmon.compute_weight_spectral_norms(model) == {"pos_embed": pytest.approx(exact, rel=1e-3)}
