"""The transformer: shapes, the properties that define it, its formulas by hand."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

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
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


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
