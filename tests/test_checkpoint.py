"""Checkpoints: whole or absent, checked, never executed."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmon import checkpoint


def state(step: int = 1) -> dict:
    torch.manual_seed(step)
    weight = torch.randn(5, 3)
    return {
        "model": {
            "embedding": weight,
            "head": weight,
            "bf16": torch.randn(4).bfloat16(),
            "scalar": torch.tensor(2.5),
        },
        "optimizers": [
            {
                "state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(5, 3)}},
                "groups": [{"lr": 1e-3}],
            }
        ],
        "progress": {"step": step, "samples": 96, "nothing": None, "pair": (1, 2.5), "flag": True},
        "random": [checkpoint.random_state()],
    }


def assert_same(a, b):
    assert type(a) is type(b) or isinstance(a, dict)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.fixture(params=["safetensors", "torch alone"])
def package(request, monkeypatch):
    if request.param == "torch alone":
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name)
        )
    return request.param


def test_what_is_saved_is_loaded(tmp_path, package):
    path = checkpoint.save(tmp_path, 12, state(), facts={"Loss/val_loss": 3.5})
    assert path == tmp_path / "step_12"
    assert_same(state(), checkpoint.load(path))
    names = {file.name for file in path.iterdir()}
    assert ("model.safetensors" in names) == (package == "safetensors")
    assert checkpoint.read_manifest(path)["facts"] == {"Loss/val_loss": 3.5}
    assert [p.name for p in tmp_path.iterdir()] == ["step_12"]  # no temporary folder is left


def test_tied_weights_stay_tied(tmp_path):
    part = checkpoint.load(checkpoint.save(tmp_path, 1, state()))["model"]
    assert part["embedding"].data_ptr() == part["head"].data_ptr()


def test_overlapping_tensors_are_saved_whole(tmp_path):
    base = torch.arange(12.0)
    part = {"all": base, "tail": base[4:]}
    assert_same(part, checkpoint.load(checkpoint.save(tmp_path, 1, {"model": part}))["model"])


def test_a_checkpoint_of_safetensors_without_the_package_names_it(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, 1, state())
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "safetensors" else find(name)
    )
    with pytest.raises(checkpoint.CheckpointError, match="pip install safetensors"):
        checkpoint.load(path)


def test_objects_are_refused_when_saving(tmp_path):
    with pytest.raises(TypeError, match=r"model\['x'\]\[0\] is a Stranger"):
        checkpoint.save(tmp_path, 1, {"model": {"x": [Stranger()]}})
    assert list(tmp_path.iterdir()) == []


class Stranger:
    pass


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"progress": {"step": 1}})
    victim = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(victim),))

    file = path / "progress.pt"
    torch.save({"step": Evil()}, file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["progress.pt"] |= {"sha256": checkpoint._digest(file), "bytes": file.stat().st_size}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.CheckpointError, match="more than tensors and plain values"):
        checkpoint.load(path)
    assert not victim.exists()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": (lambda path: flip(path / "optimizers.pt"), "corrupted: the sha256 of optimizers.pt"),
    "a file cut short": (
        lambda path: os.truncate(path / "model.safetensors", 40),
        "torn: model.safetensors has 40",
    ),
    "a missing file": (lambda path: (path / "random.pt").unlink(), "random.pt is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "no complete checkpoint"),
    "a torn manifest": (lambda path: os.truncate(path / "manifest.json", 30), "manifest.json is not JSON"),
    "another format": (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "another format"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, damage):
    spoil, message = DAMAGE[damage]
    checkpoint.save(tmp_path, 9, state(9))
    spoil(checkpoint.save(tmp_path, 10, state(10)))
    said: list[str] = []
    found = checkpoint.newest(tmp_path, say=said.append)
    assert found is not None
    assert found[:2] == (9, tmp_path / "step_9")
    assert_same(found[2]["model"], state(9)["model"])
    assert len(said) == 1
    assert message in said[0]
    assert "step_10" in said[0]


def test_newest_counts_and_does_not_spell(tmp_path):
    for step in (9, 100, 20):
        checkpoint.save(tmp_path, step, {"progress": {"step": step}})
    checkpoint.save(tmp_path, 101, {"progress": {"step": 101}}, prefix="final_")
    (tmp_path / "step_5000.bak").mkdir()
    found = checkpoint.newest(tmp_path, say=pytest.fail)
    assert found is not None
    assert found[:2] == (101, tmp_path / "final_step_101")


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", say=pytest.fail) is None


def test_rotation_keeps_the_newest_the_best_and_the_final(tmp_path):
    losses = {1: 9.0, 2: 3.0, 3: 5.0, 4: 4.0, 5: 6.0}
    for step, loss in losses.items():
        checkpoint.save(tmp_path, step, {"progress": {"step": step}}, facts={"Loss/val_loss": loss})
    checkpoint.save(tmp_path, 5, {"progress": {"step": 5}}, prefix="final_", facts={"Loss/val_loss": 6.0})
    gone = checkpoint.rotate(tmp_path, keep=2, best="Loss/val_loss")
    assert sorted(path.name for path in gone) == ["step_1", "step_3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final_step_5", "step_2", "step_4", "step_5"]


def test_saving_again_replaces(tmp_path):
    checkpoint.save(tmp_path, 3, state(1))
    path = checkpoint.save(tmp_path, 3, state(2))
    assert_same(checkpoint.load(path)["model"], state(2)["model"])
    assert [p.name for p in tmp_path.iterdir()] == ["step_3"]


def test_a_full_disk_leaves_nothing_of_the_name(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_digest", refuse)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 3, state())
    assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_flush_leaves_whole_checkpoints_alone(tmp_path, monkeypatch, replacing):
    """Nothing of a name is there before all of it is, whichever write is the last one."""
    for fatal in range(1, 20):
        folder, done = tmp_path / str(fatal), 0
        checkpoint.save(folder, 1, state(1))
        if replacing:
            checkpoint.save(folder, 2, state(3))

        def flush(path, fatal=fatal, real=checkpoint.flush):
            nonlocal done
            done += 1
            if done == fatal:
                raise Killed
            real(path)

        with monkeypatch.context() as kill:
            kill.setattr(checkpoint, "flush", flush)
            kill.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # the dead tidy nothing up
            try:
                checkpoint.save(folder, 2, state(2))
            except Killed:
                pass
            else:
                assert fatal > 6  # four parts, the manifest, two folders
                return
        found = checkpoint.newest(folder, say=pytest.fail)
        assert found is not None
        step, path, loaded = found
        assert step in (1, 2)
        assert len(list(path.iterdir())) == 5
        assert_same(loaded["model"], state({1: 1, 2: 3 if replacing and done < 7 else 2}[step])["model"])


SAVER = """
import sys, torch
from pathlib import Path
from fastmon import checkpoint
step = 0
while True:
    step += 1
    part = {str(i): torch.full((64, 64), float(step)) for i in range(8)}
    checkpoint.save(Path(sys.argv[1]), step, {"model": part, "progress": {"step": step}})
    checkpoint.rotate(Path(sys.argv[1]), keep=2)
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_last_whole_one_loads(tmp_path):
    draw = random.Random(0)
    for trial in range(3):
        folder = tmp_path / str(trial)
        child = subprocess.Popen([sys.executable, "-c", SAVER, folder], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        finished = 0
        while finished < 3:
            finished = int(child.stdout.readline())
        time.sleep(draw.uniform(0, 0.02))
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
        child.wait()
        finished = int(rest[-1]) if rest else finished
        found = checkpoint.newest(folder, say=pytest.fail)  # torn ones do not carry the name
        assert found is not None
        step, _, loaded = found
        assert step in (finished, finished + 1)
        assert loaded["progress"]["step"] == step
        assert all(torch.equal(one, torch.full((64, 64), float(step))) for one in loaded["model"].values())
        checkpoint.sweep(folder)
        assert all(not path.name.startswith(".") for path in folder.iterdir())


def test_an_abandoned_draft_is_swept_and_never_found(tmp_path):
    checkpoint.save(tmp_path, 1, {"progress": {"step": 1}})
    (tmp_path / ".step_2.4711").mkdir()
    (tmp_path / ".old.step_1.4711").mkdir()
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [1]
    assert len(checkpoint.sweep(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_every_generator_continues_where_it_was(tmp_path):
    def draws():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(1).tolist(),
            torch.rand(3).tolist(),
        )

    draws()
    path = checkpoint.save(tmp_path, 1, {"random": checkpoint.random_state()})
    wanted = draws()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    checkpoint.restore_random_state(checkpoint.load(path)["random"])
    assert draws() == wanted
