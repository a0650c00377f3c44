"""What fails is switched off, on every rank, and the run goes on."""

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

import fastmon
from tests.tiny import Rows, Tiny, tokens


@pytest.mark.parametrize("call", ["begin", "before_update", "enqueue", "decode", "micro_step"])
def test_an_observer_that_raises_is_switched_off_with_one_warning(call, monkeypatch):
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = Rows()
    mon = fastmon.Monitor(model, optimizer, sinks=[sink])
    broken = next(o for o in mon._observers if type(o).__name__ == "SpectralNorms")

    def explode(*args):
        raise RuntimeError("boom")

    monkeypatch.setattr(broken, call, explode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 5):
            loss = model(tokens(step))
            loss.backward()
            mon.micro_step()
            optimizer.step()
            mon.step(step, {"Loss/train_loss": loss})
            optimizer.zero_grad()
    said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert said == ["the observer SpectralNorms is switched off: RuntimeError: boom"]
    events = [event for row in sink.rows for event in row.events]
    assert events == [{"event": "observer_off", "observer": "SpectralNorms", "reason": "RuntimeError: boom"}]
    assert len(sink.rows) == 4
    assert "Model/spectral_norm_max" not in sink[3]
    assert "Optimization/update_norm" in sink[3]
    assert "Model/param_norm" in sink[3], "who relied on the failed one helps itself"
    mon.close()


RANKS = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
import fastmon, warnings
from torch.nn.parallel import DistributedDataParallel
from tests.tiny import Rows, Tiny, tokens
dist.init_process_group("gloo")
rank, mode = dist.get_rank(), sys.argv[1]
torch.manual_seed(0)
model = Tiny(p=0.0)
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
sink = Rows()
mon = fastmon.Monitor(wrapped, optimizer, sinks=[sink])
if mode == "fail" and rank == 1:
    broken = next(o for o in mon._observers if type(o).__name__ == "SpectralNorms")
    def explode(*args): raise RuntimeError("boom")
    broken.enqueue = explode
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(1, 4):
        loss = wrapped(tokens(2 * step + rank))
        loss.backward()
        norm = mon.clip_grad_norm_(0.5)
        optimizer.step()
        mon.step(step, {"Loss/train_loss": loss})
        optimizer.zero_grad()
mon.close()
losses = [torch.zeros(()) for _ in range(2)]
dist.all_gather(losses, loss.detach())
if mode == "fail":
    said = [str(w.message) for w in caught if "observer" in str(w.message)]
    reason = "RuntimeError: boom" if rank == 1 else "it failed on another rank"
    assert said == [f"the observer SpectralNorms is switched off: {reason}"], said
    assert all(o is None or type(o).__name__ != "SpectralNorms" for o in mon._observers)
if rank == 0:
    assert len(sink.rows) == 3
    row = sink[2]
    assert abs(row["Loss/train_loss"] - sum(losses).item() / 2) < 1e-6, (row["Loss/train_loss"], losses)
    assert abs(row["Optimization/grad_norm"] - norm.item()) < 1e-5
    assert ("Model/spectral_norm_max" in row) == (mode == "well")
    assert "Activations/blocks.0_mean" in row
else:
    assert sink.rows == []
open(f"{sys.argv[3]}/rank{rank}", "w").close()
"""


@pytest.mark.parametrize("mode", ["well", "fail"])
def test_two_ranks_share_one_row_and_one_failure(mode, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(script), mode, root, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("rank?")} == {"rank0", "rank1"}
