"""train.py from end to end, at the smallest size: logs, console, checkpoints, resuming, refusals."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import train
from fastmon import checkpoint, config
from fastmon.report.runlog import read_run
from tests.tiny_run import STEPS, flags, losses, rows, run, spawn

LINE = re.compile(r"step:(\d+)/(\d+) (train|val)_loss:(\d+\.\d{4}) train_time:\d+\.\dms step_avg:\d+\.\d\dms")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return flags(tmp_path_factory.mktemp("data"))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    """A finished run."""
    base = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)  # as in the processes that tests spawn
    assert run(*tiny, "--run-dir", base, "--run-name", "full") == 0
    return base / "full"


def test_the_log_has_a_header_and_one_row_a_step(full):
    header = json.loads((full / "metrics.jsonl").read_text().splitlines()[0])
    assert header["config"]["seq_len"] == 16
    assert header["versions"]["torch"] == torch.__version__
    assert header["precision"] == "fp32"
    assert "(cpu), 1 process(es)" in header["device"]
    assert header["ops"].keys() >= {"moments", "pair_moments", "spectral_norm", "newton_schulz"}
    assert header["workload"]["parameters"] > 0
    assert header["units"]["Loss/train_loss"] == "nats"
    found = rows(full)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert [step for step, row in found.items() if "Loss/val_loss" in row] == [
        2,
        3,
        4,
        6,
    ]  # also before every save
    for row in found.values():
        assert row["Optimization/grad_norm"] > 0
        assert row["Gradients/nonfinite"] == 0
        assert row["Model/spectral_norm_max"] > 0
        assert row["Time/data_ms"] >= 0
        rates = {name for name in row if name.startswith("Optimization/lr/")}
        assert rates == {f"Optimization/lr/{group}" for group in ("qkv", "matrix", "other")}
    lr = [row["Optimization/lr"] for row in found.values()]
    assert lr == pytest.approx([0.005, 0.01, 0.01 * 0.86820, 0.01 * 0.55, 0.01 * 0.23180, 0.001], rel=1e-4)
    assert list(rows(full, "params.jsonl")) == [1, 2, 3, 4, 5, 6]


def test_the_console_speaks_as_speedrun_readers_expect(full):
    said = (full / "console.log").read_text().splitlines()
    lines = [found.groups() for line in said if (found := LINE.fullmatch(line))]
    kinds = [(int(step), kind) for step, of, kind, _ in lines if of == str(STEPS)]
    assert kinds == [(1, "train"), (2, "val"), (3, "val"), (4, "val"), (6, "val")]
    table = rows(full)
    for step, _, kind, loss in lines:
        assert loss == f"{table[int(step)][f'Loss/{kind}_loss']:.4f}"
    start = "\n".join(said[:8])
    for word in (
        "device: ",
        "precision: fp32",
        "attention torch scaled_dot_product",
        "ops: ",
        "config: ",
        "seq_len 16",
    ):
        assert word in start
    assert "effective batch: 2 sequences x 2 micro-batches = 64 tokens a step" in start
    assert said[-1] == f"summary: {full / 'summary.md'}"
    assert (full / "summary.md").is_file()


def test_checkpoints_follow_validation(full):
    found = {
        path.name: checkpoint.read_manifest(path)["facts"]
        for _, path in checkpoint.steps(full / "checkpoints")
    }
    table = rows(full)
    assert found == {
        "step_2": {"Loss/val_loss": table[2]["Loss/val_loss"]},
        "step_4": {"Loss/val_loss": table[4]["Loss/val_loss"]},
        "final_step_6": {"Loss/val_loss": table[6]["Loss/val_loss"]},
    }


def test_the_loss_falls(full):
    assert rows(full)[6]["Loss/val_loss"] < rows(full)[2]["Loss/val_loss"] - 0.01


def test_the_record_is_a_configuration(full):
    got = config.parse(["--config", str(full / "config.json")], {})
    assert got.run_name == "full"
    assert got.seq_len == 16
    assert got.resume is None


def cut(full: Path, to: Path, *, after: int) -> Path:
    """Copy a run as a kill would have left it: checkpoints up to `after`, one more row, and a torn one."""
    shutil.copytree(full, to)
    for step, path in checkpoint.steps(to / "checkpoints"):
        if step > after:
            shutil.rmtree(path)
    for name in ("metrics.jsonl", "params.jsonl"):
        lines = (to / name).read_text().splitlines(keepends=True)
        (to / name).write_text("".join(lines[: after + 2]) + lines[after + 2][:40])
    (to / "checkpoints" / f".step_{after + 2}.4711").mkdir()
    return to


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(full, tmp_path, capsys):
    torn = cut(full, tmp_path / "torn", after=4)
    assert run("--resume", torn) == 0
    said = capsys.readouterr().out
    for sentence in (
        "going on after step 4 of 6",
        "metrics.jsonl: repaired a torn last line (40 bytes cut)",
        "metrics.jsonl: cut 1 rows after step 4",
        "removed .step_6.4711, left by a killed save",
    ):
        assert sentence in said
    assert losses(torn) == losses(full)
    assert_same_weights(torn / "checkpoints" / "final_step_6", full / "checkpoints" / "final_step_6")
    assert list(rows(torn, "params.jsonl")) == [1, 2, 3, 4, 5, 6]


def test_a_corrupted_checkpoint_is_named_and_the_one_before_is_taken(full, tmp_path, capsys):
    torn = cut(full, tmp_path / "torn", after=4)
    os.truncate(torn / "checkpoints" / "step_4" / "model.safetensors", 100)
    assert run("--resume", torn) == 0
    said = capsys.readouterr().out
    assert "passed over:" in said
    assert "step_4 is torn: model.safetensors has 100 bytes" in said
    assert "going on after step 2 of 6" in said
    assert losses(torn) == losses(full)
    assert run("--resume", torn / "checkpoints" / "step_4.superseded") == 2


def test_without_a_checkpoint_a_resumed_run_starts_over_and_says_so(full, tmp_path, tiny, capsys):
    torn = cut(full, tmp_path / "torn", after=0)
    assert run("--resume", torn, "--steps", "2", "--schedule", "constant") == 0
    assert "going on after step 0 of 2: no complete checkpoint" in capsys.readouterr().out
    assert losses(torn)[0] == losses(full)[0]
    fresh = ["--run-dir", tmp_path, "--run-name", "fresh", "--resume", "--steps", "1"]
    assert run(*tiny, *fresh) == 0
    assert "no complete checkpoint" in capsys.readouterr().out


def test_a_run_cannot_end_before_it_is(full, capsys):
    before = {path: path.read_bytes() for path in full.rglob("*") if path.is_file()}
    assert run("--resume", full, "--steps", "3") == 2
    assert capsys.readouterr().err == "train.py: --steps 3 is less than the 6 that the run has done\n"
    assert {path: path.read_bytes() for path in full.rglob("*") if path.is_file()} == before


def test_a_run_can_be_made_longer(full, tmp_path):
    longer = tmp_path / "longer"
    shutil.copytree(full, longer)
    assert run("--resume", longer, "--steps", STEPS + 2) == 0
    lines = [json.loads(line) for line in (longer / "metrics.jsonl").read_text().splitlines()]
    headers = [
        (at, one["after_step"], one["config"]["steps"]) for at, one in enumerate(lines) if "step" not in one
    ]
    assert headers == [(0, 0, STEPS), (1 + STEPS, STEPS, STEPS + 2)]
    log = read_run(longer / "metrics.jsonl")
    assert (log.broken, log.header["config"]["steps"]) == ([], STEPS + 2)
    assert log.series("Loss/train_loss").steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(rows(longer)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (longer / "checkpoints" / "final_step_8").is_dir()


def test_a_signal_leaves_a_resumable_run(full, tiny, tmp_path):
    number = signal.SIGTERM
    child = spawn(
        *tiny, "--run-dir", tmp_path, "--run-name", "stopped", "--steps", "100000", "--schedule", "constant"
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step:10/"):
            break
    child.send_signal(number)
    out, error = child.communicate(timeout=120)
    assert child.returncode == 128 + number, error
    last = out.splitlines()[-1]
    found = re.fullmatch(rf"{number.name} after step (\d+): go on with train.py --resume (.*)", last)
    assert found is not None, last
    step, folder = int(found[1]), Path(found[2])
    assert folder == tmp_path / "stopped"
    assert checkpoint.newest(folder / "checkpoints", say=pytest.fail)[0] == step
    assert list(rows(folder)) == list(range(1, step + 1))
    assert run("--resume", folder, "--steps", step + 1) == 0
    assert list(rows(folder)) == list(range(1, step + 2))


def test_killed_at_any_moment_it_resumes(tiny, tmp_path):
    command = [
        *tiny,
        "--run-dir",
        tmp_path,
        "--run-name",
        "killed",
        "--steps",
        "100000",
        "--save-interval",
        "1",
    ]
    child = spawn(*command, "--schedule", "constant")
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step:8/"):
            break
    time.sleep(0.01 * (os.getpid() % 7))
    child.kill()
    child.communicate(timeout=60)
    assert run("--resume", tmp_path / "killed", "--steps", "40") == 0
    assert list(rows(tmp_path / "killed")) == list(range(1, 41))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("monitor", ["off", "cheap", "full"])
def test_watching_changes_no_loss_and_no_weight(full, tiny, tmp_path, monitor):
    assert run(*tiny, "--run-dir", tmp_path, "--run-name", monitor, "--monitor", monitor) == 0
    other = tmp_path / monitor
    assert losses(other) == losses(full)
    assert_same_weights(other / "checkpoints" / "final_step_6", full / "checkpoints" / "final_step_6")
    observed = {name.split("/")[0] for row in rows(other).values() for name in row}
    assert ("Model" in observed) == (monitor != "off")
    assert ("Activations" in observed) == (monitor == "full")


def test_monitor_schedules_come_from_flags_and_environment(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MONITOR_SPECTRAL_EVERY", "3")
    monkeypatch.setenv("MONITOR_ACTIVATIONS", "true")
    more = ["--monitor", "cheap", "--monitor-activations-every", "4"]
    assert run(*tiny, "--run-dir", tmp_path, "--run-name", "x", *more) == 0
    table = rows(tmp_path / "x")
    assert [s for s, row in table.items() if "Model/spectral_norm_max" in row] == [1, 3, 6]
    assert [s for s, row in table.items() if "Activations/blocks.0_std" in row] == [1, 4]


def test_a_variable_that_the_monitor_ignores_is_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MONITOR_SPECTRAL_EVERY", "3")
    assert run(*tiny, "--run-dir", tmp_path, "--run-name", "x", "--monitor", "off", "--steps", "1") == 0
    assert "--monitor-spectral-every has no effect with --monitor off" in capsys.readouterr().out


def test_eval_only_prints_the_loss_and_writes_nothing(full, tiny, tmp_path, capsys):
    before = sorted(path for path in full.rglob("*"))
    assert run("--resume", full, "--eval-only") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"step:6/6 val_loss:{rows(full)[6]['Loss/val_loss']:.4f}"
    assert run("--resume", full / "checkpoints" / "step_2", "--eval-only") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"step:2/6 val_loss:{rows(full)[2]['Loss/val_loss']:.4f}"
    assert sorted(path for path in full.rglob("*")) == before
    assert "untrained" not in capsys.readouterr().out
    assert run(*tiny, "--eval-only", "--run-dir", tmp_path / "none") == 0
    assert "untrained weights: no checkpoint was read" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_rotation_keeps_the_newest_the_best_and_the_final(tiny, tmp_path):
    more = ["--save-interval", "1", "--keep-checkpoints", "1", "--steps", "4", "--grad-clip", "0"]
    assert run(*tiny, "--run-dir", tmp_path, "--run-name", "x", *more) == 0
    table = rows(tmp_path / "x")
    best = min((1, 2, 3), key=lambda step: table[step]["Loss/val_loss"])
    names = {path.name for _, path in checkpoint.steps(tmp_path / "x" / "checkpoints")}
    assert names == {"step_3", f"step_{best}", "final_step_4"}


def test_accumulation_is_a_larger_batch(full, tiny, tmp_path):
    assert run(*tiny, "--run-dir", tmp_path, "--run-name", "x", "--batch-size", "4", "--grad-accum", "1") == 0
    ours, theirs = losses(tmp_path / "x"), losses(full)
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=1e-4)


def test_bf16_trains(full, tiny, tmp_path):
    more = ["--precision", "bf16", "--grad-checkpointing", "--optimizer", "adamw"]
    assert run(*tiny, "--run-dir", tmp_path, "--run-name", "x", *more) == 0
    found = losses(tmp_path / "x")
    assert found[0][1] == pytest.approx(losses(full)[0][1], rel=5e-3)  # 8 bits of significand
    assert found[0][1] != losses(full)[0][1]
    assert found[-1][2] < found[0][1]
    kept = checkpoint.load(tmp_path / "x" / "checkpoints" / "final_step_6")["model"]
    assert all(weight.dtype == torch.float32 for weight in kept.values())


@pytest.mark.slow
def test_compiled_it_learns_the_same(full, tiny, tmp_path):
    assert run(*tiny, "--run-dir", tmp_path, "--run-name", "x", "--compile") == 0
    ours = [loss for _, loss, _ in losses(tmp_path / "x")]
    assert ours == pytest.approx([loss for _, loss, _ in losses(full)], rel=1e-4)


def test_the_roles_of_parameters():
    """Each rule gets its parameters once; only matrices decay; a fused projection is three matrices to Muon."""
    names = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc.weight", "tok_emb.weight", "norm.weight")
    shapes = ((24, 8), (32, 8), (64, 8), (8,))
    named = {n: torch.nn.Parameter(torch.ones(s)) for n, s in zip(names, shapes, strict=True)}
    roles = {"matrix": dict(list(named.items())[:2]), "other": dict(list(named.items())[2:])}
    cfg = config.parse(["--weight-decay", "0.5", "--lr", "0.25"], {})
    for rule in (train.adamw, train.sgd):
        groups = rule(roles, cfg).param_groups
        assert [(len(g["params"]), g["weight_decay"], g["lr"]) for g in groups] == [
            (2, 0.5, 0.25),
            (2, 0.0, 0.25),
        ]
    groups = train.muon(roles, cfg).param_groups
    assert [(g["name"], g["split"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        ("qkv", 3, [(24, 8)]),
        ("matrix", 1, [(32, 8)]),
    ]
    assert {g["weight_decay"] for g in groups} == {0.5}
