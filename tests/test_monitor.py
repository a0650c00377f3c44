"""The loop's API: nothing changes, nothing waits, nothing breaks the run."""

import json

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import fastmon
from fastmon.metrics import METRICS
from fastmon.optim import Muon
from fastmon.readback import SLOTS, Readback
from tests.compare import assert_equal
from tests.test_readback import LateReadback
from tests.tiny import Rows, Tiny, split_optimizers, tokens


def train(preset, *, steps=6, micro=2, muon=Muon, **options):
    """A loop with dropout, accumulation, clipping and two optimizers; everything it leaves behind."""
    torch.manual_seed(3)
    model = Tiny()
    optimizers = split_optimizers(model, muon)
    losses, sink = [], Rows()
    with fastmon.Monitor(model, optimizers, preset=preset, sinks=[sink], **options) as mon:
        for step in range(1, steps + 1):
            total = torch.zeros(())
            for k in range(micro):
                loss = model(tokens(10 * step + k)) / micro
                loss.backward()
                total += loss.detach()
                if k + 1 < micro:
                    mon.micro_step()
            mon.clip_grad_norm_(0.5)
            for optimizer in optimizers:
                optimizer.step()
            if step == 3:
                with mon.pause(), torch.no_grad():
                    model(tokens(0))
            mon.step(step, {"Loss/train_loss": total, "Time/data_ms": 1.0})
            losses.append(total)
            for optimizer in optimizers:
                optimizer.zero_grad()
    state = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
    return torch.stack(losses), [p.detach() for p in model.parameters()], state, torch.get_rng_state(), sink


@pytest.mark.parametrize("muon", [Muon, torch.optim.Muon])
@pytest.mark.parametrize("preset", ["cheap", "usual", "full"])
def test_watching_changes_no_bit(preset, muon):
    off, on = train("off", muon=muon), train(preset, muon=muon)
    assert_equal(on[0], off[0], "losses")
    for which in (1, 2):
        for a, b in zip(on[which], off[which], strict=True):
            assert_equal(a, b, ("", "weights", "optimizer state")[which])
    assert_equal(on[3], off[3], "random numbers")
    assert off[4].rows == []
    assert len(on[4].rows) == 6


def test_rows_hold_the_presets_metrics():
    for preset in ("cheap", "usual", "full"):
        sink = train(
            preset, steps=12, samples_per_step=4, tokens_per_step=96, flops_per_token=1e4, total_steps=6
        )[4]
        assert [row.step for row in sink.rows] == list(range(1, 13))
        assert sink.closed
        found = {
            fastmon.metrics.lookup(name).name for row in sink.rows for name in (*row.values, *row.params)
        }
        absent = {
            "Time/checkpoint_ms", "Time/compile_ms", "Loss/val_loss", "Loss/loss_<task>",
            "Optimization/step_skipped", "Optimization/loss_scale", "Hardware/mfu", "Hardware/peak_memory_mb",
            "Hardware/reserved_memory_mb", "Hardware/allocated_memory_mb",
        }  # fmt: skip
        sometimes = {"Gradients/noise_scale"}  # while its averages are positive
        assert found | sometimes == set(fastmon.metrics.plan_schedules(preset)) - absent | sometimes
        assert all(
            METRICS[fastmon.metrics.lookup(name).name].per_parameter
            for row in sink.rows
            for name in row.params
        )
        assert "Time/eval_ms" in sink[2]
        assert "Time/eval_ms" not in sink[3]


def test_the_loss_is_logged_as_it_was():
    losses, _, _, _, sink = train("cheap")
    assert [sink[i]["Loss/train_loss"] for i in range(6)] == losses.tolist()


def test_nothing_waits_for_the_device(monkeypatch):
    model = Tiny()
    optimizers = split_optimizers(model, Muon)
    mon = fastmon.Monitor(model, optimizers, preset="full", sinks=[Rows()])

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    for step in range(1, 4):
        loss = model(tokens(step))
        loss.backward()
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__"):
                patch.setattr(Tensor, name, refuse)
            mon.clip_grad_norm_(1.0)
            mon._around(0, before=True)
            mon._around(0, before=False)
            mon.step(step, {"Loss/train_loss": loss, "Loss/val_loss": loss.double()})
    assert mon._failures == {}
    assert all(observer is not None for observer in mon._observers)


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["cheap", "usual", "full"])
def test_a_monitored_step_never_synchronises_on_a_gpu(preset):
    model = Tiny(d=64).cuda()
    optimizers = split_optimizers(model, Muon)
    sink = Rows()
    mon = fastmon.Monitor(model, optimizers, preset=preset, sinks=[sink])
    for step in range(1, 130):
        if step == 3:
            torch.cuda.set_sync_debug_mode("error")
        batch = torch.randint(0, 29, (2, 12), device="cuda")
        loss = model(batch)
        loss.backward()
        mon.clip_grad_norm_(1.0)
        for optimizer in optimizers:
            optimizer.step()
        mon.step(step, {"Loss/train_loss": loss})
        for optimizer in optimizers:
            optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("default")
    mon.close()
    assert [row.step for row in sink.rows] == list(range(1, 130))
    assert all(row.events == [] or row.events[0]["event"] == "spectral_restart" for row in sink.rows)


def test_rows_that_arrive_late_come_in_order(monkeypatch):
    model = Tiny()
    sink = Rows()
    mon = fastmon.Monitor(model, preset="cheap", sinks=[sink])
    mon._readback = ring = LateReadback()
    for step in range(1, 4):
        mon.step(step, {"Loss/train_loss": torch.tensor(float(step))})
    assert sink.rows == []
    ring.events[0].done = True
    mon.step(4, {"Loss/train_loss": torch.tensor(4.0)})
    assert [row.step for row in sink.rows] == [1]
    for step in range(5, 10):
        mon.step(step, {"Loss/train_loss": torch.tensor(float(step))})
    assert len(sink.rows) == 9 - SLOTS
    assert sum(event.waited for event in ring.events) > 0
    mon.close()
    assert [sink[i]["Loss/train_loss"] for i in range(9)] == [float(step) for step in range(1, 10)]
    assert isinstance(ring, Readback)


# -- the rest of the API ---------------------------------------------------------------------------------------------


def test_state_goes_on_after_loading(tmp_path):
    def loop(mon, model, optimizer, steps):
        for step in steps:
            model(tokens(step)).backward()
            optimizer.step()
            mon.step(step)
            optimizer.zero_grad()

    model = Tiny(p=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = Rows()
    mon = fastmon.Monitor(model, optimizer, sinks=[first])
    loop(mon, model, optimizer, range(1, 6))
    torch.save(mon.state_dict(), tmp_path / "monitor.pt")
    state = torch.load(tmp_path / "monitor.pt", weights_only=True)
    assert state["step"] == 5
    loop(mon, model, optimizer, range(6, 7))
    vectors = mon.state_dict()["observers"]["SpectralNorms"]["vectors"]
    again = Rows()
    mon = fastmon.Monitor(model, optimizer, sinks=[again], every={"Model/param_norm": 4})
    mon.load_state_dict(state)
    assert mon.state_dict()["step"] == 5
    assert_equal(
        mon.state_dict()["observers"]["SpectralNorms"]["vectors"],
        state["observers"]["SpectralNorms"]["vectors"],
    )
    loop(mon, model, optimizer, range(6, 9))
    assert [i + 6 for i in range(3) if "Model/param_norm" in again[i]] == [8], "schedules go on, too"
    assert again[0]["Time/step_avg_ms"] == pytest.approx(again[0]["Time/training_time_ms"] / 6)
    assert vectors.shape == state["observers"]["SpectralNorms"]["vectors"].shape


def test_vectors_of_other_matrices_are_not_taken(caplog):
    small, large = (fastmon.Monitor(Tiny(layers=n), sinks=[]) for n in (1, 2))
    before = large.state_dict()["observers"]["SpectralNorms"]["vectors"].clone()
    large.load_state_dict(small.state_dict())
    assert_equal(large.state_dict()["observers"]["SpectralNorms"]["vectors"], before)
    assert "other matrices" in caplog.text
    large.step(1)


def test_wrong_values_and_names_are_refused_with_what_was_wanted():
    mon = fastmon.Monitor(Tiny(), sinks=[])
    with pytest.raises(ValueError, match=r"'Loss/trian_loss'; nearest: Loss/train_loss"):
        mon.step(1, {"Loss/trian_loss": 1.0})
    with pytest.raises(ValueError, match=r"Loss/val_loss wants a scalar, got shape \(3,\)"):
        mon.step(1, {"Loss/val_loss": torch.zeros(3)})
    with (
        pytest.raises(ValueError, match="a pause is one of eval, checkpoint, got 'lunch'"),
        mon.pause("lunch"),
    ):
        pass
    with pytest.raises(ValueError, match="preset is one of"):
        fastmon.Monitor(Tiny(), preset="loud", sinks=[])


def test_off_keeps_the_calls_and_does_nothing(tmp_path):
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastmon.Monitor(model, optimizer, preset="off", run_dir=tmp_path / "run") as mon:
        model(tokens(1)).backward()
        mon.before_clip()
        mon.micro_step()
        assert mon.clip_grad_norm_(1.0).ndim == 0
        optimizer.step()
        with mon.pause():
            pass
        mon.step(1, {"Loss/train_loss": torch.zeros(())})
        mon.load_state_dict(mon.state_dict())
    assert not (tmp_path / "run").exists()
    assert not model.blocks[0]._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_clipping_without_any_gradient_returns_zero():
    assert fastmon.Monitor(Tiny(), sinks=[]).clip_grad_norm_(1.0).item() == 0


def test_a_run_folder_gets_both_files_and_the_console_its_lines(tmp_path, capsys):
    model = Tiny()
    mon = fastmon.Monitor(model, run_dir=tmp_path, total_steps=2)
    for step in (1, 2):
        loss = model(tokens(step))
        loss.backward()
        mon.step(step, {"Loss/train_loss": loss})
    mon.close()
    mon.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["step:1/2", "step:2/2"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("step") for row in rows] == [None, 1, 2]
    assert "Gradients/norm/tok_emb.weight" in (tmp_path / "params.jsonl").read_text()
    assert not any("/norm/" in name for name in rows[2])


def test_hooks_go_when_it_closes():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mon = fastmon.Monitor(model, optimizer, sinks=[])
    assert optimizer._optimizer_step_pre_hooks
    assert optimizer._optimizer_step_post_hooks
    mon.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks for m in model.modules())


def test_frozen_parts_missing_gradients_and_no_optimizer():
    model = Tiny()
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    sink = Rows()
    mon = fastmon.Monitor(model, sinks=[sink])
    mon.step(1)  # no gradient at all
    model(tokens(1)).backward()
    model.blocks[1].proj.weight.grad = None
    mon.step(2)
    assert "Gradients/nonfinite" not in sink[0]
    assert sink[1]["Gradients/nonfinite"] == 0
    named = {k.removeprefix("Gradients/norm/") for k in sink[1] if k.startswith("Gradients/norm/")}
    assert "blocks.1.norm.weight" in named
    assert "blocks.1.proj.weight" not in named
    assert not any(name.startswith("blocks.0") for name in named)
    assert not any(k.startswith("Optimization/") and "grad_norm" not in k for k in sink[1])


def test_a_regex_chooses_the_parameters():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = Rows()
    mon = fastmon.Monitor(model, optimizer, sinks=[sink], params="proj")
    model(tokens(1)).backward()
    total = mon.clip_grad_norm_(1.0)
    optimizer.step()
    mon.step(1)
    assert {k.split("/")[-1] for k in sink.rows[0].params} == {"blocks.0.proj.weight", "blocks.1.proj.weight"}
    assert sink[0]["Optimization/grad_norm"] == pytest.approx(total.item(), rel=1e-6), "the norm is of all"


def test_extra_losses_python_floats_and_a_missing_loss():
    sink = Rows()
    mon = fastmon.Monitor(nn.Linear(2, 2), sinks=[sink], preset="cheap")
    mon.step(1, {"Loss/train_loss": 2.5, "Loss/loss_lm": torch.tensor([1.5]), "Loss/val_loss": 3})
    mon.step(2)
    mon.step(3, {"Loss/train_loss": float("nan")})
    assert (sink[0]["Loss/train_loss"], sink[0]["Loss/loss_lm"], sink[0]["Loss/val_loss"]) == (2.5, 1.5, 3.0)
    assert "Loss/train_loss" not in sink[1]
    assert sink[2]["Loss/train_loss"] != sink[2]["Loss/train_loss"]
