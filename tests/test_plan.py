"""The plan: names, pieces, roles, groups, ties, and views that follow the memory."""

import pytest
import torch
from torch import nn

from fastmon.plan import Plan, role, split_param


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.fc = nn.Linear(d, 2 * d)


class Model(nn.Module):
    def __init__(self, d=8, vocab=11):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList([Block(d), Block(d)])
        self.conv = nn.Conv1d(4, 6, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.lm_head = nn.Linear(d, vocab, bias=False)


def test_pieces_roles_and_groups():
    plan = Plan(Model())
    roles = {piece.name: piece.role for piece in plan.pieces}
    assert roles["tok_emb.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["blocks.0.norm.weight"] == roles["blocks.1.fc.bias"] == "vector"
    assert [name for name, kind in roles.items() if kind == "matrix"] == [
        "experts.0",
        "experts.1",
        "experts.2",
        "blocks.0.qkv.weight.q",
        "blocks.0.qkv.weight.k",
        "blocks.0.qkv.weight.v",
        "blocks.0.fc.weight",
        "blocks.1.qkv.weight.q",
        "blocks.1.qkv.weight.k",
        "blocks.1.qkv.weight.v",
        "blocks.1.fc.weight",
        "conv.weight",
    ]
    group = plan.groups["matrix", (8, 8), torch.float32]
    assert [plan.pieces[i].name for i in group] == [
        f"blocks.{b}.qkv.weight.{part}" for b in (0, 1) for part in "qkv"
    ]
    assert sorted(slot for slots in plan.groups.values() for slot in slots) == list(range(len(plan.pieces)))


def test_views_are_the_parameters_themselves():
    model = Model()
    plan = Plan(model)
    views = dict(zip([p.name for p in plan.pieces], plan.weights(), strict=True))
    qkv = model.blocks[1].qkv.weight
    for i, part in enumerate("qkv"):
        assert torch.equal(views[f"blocks.1.qkv.weight.{part}"], qkv[8 * i : 8 * (i + 1)])
    assert views["experts.2"].data_ptr() == model.experts[2].data_ptr()
    assert sum(v.numel() for v in views.values()) == sum(p.numel() for p in model.parameters())
    assert not any(v.requires_grad for v in views.values())
    assert plan.weights() is plan.weights()
    with torch.no_grad():
        qkv.fill_(3.0)
    assert (views["blocks.1.qkv.weight.v"] == 3).all()


def test_views_follow_parameters_whose_memory_moved():
    model = Model()
    plan = Plan(model)
    plan.weights()
    model.lm_head.weight.data = torch.full((11, 8), 5.0)
    assert (plan.weights()[-1] == 5).all()


def test_views_of_some_parameters():
    model = Model()
    plan = Plan(model)
    chosen = [i for i, name in enumerate(plan.names) if "blocks.0" in name]
    views = plan.views([plan.parameters[i] for i in chosen], chosen)
    assert [tuple(v.shape) for v in views] == [p.shape for p in plan.pieces if p.name.startswith("blocks.0")]


def test_tied_weights_count_once_and_frozen_ones_not():
    model = Model()
    model.lm_head.weight = model.tok_emb.weight
    model.blocks[0].fc.weight.requires_grad_(False)
    names = [piece.name for piece in Plan(model).pieces]
    assert "lm_head.weight" not in names
    assert names.count("tok_emb.weight") == 1
    assert "blocks.0.fc.weight" not in names
    assert "blocks.0.fc.bias" in names


def test_params_chooses_what_is_logged_not_what_is_clipped():
    plan = Plan(Model(), params=r"fc|qkv.*\.k$")
    logged = [plan.pieces[i].name for i in plan.logged("matrix")]
    assert logged == [
        "blocks.0.qkv.weight.k",
        "blocks.0.fc.weight",
        "blocks.1.qkv.weight.k",
        "blocks.1.fc.weight",
    ]
    assert len(plan.pieces) == len(Plan(Model()).pieces)
    with pytest.raises(ValueError, match=r"params='nothing' matches none"):
        Plan(Model(), params="nothing")


@pytest.mark.parametrize(
    ("name", "shape", "suffixes"),
    [
        ("a.qkv.weight", (24, 8), ["q", "k", "v"]),
        ("h.0.attn.c_attn.weight", (8, 24), ["q", "k", "v"]),
        ("attn.in_proj_weight", (24, 8), ["q", "k", "v"]),
        ("attn.qkv_w", (3, 8, 8), ["q", "k", "v"]),
        ("moe.w1", (4, 8, 5), ["0", "1", "2", "3"]),
        ("attn.qkv.weight", (20, 8), []),  # grouped queries: not three equal parts
        ("mlp.fc.weight", (24, 8), []),
        ("attn.qkv.bias", (24,), []),
    ],
)
def test_split_param(name, shape, suffixes):
    p = torch.randn(shape)
    pieces = split_param(name, p)
    assert [n for n, _ in pieces] == ([f"{name}.{s}" for s in suffixes] or [name])
    assert torch.equal(
        torch.cat([v.reshape(-1) for _, v in pieces]).sort().values, p.reshape(-1).sort().values
    )
    assert all(v.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for _, v in pieces)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("transformer.wte.weight", "embedding"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("classifier.weight", "head"),
        ("layers.0.head_mixer.weight", "matrix"),
        ("blocks.3.mlp.fc.weight", "matrix"),
        ("member.weight", "matrix"),
    ],
)
def test_roles_by_name(name, wanted):
    assert role(name, torch.empty(4, 4)) == wanted
    assert role(name, torch.empty(4)) == "vector"


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("cls_token", (1, 1, 8), "embedding"),
        ("mask_token", (1, 8), "embedding"),
        ("encoder.register_tokens", (1, 4, 8), "embedding"),
        ("pos_embed", (1, 5, 8), "embedding"),
        ("vit.pos_embed.weight", (5, 8), "embedding"),
        ("blocks.0.gamma", (1, 1, 8), "vector"),
        ("blocks.0.scale", (8, 1, 1), "vector"),
        ("blocks.0.fc.weight", (1, 8), "vector"),
    ],
)
def test_learned_tokens_positions_and_thin_parameters_stay_whole(name, shape, wanted):
    p = torch.randn(shape)
    assert role(name, p) == wanted
    assert split_param(name, p) == [(name, p)]


def test_a_vision_transformer_has_no_false_matrices():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
            self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
            self.stack = nn.Parameter(torch.randn(1, 4, 8))
            self.fc = nn.Linear(8, 8)

    plan = Plan(Vision())
    assert [(p.name, p.role) for p in plan.pieces] == [
        ("cls_token", "embedding"),
        ("pos_embed", "embedding"),
        ("stack.0", "matrix"),
        ("fc.weight", "matrix"),
        ("fc.bias", "vector"),
    ]
    assert [tuple(w.shape) for w in plan.weights()] == [p.shape for p in plan.pieces]


def test_a_filter_is_one_matrix():
    plan = Plan(nn.Sequential(nn.Conv2d(3, 5, 2, bias=False), nn.Conv1d(3, 5, 2, bias=False)))
    assert [(p.name, p.role, p.shape) for p in plan.pieces] == [
        ("0.weight", "matrix", (5, 3, 2, 2)),
        ("1.weight", "matrix", (5, 3, 2)),
    ]


def test_prepared_ops_take_lists_of_any_length():
    plan = Plan(Model())
    call = plan.prepare("moments", plan.weights(), 2)
    for xs in (plan.weights(), plan.weights()[:3]):
        counts, stats = call(xs, 2)
        torch.testing.assert_close(stats[6], torch.stack([x.norm() for x in xs]))
        assert counts[0].tolist() == [x.numel() for x in xs]


def test_a_model_without_trainable_parameters_has_an_empty_plan():
    plan = Plan(nn.ReLU())
    assert plan.pieces == ()
    assert plan.weights() == []
