"""Loops that differ from the plain one: unfreezing, scalers, nested pauses, log steps only, wrong input, no close."""

import gc
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastmon
from fastmon.metrics import METRICS, Metric, register
from fastmon.readback import SLOTS
from tests.test_readback import LateReadback
from tests.tiny import Tiny, norm, split_optimizers, tokens, watch

# -- clipping and parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["off", "usual"])
def test_parameters_unfrozen_later_are_clipped_and_counted(preset):
    model = Tiny(p=0.0)
    frozen = list(model.blocks[0].parameters())
    for p in frozen:
        p.requires_grad_(False)
    mon, sink = watch(model, preset=preset)
    for step in (1, 2):
        model.zero_grad()
        if step == 2:
            for p in frozen:
                p.requires_grad_(True)
        model(tokens(step)).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        total = mon.clip_grad_norm_(0.01)
        assert total.item() == pytest.approx(norm(grads), rel=1e-6)
        for p, g in zip([p for p in model.parameters() if p.grad is not None], grads, strict=True):
            torch.testing.assert_close(p.grad, g * (0.01 / (norm(grads) + 1e-6)), rtol=1e-5, atol=0)
        mon.step(step)
    if preset == "usual":
        assert "Gradients/norm/blocks.0.qkv.weight.k" not in sink[0]
        k = grads[1 + [p is model.blocks[0].qkv.weight for p in frozen].index(True)][16:32]
        assert sink[1]["Gradients/norm/blocks.0.qkv.weight.k"] == pytest.approx(norm([k]), rel=1e-6)
        assert sink[1]["Optimization/grad_norm"] == pytest.approx(norm(grads), rel=1e-6)
        per_parameter = [v for name, v in sink[1].items() if name.startswith("Gradients/norm/")]
        assert math.hypot(*per_parameter) == pytest.approx(norm(grads), rel=1e-6)


def test_a_regex_chooses_among_unfrozen_parameters_too():
    model = Tiny()
    model.blocks[0].proj.weight.requires_grad_(False)
    model.blocks[0].norm.weight.requires_grad_(False)
    mon, sink = watch(model, params="proj")
    model.requires_grad_(True)
    model(tokens(1)).backward()
    mon.clip_grad_norm_(1.0)
    mon.step(1)
    named = {name for name in sink.rows[0].params if name.startswith("Gradients/norm/")}
    assert named == {f"Gradients/norm/blocks.{i}.proj.weight" for i in (0, 1)}


def test_complex_parameters_and_sparse_gradients_are_refused_in_a_sentence():
    model = nn.ParameterList(
        [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    )
    with pytest.raises(ValueError, match=r"the parameter 1 is complex \(torch.complex64\)"):
        fastmon.Monitor(model, sinks=[])
    model[1].requires_grad_(False)
    mon = fastmon.Monitor(model, sinks=[])
    model[1].requires_grad_(True).abs().sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of 1 is torch.complex64"):
        mon.clip_grad_norm_(1.0)
    embedding = nn.Embedding(5, 3, sparse=True)
    mon = fastmon.Monitor(embedding, preset="off")
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="weight has a sparse gradient: dense gradients are wanted"):
        mon.clip_grad_norm_(1.0)


def test_an_optimizer_of_parameters_that_nobody_observes_is_left_out():
    model, other = Tiny(), nn.Linear(3, 3)
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    mon, sink = watch(model, [foreign, mine])
    model(tokens(1)).backward()
    other(torch.ones(3)).sum().backward()
    foreign.step()
    mine.step()
    mon.step(1)
    assert sink.rows[0].events == []
    assert "Optimization/update_norm" in sink[0]


# -- GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late_update", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_one_of_two_optimizers_skipped_is_a_skip_and_the_scale_is_the_steps(fused, late_update):
    model = Tiny(p=0.0)
    optimizers = split_optimizers(
        model, torch.optim.Muon, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=fused)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mon, sink = watch(model, optimizers, scaler=scaler)
    for step in range(1, 5):
        scaler.scale(model(tokens(step))).backward()
        if step == 2:  # Muon's, which is not fused
            model.blocks[0].proj.weight.grad[0, 0] = math.inf
        if step == 3:  # AdamW's
            model.tok_emb.weight.grad[0, 0] = math.inf
        for optimizer in optimizers:
            scaler.step(optimizer)
        if not late_update:
            scaler.update()
        mon.step(step)
        if late_update:
            scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert [sink[i]["Optimization/step_skipped"] for i in range(4)] == [0, 1, 1, 0]
    assert [sink[i]["Optimization/loss_scale"] for i in range(4)] == [1024, 1024, 512, 256]


def test_an_optimizer_that_the_loop_leaves_out_is_no_skip():
    model = Tiny(p=0.0)
    optimizers = split_optimizers(model, torch.optim.Muon)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    mon, sink = watch(model, optimizers, scaler=scaler)
    for step in (1, 2):
        scaler.scale(model(tokens(step))).backward()
        scaler.step(optimizers[step % 2])
        scaler.update()
        mon.step(step)
    assert [sink[i]["Optimization/step_skipped"] for i in (0, 1)] == [0, 0]


# -- time ------------------------------------------------------------------------------------------------------------


def test_pauses_nest(monkeypatch):
    clock = iter(float(i) for i in range(10**6))  # every look at the clock is one second
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    mon, sink = watch(Tiny(), preset="cheap", every={"Activations/*": 1})
    recorder = next(o for o in mon._observers if type(o).__name__ == "Activations")._recorder
    start = next(clock)
    with mon.pause("eval"):
        next(clock), next(clock)
        with mon.pause("checkpoint"):
            next(clock)
        assert not recorder.on, "the inner pause does not end the outer one"
        with mon.pause("eval"):
            pass
    end = next(clock)
    assert recorder.on
    mon.step(1)
    assert sink[0]["Time/checkpoint_ms"] == 2000
    assert sink[0]["Time/eval_ms"] + 2000 == 1e3 * (end - start - 2)
    total = 1e3 * sink[0]["Time/total_time_s"]
    assert sink[0]["Time/step_ms"] == total - sink[0]["Time/eval_ms"] - 2000


def test_waiting_for_a_full_ring_is_the_monitors_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    mon, sink = watch(Tiny(), preset="cheap")
    mon._readback = ring = LateReadback()
    for step in range(1, SLOTS + 1):
        mon.step(step)
    monkeypatch.setattr(ring.events[0], "synchronize", lambda: now.__setitem__(0, now[0] + 3.0))
    mon.step(SLOTS + 1)
    mon.step(SLOTS + 2)
    mon.close()
    assert [sink[i]["Time/monitor_ms"] for i in range(SLOTS + 2)] == [0.0] * (SLOTS + 1) + [3000.0]


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "wanted"),
    [
        ((10, 20, 30), {10, 20, 30}),
        ((0, 10, 20, 30), {0, 10, 20, 30}),
        ((10, 20, 25, 30), {10, 20, 30}),
        (tuple(range(0, 22)), {0, 1, 10, 20}),
    ],
)
def test_a_loop_that_calls_at_its_log_steps_only(calls, wanted):
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mon, sink = watch(model, optimizer, every={"*": 10, "Activations/*": 10})
    for step in calls:
        loss = model(tokens(step))
        loss.backward()
        mon.clip_grad_norm_(1.0)
        optimizer.step()
        mon.step(step, {"Loss/train_loss": loss})
        optimizer.zero_grad()
    for name in ("Loss/train_loss", "Model/param_norm", "Optimization/grad_norm", "Model/spectral_norm_max"):
        assert {row.step for row in sink.rows if name in row.values} == wanted, name
    if calls != (10, 20, 25, 30):  # its last step was not to be foreseen
        for name in ("Optimization/update_norm", "Activations/blocks.0_std"):
            assert {row.step for row in sink.rows if name in row.values} == wanted, name


def test_schedules_hold_for_given_values_too():
    mon, sink = watch(Tiny(), every={"Loss/*": 0, "Time/*": 0, "Loss/val_loss": 2})
    for step in (1, 2, 3):
        loss = torch.tensor(1.0)
        mon.step(
            step, {"Loss/train_loss": loss, "Loss/loss_a": 1.0, "Loss/val_loss": loss, "Time/data_ms": 2.0}
        )
    for i in range(3):
        named = {name for name in sink[i] if name.startswith(("Loss/", "Time/"))}
        assert named == ({"Loss/val_loss"} if i < 2 else set())


def test_a_name_registered_after_the_monitor_was_built_is_taken():
    mon, sink = watch(Tiny())
    try:
        register(Metric("Loss/late", "nats", "a test", "a test", "cheap"))
        mon.step(1, {"Loss/late": 4.0})
        assert sink[0]["Loss/late"] == 4.0
    finally:
        METRICS.pop("Loss/late")


# -- building and closing --------------------------------------------------------------------------------------------


def test_a_monitor_that_cannot_be_built_leaves_nothing_behind(tmp_path, monkeypatch):
    model = Tiny()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        fastmon.Monitor(model, run_dir=tmp_path / "file")
    assert not any(m._forward_hooks for m in model.modules())

    def explode(*args):
        raise RuntimeError("boom")

    monkeypatch.setattr("fastmon.monitors.throughput.Throughput.__init__", explode)  # the last one
    with pytest.raises(RuntimeError, match="boom"):
        fastmon.Monitor(model, sinks=[])
    assert not any(m._forward_hooks for m in model.modules())


def test_wrong_input_is_refused_with_what_was_wanted():
    model = Tiny()
    for wrong, named in (
        ("adam", "str with str"),
        (model.parameters(), "generator with Parameter"),
        (3, "int with int"),
    ):
        with pytest.raises(TypeError, match=f"optimizer is a torch.optim.Optimizer, .* got {named}"):
            fastmon.Monitor(model, wrong, sinks=[])
    with pytest.raises(TypeError, match=r"model is a torch.nn.Module, got str"):
        fastmon.Monitor("gpt", sinks=[])
    for name in ("params", "modules"):
        with pytest.raises(ValueError, match=rf"{name}='\(' is no regular expression"):
            fastmon.Monitor(model, sinks=[], **{name: "("})
    for preset in ("off", "usual"):
        with pytest.raises(ValueError, match="every: 'xx' matches no metric"):
            fastmon.Monitor(model, preset=preset, every={"xx": 1}, sinks=[])


@pytest.mark.parametrize("preset", ["off", "cheap"])
def test_a_closed_monitor_takes_no_step(preset):
    mon, sink = watch(Tiny(), preset=preset)
    mon.close()
    with pytest.raises(RuntimeError, match="closed"):
        mon.step(1)
    assert sink.rows == []


def test_a_forgotten_monitor_closes_itself_when_collected():
    model = Tiny()
    mon, sink = watch(model, torch.optim.SGD(model.parameters(), lr=0.1), preset="cheap")
    mon._readback = LateReadback()
    mon.step(1)
    assert sink.rows == []
    del mon, model
    gc.collect()
    assert [row.step for row in sink.rows] == [1]
    assert sink.closed


def test_a_monitor_may_be_collected_while_something_is_traced():
    mon, sink = watch(Tiny(), preset="usual")
    mon._readback = LateReadback()
    mon.step(1, {"Loss/train_loss": 2.5})
    with torch._subclasses.FakeTensorMode():
        del mon
        gc.collect()
    assert sink[0]["Loss/train_loss"] == 2.5
    assert sink.closed


def test_a_forgotten_monitor_closes_itself_at_the_end_of_the_process(tmp_path):
    code = """
import fastmon, torch
from tests.test_readback import LateReadback
model = torch.nn.Linear(2, 2)
mon = fastmon.Monitor(model, torch.optim.SGD(model.parameters()), preset="cheap", run_dir=__import__("sys").argv[1])
mon._readback = LateReadback()
mon.step(1, {"Loss/train_loss": 2.5})
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("Loss/train_loss") for row in rows] == [None, 2.5]
