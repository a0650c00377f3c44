"""Every observer's numbers, derived again from the tensors in fp64."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastmon
from fastmon.monitors.activations import CALLS, merge_calls, select_modules
from fastmon.monitors.throughput import MIB
from fastmon.ops import moments
from fastmon.optim import Muon
from fastmon.plan import split_param
from tests.cases import spectra, with_spectrum
from tests.tiny import Rows, Tiny, split_optimizers, tokens


def watch(model, optimizer=None, **options):
    sink = Rows()
    return fastmon.Monitor(model, optimizer, sinks=[sink], **options), sink


def pieces(model, of):
    return [(n, t) for name, p in model.named_parameters() for n, t in split_param(name, of(p))]


def norm(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


# -- gradients and clipping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_is_torchs_and_its_read_gives_every_gradient_metric(max_norm, dtype):
    model = Tiny(p=0.0).to(dtype)
    model(tokens(1)).backward()
    model.blocks[0].norm.bias.grad = None
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    other = [nn.Parameter(torch.zeros_like(g)) for g in before.values()]
    for p, g in zip(other, before.values(), strict=True):
        p.grad = g.clone()
    reference = torch.nn.utils.clip_grad_norm_(other, max_norm)
    mon, sink = watch(model)
    total = mon.clip_grad_norm_(max_norm)
    assert total.dtype == torch.float32
    assert total.shape == ()
    exact = norm(before.values())
    assert total.item() == pytest.approx(exact, rel=1e-6)
    tolerance = 1e-6 if dtype is torch.float32 else 8e-3  # torch rounds every bf16 norm to bf16
    assert total.item() == pytest.approx(reference.item(), rel=tolerance)
    coefficient = min(1.0, max_norm / (exact + 1e-6))
    for p in model.parameters():
        name = next(n for n, q in model.named_parameters() if q is p)
        if name in before:
            wanted = before[name].double() * coefficient
            torch.testing.assert_close(
                p.grad.double(), wanted, rtol=1e-6 if dtype is torch.float32 else 8e-3, atol=0
            )
    if dtype is torch.float32:
        for p, q in zip([p for p in model.parameters() if p.grad is not None], other, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    mon.step(1, {})
    row = sink[0]
    assert row["Optimization/grad_norm"] == pytest.approx(exact, rel=1e-6)
    assert row["Optimization/grad_norm_clipped"] == pytest.approx(exact * coefficient, rel=2e-6)
    assert row["Gradients/nonfinite"] == 0
    for name, g in before.items():
        for part, view in split_param(name, g):
            assert row[f"Gradients/norm/{part}"] == pytest.approx(norm([view]), rel=1e-6, abs=1e-30)
    assert "Gradients/norm/blocks.0.norm.bias" not in row


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nonfinite_gradient_is_counted_and_named_at_its_step(poison):
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mon, sink = watch(model, optimizer)
    for step in (1, 2):
        model(tokens(step)).backward()
        if step == 2:
            model.blocks[1].qkv.weight.grad[20, 3] = poison  # rows 16 to 31 are k
            model.blocks[1].proj.weight.grad[:2, 0] = poison
        mon.clip_grad_norm_(1.0)
        optimizer.step()
        mon.step(step)
        optimizer.zero_grad()
    assert sink.rows[0].events == []
    assert sink[0]["Gradients/nonfinite"] == 0
    assert sink[1]["Gradients/nonfinite"] == 3
    assert sink.rows[1].events == [
        {"event": "nonfinite_gradient", "parameter": "blocks.1.qkv.weight.k", "count": 1, "total": 3}
    ]
    assert math.isnan(sink[1]["Optimization/grad_norm"])
    assert math.isfinite(sink[1]["Gradients/norm/tok_emb.weight"])
    # The coefficient is 0: parameters with a finite gradient survive.
    assert torch.isfinite(model.tok_emb.weight).all()
    assert not torch.isfinite(model.blocks[1].proj.weight).all()


def test_a_loop_that_clips_by_itself():
    model = Tiny(p=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mon, sink = watch(model, optimizer)
    exact = []
    for step in (1, 2):
        model(tokens(step)).backward()
        exact.append(norm([p.grad for p in model.parameters()]))
        if step == 2:
            mon.before_clip()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        mon.step(step)
        optimizer.zero_grad()
    assert "Optimization/grad_norm" not in sink[0]
    assert sink[0]["Optimization/grad_norm_clipped"] == pytest.approx(0.25, rel=1e-4)
    assert sink[1]["Optimization/grad_norm"] == pytest.approx(exact[1], rel=1e-6)
    assert sink[1]["Optimization/grad_norm_clipped"] == pytest.approx(0.25, rel=1e-4)
    per_parameter = [v for k, v in sink[1].items() if k.startswith("Gradients/norm/")]
    assert math.hypot(*per_parameter) == pytest.approx(exact[1], rel=1e-6), "before clipping"


def test_scaled_gradients_of_a_fused_optimizer_are_divided():
    model = Tiny(p=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mon, sink = watch(model, optimizer)
    model(tokens(1)).backward()
    exact = norm([p.grad for p in model.parameters()])
    for p in model.parameters():
        p.grad.mul_(1024.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    mon.step(1)
    assert sink[0]["Optimization/grad_norm_clipped"] == pytest.approx(exact, rel=1e-5)
    total = math.hypot(*[v for k, v in sink[0].items() if k.startswith("Gradients/norm/")])
    assert total == pytest.approx(exact, rel=1e-5)


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [torch.optim.Muon, Muon])
def test_parameter_and_update_norms(muon):
    model = Tiny()
    optimizers = split_optimizers(model, muon)
    mon, sink = watch(model, optimizers)
    for step in (1, 2, 3):
        model(tokens(step)).backward()
        mon.clip_grad_norm_(1.0)
        old = {n: p.detach().clone() for n, p in model.named_parameters()}
        for optimizer in optimizers:
            optimizer.step()
        mon.step(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        new = dict(model.named_parameters())
        row = sink[-1]
        tolerance = 1e-6 if muon is torch.optim.Muon else 1e-3  # Muon's own report is before rounding
        assert row["Model/param_norm"] == pytest.approx(norm(new.values()), rel=1e-6)
        changes = [new[n].detach() - old[n] for n in new]
        assert row["Optimization/update_norm"] == pytest.approx(norm(changes), rel=tolerance)
        ratios = {
            k.removeprefix("Optimization/update_ratio/"): v for k, v in row.items() if "update_ratio/" in k
        }
        assert row["Optimization/update_ratio"] == max(ratios.values())
        for name, p in new.items():
            parts = split_param(name, p.detach())
            if muon is Muon and "qkv" in name:
                parts = [(name, p.detach())]
            for (part, w), (_, before) in zip(parts, split_param(name, old[name]), strict=False):
                if muon is Muon and "qkv" in name:
                    before = old[name]
                change = norm([w - before])
                base = norm([before]) if muon is Muon and "blocks" in name and w.ndim == 2 else norm([w])
                if base:
                    assert ratios.pop(part) == pytest.approx(change / base, rel=tolerance), part
                else:
                    assert part not in ratios, "a ratio to a zero weight is undefined"
        assert not ratios


def test_muons_own_spectrum_in_full_and_silence_after_closing():
    model = Tiny()
    optimizers = split_optimizers(model, Muon)
    mon, sink = watch(model, optimizers, preset="full")
    model(tokens(1)).backward()
    for optimizer in optimizers:
        optimizer.step()
    seen = optimizers[0].observations()
    mon.step(1)
    proj = model.blocks[0].proj.weight
    name = "Optimization/update_spectral_norm/blocks.0.proj.weight"
    assert sink[0][name] == pytest.approx(seen[proj]["update_spectral_norm"].item(), rel=1e-6)
    assert sink[0]["Optimization/update_stable_rank/blocks.0.proj.weight"] >= 1 - 1e-3
    mon.close()
    for optimizer in optimizers:
        optimizer.step()
    assert optimizers[0].observations() == {}


def test_a_skipped_optimizer_changes_nothing_and_has_no_update():
    model = Tiny()
    optimizers = split_optimizers(model, torch.optim.Muon)
    mon, sink = watch(model, optimizers)
    model(tokens(1)).backward()
    optimizers[1].step()
    mon.step(1)
    mon.step(2)
    ratios = [k for k in sink[0] if "update_ratio/" in k]
    assert ratios
    assert not any("qkv" in k for k in ratios)
    assert "Optimization/update_norm" not in sink[1]
    assert (
        sink[0]["Model/param_norm"] == sink[1]["Model/param_norm"] == pytest.approx(norm(model.parameters()))
    )


# -- spectral norms --------------------------------------------------------------------------------------------------


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


def test_a_restart_finds_a_value_that_has_overtaken_and_says_so():
    # The second direction grows past the first; the warm vector has no part in it, so it cannot notice by itself.
    w = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.25]))
    model = Matrices(w)
    mon, sink = watch(model)
    mon.step(1)
    observer = next(o for o in mon._observers if type(o).__name__ == "SpectralNorms")
    observer._state[16:20] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    with torch.no_grad():
        model.layers[0][1, 1] = 8.0
    for step in range(2, 102):
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


# -- activations -----------------------------------------------------------------------------------------------------


def expected_statistics(x):
    x = x.double().flatten()
    m2 = (x - x.mean()).square().mean()
    return {
        "mean": x.mean().item(),
        "std": m2.sqrt().item(),
        "min": x.min().item(),
        "max": x.max().item(),
        "l2_norm": x.norm().item(),
        "zero_frac": (x == 0).double().mean().item(),
        "kurtosis": ((x - x.mean()).pow(4).mean() / m2**2).item(),
    }


@pytest.mark.parametrize("batches", [1, 3, CALLS + 4])
def test_activation_moments_are_those_of_all_micro_batches(batches):
    model = Tiny(p=0.0)
    outputs = []
    model.blocks[1].register_forward_hook(lambda m, a, out: outputs.append(out.detach()))
    mon, sink = watch(model, preset="full", modules=r"^blocks\.1$")
    for i in range(batches):
        with torch.no_grad():
            model.tok_emb.weight.mul_(1.3)  # batches that differ in scale
        model(tokens(i)).backward()
        if i + 1 < batches:
            mon.micro_step()
    mon.step(1)
    for name, value in expected_statistics(torch.stack(outputs)).items():
        assert sink[0][f"Activations/blocks.1_{name}"] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    model(tokens(99))
    mon.step(2)
    for name, value in expected_statistics(outputs[-1]).items():
        assert sink[1][f"Activations/blocks.1_{name}"] == pytest.approx(value, rel=2e-5, abs=1e-7), name


def test_merging_keeps_a_large_mean():
    x = torch.randn(3, 4000, dtype=torch.float64) + 1e4
    number, moment = zip(*[(m[:3], m[3:]) for m in [moments(row.float(), order=4) for row in x]], strict=True)
    number = torch.stack([torch.stack(n, dim=-1) for n in number]).numpy()
    moment = torch.stack([torch.stack(list(m), dim=-1) for m in moment]).double().numpy()
    merged = merge_calls(number, moment)
    for name, value in expected_statistics(x.float()).items():
        assert merged[name][0][0] == pytest.approx(value, rel=1e-4), name


def test_usual_taps_the_blocks_and_full_every_module():
    model = Tiny()
    assert list(select_modules(model, None, everything=False)) == ["blocks.0", "blocks.1"]
    everything = list(select_modules(model, None, everything=True))
    assert "blocks" not in everything
    assert "blocks.0.drop" in everything
    assert "lm_head" in everything
    assert list(select_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), None, everything=False)) == [
        "0",
        "1",
    ]
    assert list(select_modules(nn.ReLU(), None, everything=False)) == ["relu"]
    with pytest.raises(ValueError, match=r"modules='conv' matches none of tok_emb, blocks"):
        select_modules(model, "conv", everything=False)


def test_taps_record_training_only():
    model = Tiny()
    mon, sink = watch(model)
    recorder = next(o for o in mon._observers if type(o).__name__ == "Activations")._recorder

    def recorded():
        return recorder.counts.sum().item()

    with mon.pause():
        model(tokens(1))
    assert recorded() == 0, "paused"
    model.eval()
    model(tokens(1))
    assert recorded() == 0, "eval mode"
    model.train()
    model(tokens(1))
    assert recorded() > 0
    with mon.pause("checkpoint"):
        before = recorded()
        model(tokens(2))
        assert recorded() == before
    mon.step(1)
    assert sink[0]["Activations/blocks.0_std"] > 0
    mon.step(2)
    assert not any(k.startswith("Activations/") for k in sink[1]), "no forward pass in step 2"


def test_taps_do_not_record_a_block_twice_under_checkpointing():
    model = Tiny(p=0.0)
    tap = []
    for reentrant in (False, True):
        mon, sink = watch(model, every={"Activations/*": 1})

        def forward(module=model, reentrant=reentrant):
            x = module.tok_emb(tokens(1))
            for block in module.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return x.square().mean()

        forward().backward()
        mon.step(1)
        tap.append(sink[0]["Activations/blocks.1_l2_norm"])
        mon.close()
    with torch.no_grad():
        x = model.blocks[1](model.blocks[0](model.tok_emb(tokens(1))))
    assert tap == pytest.approx([x.norm().item()] * 2, rel=1e-5)


def test_tap_schedules_and_hooks_that_go():
    model = Tiny()
    mon, sink = watch(model, every={"Activations/*": 3})
    for step in range(1, 8):
        model(tokens(step))
        mon.step(step)
    assert [i + 1 for i in range(7) if "Activations/blocks.0_mean" in sink[i]] == [1, 3, 6]
    assert model.blocks[0]._forward_hooks
    mon.close()
    assert not model.blocks[0]._forward_hooks


def test_outputs_that_are_tuples_dicts_and_integers():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
            self.layers[0].forward = lambda x: (x + 1, None)
            self.layers[1].forward = lambda x: {"hidden": x + 2}
            self.layers[2].forward = lambda x: torch.zeros(3, dtype=torch.int64)

        def forward(self, x):
            for layer in self.layers:
                layer(x)

    model = Many()
    mon, sink = watch(model)
    model(torch.zeros(4, 3))
    mon.step(1)
    assert sink[0]["Activations/layers.0_mean"] == 1
    assert sink[0]["Activations/layers.1_mean"] == 2
    assert sink[0]["Activations/layers.1_std"] == 0
    assert "Activations/layers.2_mean" not in sink[0]


def test_taps_that_never_record_warn_once():
    model = Tiny().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mon, _ = watch(model, optimizer)

    def train(step):
        model(tokens(step)).backward()
        optimizer.step()
        mon.step(step)

    with pytest.warns(RuntimeWarning, match="taps recorded nothing"):
        train(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(2)


# -- settings, time and memory ---------------------------------------------------------------------------------------


def test_learning_rates_and_momentum_are_those_of_the_step():
    model = Tiny()
    optimizers = split_optimizers(model, torch.optim.Muon)
    optimizers[1].add_param_group(
        {"params": [nn.Parameter(torch.ones(2))], "lr": torch.tensor(0.5), "name": "late"}
    )
    mon, sink = watch(model, optimizers)
    model(tokens(1)).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 77.0  # a scheduler that steps before the row
    mon.step(1)
    row = sink[0]
    assert row["Optimization/lr"] == row["Optimization/lr/muon"] == 1e-2
    assert row["Optimization/lr/adamw.0"] == 1e-3
    assert row["Optimization/lr/late"] == 0.5
    assert row["Optimization/momentum"] == 0.95


def test_one_group_has_no_suffixed_rate_and_adam_reports_beta1():
    model = Tiny()
    mon, sink = watch(model, torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.8, 0.9)))
    mon.step(1)
    assert sink[0]["Optimization/lr"] == 3e-4
    assert sink[0]["Optimization/momentum"] == 0.8
    assert not any(k.startswith("Optimization/lr/") for k in sink[0])


def test_steps_that_a_scaler_skips():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mon, sink = watch(model, optimizer, scaler=scaler)
    for step in (1, 2):
        scaler.scale(model(tokens(step))).backward()
        if step == 2:
            model.tok_emb.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        mon.clip_grad_norm_(1.0)
        scaler.step(optimizer)
        scaler.update()
        mon.step(step)
        optimizer.zero_grad()
    assert [sink[i]["Optimization/step_skipped"] for i in (0, 1)] == [0, 1]
    assert [sink[i]["Optimization/loss_scale"] for i in (0, 1)] == [1024, 512]
    assert sink[1]["Gradients/nonfinite"] == 1
    assert sink.rows[1].events == [], "logged, not an alarm"
    assert "Optimization/update_norm" in sink[0]
    assert "Optimization/update_norm" not in sink[1]


def test_a_fused_optimizer_skips_on_the_device():
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mon, sink = watch(model, optimizer, scaler=torch.amp.GradScaler("cpu"))
    for step, found in ((1, 0.0), (2, 1.0)):
        model(tokens(step)).backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found)
        optimizer.step()
        mon.step(step)
    assert [sink[i]["Optimization/step_skipped"] for i in (0, 1)] == [0, 1]


def test_time_metrics_agree_with_each_other(monkeypatch):
    clock = iter(float(i) for i in range(10**6))  # every look at the clock is one second
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    model = Tiny()
    mon, sink = watch(model, preset="cheap", tokens_per_step=100, flops_per_token=1e9, total_steps=10)
    for step in (1, 2):
        with mon.pause():
            next(clock), next(clock)
        with mon.pause("checkpoint"):
            pass
        mon.step(step, {"Time/data_ms": 12.5})
    for i, row in enumerate((sink[0], sink[1])):
        assert row["Time/eval_ms"] == 3000
        assert row["Time/checkpoint_ms"] == 1000
        assert row["Time/data_ms"] == 12.5
        assert row["Time/tokens_per_s"] == pytest.approx(1e5 / row["Time/step_ms"])
        assert row["Time/iterations_per_s"] == pytest.approx(1e3 / row["Time/step_ms"])
        assert row["Time/eta_s"] == pytest.approx((10 - i - 1) * row["Time/step_avg_ms"] / 1e3)
        assert row["Hardware/tflops_per_s"] == pytest.approx(row["Time/tokens_per_s"] * 1e-3)
        assert "Hardware/mfu" not in row, "the peak of a CPU is not known"
    steps = [sink[i]["Time/step_ms"] for i in (0, 1)]
    assert sink[1]["Time/training_time_ms"] == sum(steps)
    assert sink[1]["Time/step_avg_ms"] == sum(steps) / 2
    total = sink[1]["Time/total_time_s"] - sink[0]["Time/total_time_s"]
    assert 1e3 * total == pytest.approx(steps[1] + 4000), "the pauses are not in the step"
    assert sink[1]["Time/monitor_ms"] > 0


def test_mfu_is_a_share_of_the_known_peak(monkeypatch):
    model = Tiny()
    mon, sink = watch(
        model, preset="cheap", tokens_per_step=1000, flops_per_token=1e9, compute_dtype=torch.bfloat16
    )
    throughput = next(o for o in mon._observers if type(o).__name__ == "Throughput")
    monkeypatch.setattr(mon._scene, "device", torch.device("cuda"))
    monkeypatch.setattr("fastmon.device.name", lambda device: "NVIDIA H100 80GB HBM3")
    throughput._peak = throughput._peak_flops()
    monkeypatch.setattr(mon._scene, "device", torch.device("cpu"))
    mon.step(1)
    assert throughput._peak == 989e12
    assert sink[0]["Hardware/mfu"] == pytest.approx(sink[0]["Hardware/tflops_per_s"] / 989)


def test_memory_is_that_of_the_process_and_of_the_buffers():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mon, sink = watch(model, optimizer)
    for step in (1, 2):
        model(tokens(step)).backward()
        optimizer.step()
        mon.step(step)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert 0.2 * peak < sink[1]["Hardware/host_rss_mb"] <= peak * 1.05
    copies = 4 * sum(p.numel() for p in model.parameters()) / MIB
    assert copies < sink[1]["Hardware/monitor_memory_mb"] < copies + 0.2
