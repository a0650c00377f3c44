"""Activation taps: moments of all micro-batches, training only, once."""

import warnings

import pytest
import torch
from torch import nn

from fastmon.monitors import activations
from fastmon.monitors.activations import CALLS, merge_calls, select_modules
from fastmon.ops import moments
from tests.tiny import Tiny, tokens, watch


def expected_statistics(x):
    x = x.double().flatten()
    m2 = (x - x.mean()).square().mean()
    return {
        "mean": x.mean().item(),
        "std": m2.sqrt().item(),
        "min": x.min().item(),
        "max": x.max().item(),
        "l2_norm": x.norm().item(),
        "zero_frac": (x == 0).double().mean().item(),
        "kurtosis": ((x - x.mean()).pow(4).mean() / m2**2).item(),
    }


@pytest.mark.parametrize("batches", [1, 3, CALLS + 4])
def test_activation_moments_are_those_of_all_micro_batches(batches):
    model = Tiny(p=0.0)
    outputs = []
    model.blocks[1].register_forward_hook(lambda m, a, out: outputs.append(out.detach()))
    mon, sink = watch(model, preset="full", modules=r"^blocks\.1$")
    for i in range(batches):
        with torch.no_grad():
            model.tok_emb.weight.mul_(1.3)  # batches that differ in scale
        model(tokens(i)).backward()
        if i + 1 < batches:
            mon.micro_step()
    mon.step(1)
    for name, value in expected_statistics(torch.stack(outputs)).items():
        assert sink[0][f"Activations/blocks.1_{name}"] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    model(tokens(99))
    mon.step(2)
    for name, value in expected_statistics(outputs[-1]).items():
        assert sink[1][f"Activations/blocks.1_{name}"] == pytest.approx(value, rel=2e-5, abs=1e-7), name


@pytest.mark.parametrize("on", [True, False])
def test_a_captured_tap_merges_only_where_the_device_flag_is_set(on):
    a, b = torch.randn(500) * 3 + 1, torch.randn(300).relu()
    numbers = [m[:3] for m in (moments(a, order=4), moments(b, order=4))]
    rows = [torch.stack(list(m[3:])) for m in (moments(a, order=4), moments(b, order=4))]
    counts, stats = torch.stack(numbers[0])[:, 0].clone(), rows[0][:, 0].clone()
    activations._merge(counts, stats, torch.stack(numbers[1]), rows[1], torch.tensor(on))
    whole = moments(torch.cat([a, b]) if on else a, order=4)
    assert counts.tolist() == [t.item() for t in whole[:3]]
    torch.testing.assert_close(stats, torch.stack(list(whole[3:]))[:, 0], rtol=1e-4, atol=1e-4)


def test_merging_keeps_a_large_mean():
    x = torch.randn(3, 4000, dtype=torch.float64) + 1e4
    number, moment = zip(*[(m[:3], m[3:]) for m in [moments(row.float(), order=4) for row in x]], strict=True)
    number = torch.stack([torch.stack(n, dim=-1) for n in number]).numpy()
    moment = torch.stack([torch.stack(list(m), dim=-1) for m in moment]).double().numpy()
    merged = merge_calls(number, moment)
    for name, value in expected_statistics(x.float()).items():
        assert merged[name][0][0] == pytest.approx(value, rel=1e-4), name


def test_usual_taps_the_blocks_and_full_every_module():
    model = Tiny()
    assert list(select_modules(model, None, everything=False)) == ["blocks.0", "blocks.1"]
    everything = list(select_modules(model, None, everything=True))
    assert "blocks" not in everything
    assert "blocks.0.drop" in everything
    assert "lm_head" in everything
    assert list(select_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), None, everything=False)) == [
        "0",
        "1",
    ]
    assert list(select_modules(nn.ReLU(), None, everything=False)) == ["relu"]
    with pytest.raises(ValueError, match=r"modules='conv' matches none of tok_emb, blocks"):
        select_modules(model, "conv", everything=False)


@pytest.mark.parametrize("on", [True, False])
def test_the_tap_passes_opcheck(on):
    mon, _ = watch(Tiny())
    recorder = next(o for o in mon._observers if type(o).__name__ == "Activations")._recorder
    recorder.switch(on)
    buffers = (recorder.counts, recorder.stats, recorder.flag)
    torch.library.opcheck(torch.ops.fastmon.tap.default, (torch.randn(5, 3), *buffers, recorder.number, 1))
    recorder.clear()
    torch.ops.fastmon.tap(torch.randn(5, 3), *buffers, recorder.number, 1)
    assert recorder.counts[0, :, 0].tolist() == ([0, 15] if on else [0, 0])


def test_blocks_in_a_sequential_are_blocks():
    def block():
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    class Held(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.blocks = blocks

    def chosen(blocks):
        return list(select_modules(Held(blocks), None, everything=False))

    assert chosen(nn.Sequential(block(), block())) == ["blocks.0", "blocks.1"]
    assert chosen(nn.ModuleList([block(), nn.Sequential(block(), block())])) == ["blocks.0", "blocks.1"]
    assert chosen(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == ["blocks.0", "blocks.1"]
    assert chosen(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ["stem", "blocks"]
    held = Held(nn.Sequential(block(), block()))
    held.stem = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert list(select_modules(held, None, everything=False)) == ["blocks.0", "blocks.1"], (
        "layers are no blocks"
    )


def test_taps_record_training_only():
    model = Tiny()
    mon, sink = watch(model)
    recorder = next(o for o in mon._observers if type(o).__name__ == "Activations")._recorder

    def recorded():
        return recorder.counts.sum().item()

    with mon.pause():
        model(tokens(1))
    assert recorded() == 0, "paused"
    model.eval()
    model(tokens(1))
    assert recorded() == 0, "eval mode"
    model.train()
    model(tokens(1))
    assert recorded() > 0
    with mon.pause("checkpoint"):
        before = recorded()
        model(tokens(2))
        assert recorded() == before
    mon.step(1)
    assert sink[0]["Activations/blocks.0_std"] > 0
    mon.step(2)
    assert not any(k.startswith("Activations/") for k in sink[1]), "no forward pass in step 2"


def test_taps_do_not_record_a_block_twice_under_checkpointing():
    model = Tiny(p=0.0)
    tap = []
    for reentrant in (False, True):
        mon, sink = watch(model, every={"Activations/*": 1})

        def forward(module=model, reentrant=reentrant):
            x = module.tok_emb(tokens(1))
            for block in module.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return x.square().mean()

        forward().backward()
        mon.step(1)
        tap.append(sink[0]["Activations/blocks.1_l2_norm"])
        mon.close()
    with torch.no_grad():
        x = model.blocks[1](model.blocks[0](model.tok_emb(tokens(1))))
    assert tap == pytest.approx([x.norm().item()] * 2, rel=1e-5)


def test_tap_schedules_and_hooks_that_go():
    model = Tiny()
    mon, sink = watch(model, every={"Activations/*": 3})
    recorder = next(o for o in mon._observers if type(o).__name__ == "Activations")._recorder
    for step in range(1, 8):
        model(tokens(step))
        assert bool(recorder.counts.any()) == (step in (1, 3, 6)), "an idle step records nothing"
        mon.step(step)
    assert [i + 1 for i in range(7) if "Activations/blocks.0_mean" in sink[i]] == [1, 3, 6]
    assert model.blocks[0]._forward_hooks
    mon.close()
    assert not model.blocks[0]._forward_hooks


def test_outputs_that_are_tuples_dicts_and_integers():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
            self.layers[0].forward = lambda x: (x + 1, None)
            self.layers[1].forward = lambda x: {"hidden": x + 2}
            self.layers[2].forward = lambda x: torch.zeros(3, dtype=torch.int64)

        def forward(self, x):
            for layer in self.layers:
                layer(x)

    model = Many()
    mon, sink = watch(model)
    model(torch.zeros(4, 3))
    mon.step(1)
    assert sink[0]["Activations/layers.0_mean"] == 1
    assert sink[0]["Activations/layers.1_mean"] == 2
    assert sink[0]["Activations/layers.1_std"] == 0
    assert "Activations/layers.2_mean" not in sink[0]


def test_taps_that_never_record_warn_once():
    model = Tiny().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mon, _ = watch(model, optimizer)

    def train(step):
        model(tokens(step)).backward()
        optimizer.step()
        mon.step(step)

    with pytest.warns(RuntimeWarning, match="taps recorded nothing"):
        train(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(2)
