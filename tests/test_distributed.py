"""Ranks: two processes under torchrun do what one does; nothing hangs when one of them fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmon import checkpoint, distributed
from fastmon.backend import BackendError
from tests.tiny_run import ROOT, flags, losses, rows, run, spawn

LOSS_TOLERANCE = 1e-4  # relative, over these steps: fp32 sums in another order
NORM_TOLERANCE = 1e-3  # a gradient moves more than the loss it is the slope of


def test_devices_are_picked_or_refused():
    assert distributed.pick_device("cpu") == torch.device("cpu")
    assert distributed.pick_device("auto").type in ("cpu", "cuda", "mps")
    for wish, message in (
        ("tpu", "--device 'tpu' does not exist"),
        ("meta", "--device 'meta' does not exist"),
        (f"cuda:{torch.cuda.device_count()}", "this machine has"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.pick_device(wish)


def test_one_process_needs_no_group():
    with distributed.process_group("cpu", {}) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.first) == (0, 1, True)
        flat = torch.tensor([1.0, 2.0])
        assert distributed.all_reduce(flat) is flat
        assert distributed.gather("x") == ["x"]
        module = torch.nn.Linear(2, 2)
        assert distributed.wrap(module, ranks) is module
        agreement = distributed.Agreement()
        assert [agreement.any(wish) for wish in (False, True, False)] == [False, True, False]


def test_a_failure_becomes_one_sentence():
    def fail(error):
        raise error

    assert distributed.together(lambda: 3) == 3
    with pytest.raises(distributed.Refused, match=r"^too wide$"):
        distributed.together(lambda: fail(ValueError("too wide")))
    with pytest.raises(distributed.Refused, match=r"^a/b: No space left on device$"):
        distributed.together(lambda: fail(OSError(28, "No space left on device", "a/b")))
    with pytest.raises(distributed.Refused, match=r"^no row$"):
        distributed.together(lambda: fail(BackendError("no row")))
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        distributed.together(lambda: 1 // 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def ranks_of(code: str, count: int = 2) -> list[subprocess.Popen[str]]:
    """Start `code` in `count` processes that torchrun's environment joins."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(count)
    ]


COLLECTIVES = """
import torch
from fastmon.distributed import *
with process_group("cpu") as ranks:
    assert all_reduce(torch.tensor([1.0, ranks.rank])).tolist() == [2.0, 1.0]
    assert gather(ranks.rank * 10) == [0, 10]
    agreement = Agreement()
    wishes = [agreement.any(ranks.rank == 1 and step >= 2) for step in range(5)]
    assert wishes == [False, False, False, True, True], wishes  # one step after the wish, on both ranks
    torch.manual_seed(ranks.rank)
    module = wrap(torch.nn.Linear(3, 1, bias=False), ranks)
    x = torch.full((1, 3), float(ranks.rank + 1))
    for last in (False, True):  # two micro-batches: sums on each rank, the mean over ranks
        with accumulating(module, last=last):
            module(x).sum().backward()
        if not last:  # nothing has travelled yet
            assert module.module.weight.grad.tolist() == [[ranks.rank + 1.0] * 3]
    assert module.module.weight.grad.tolist() == [[3.0, 3.0, 3.0]]
    assert len(set(gather(module.module.weight.sum().item()))) == 1  # rank 0's weights on both
    del module  # holds the group; a group that outlives the interpreter's threads aborts at exit
    try:
        together(lambda: [].index(1) if ranks.rank == 1 else "fine")
    except Refused as refused:
        print(refused)
"""


def test_the_collectives_of_two_ranks():
    for child in ranks_of(COLLECTIVES):
        out, error = child.communicate(timeout=120)
        assert child.returncode == 0, error
        assert out == "1 is not in list\n"


DYING = """
import os, torch
from fastmon.distributed import *
with process_group("cpu") as ranks:
    all_reduce(torch.ones(1))
    if ranks.rank == 1:
        os._exit(7)
    all_reduce(torch.ones(1))
"""


def test_a_rank_that_dies_ends_the_others():
    first, second = ranks_of(DYING)
    second.wait(timeout=120)
    first.communicate(timeout=60)
    assert (second.returncode, first.returncode != 0) == (7, True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return flags(folder, "--grad-accum", "4", "--val-batches", "3", "--run-dir", str(folder / "runs"))


def torchrun(*argv: str) -> subprocess.Popen[str]:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}")
    return spawn(*argv, launcher=launcher)


def test_two_processes_train_as_one(tiny):
    base = Path(tiny[-1])
    child = torchrun(*tiny, "--run-name", "two")
    assert run(*tiny, "--run-name", "one") == 0
    out, error = child.communicate(timeout=240)
    assert child.returncode == 0, error
    assert len(re.findall(r"^step:6/6 val_loss", out, flags=re.M)) == 1  # rank 0 alone speaks
    assert "2 process(es)" in out
    one, two = rows(base / "one"), rows(base / "two")
    assert one.keys() == two.keys()
    for step, row in one.items():
        for name in ("Loss/train_loss", "Loss/val_loss", "Optimization/grad_norm", "Model/spectral_norm_max"):
            assert (name in row) == (name in two[step])
            if name in row:
                rel = LOSS_TOLERANCE if "Loss" in name else NORM_TOLERANCE
                assert two[step][name] == pytest.approx(row[name], rel=rel), (step, name)

    # a run of two processes goes on as one
    assert run("--resume", base / "two", "--steps", "8") == 0
    assert run("--resume", base / "one", "--steps", "8") == 0
    ours, theirs = losses(base / "two"), losses(base / "one")
    assert len(ours) == 8
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=LOSS_TOLERANCE)


def test_an_impossible_split_is_refused_by_all_and_leaves_nothing(tiny):
    child = torchrun(*tiny, "--run-name", "odd", "--grad-accum", "3")
    _, error = child.communicate(timeout=240)
    assert child.returncode == 1  # torchrun's own
    assert error.count("train.py: --grad-accum 3 does not split over 2 processes") == 1
    assert "exitcode" in error
    assert re.search(r"exitcode\s*:\s*2\b", error)
    assert not (Path(tiny[-1]) / "odd").exists()


def test_torchrun_stopped_by_a_signal_leaves_a_resumable_run(tiny):
    folder = Path(tiny[-1]) / "stopped"
    child = torchrun(*tiny, "--run-name", "stopped", "--steps", "100000", "--save-interval", "0")
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step:10/"):
            break
    time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=120)
    found = re.search(r"SIGTERM after step (\d+): go on with", out)
    assert found is not None, out
    newest = checkpoint.newest(folder / "checkpoints", say=pytest.fail)
    assert newest is not None
    assert newest[0] == int(found[1])
    assert list(rows(folder)) == list(range(1, newest[0] + 1))
