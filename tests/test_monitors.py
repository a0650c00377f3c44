"""Gradient, parameter, settings, time and memory numbers, derived again from the tensors in fp64."""

import math

import pytest
import torch
from torch import nn

from fastmon.monitors.throughput import MIB
from fastmon.optim import Muon
from fastmon.plan import split_param
from tests.tiny import Tiny, norm, split_optimizers, tokens, watch

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
            before = model.tok_emb.weight.detach().clone()
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
    # The coefficient is 0: parameters with a finite gradient stay as they were.
    assert torch.equal(model.tok_emb.weight, before)
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
    assert [sink[i]["Optimization/loss_scale"] for i in (0, 1)] == [1024, 1024]
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
