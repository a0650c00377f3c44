"""The gradient noise scale, from gradients whose noise scale is known."""

import math

import pytest
import torch
from torch import nn

from tests.tiny import watch


def drive(mon, sink, model, *, steps, micro, small, noise, reduced=True, scale=1.0):
    """Steps whose micro-batch gradients are G + N(0, noise / (d b)) in each of d coordinates, with |G| = 1."""
    d = model.weight.numel()
    direction = torch.randn(d)
    direction /= direction.norm()
    for step in range(1, steps + 1):
        model.weight.grad = torch.zeros_like(model.weight)
        for k in range(micro):
            drawn = direction + torch.randn(d) * (noise / d / small) ** 0.5
            model.weight.grad += scale * drawn.view_as(model.weight) / micro
            if k + 1 < micro:
                mon.micro_step(reduced=reduced)
        model.weight.grad /= scale
        mon.clip_grad_norm_(1e-2)
        mon.step(step)
    return [sink[i].get("Gradients/noise_scale") for i in range(steps)]


@pytest.mark.parametrize(("micro", "small", "noise"), [(4, 2, 50.0), (2, 8, 300.0)])
def test_gaussian_gradients_have_their_known_noise_scale(micro, small, noise):
    model = nn.Linear(200, 100, bias=False)
    mon, sink = watch(model, samples_per_step=micro * small, every={"Model/*": 0, "Activations/*": 0})
    found = drive(mon, sink, model, steps=200, micro=micro, small=small, noise=noise)
    assert found[-1] == pytest.approx(noise, rel=0.05)


def test_without_noise_or_accumulation_or_samples_it_is_absent():
    for options, micro in (({"samples_per_step": 8}, 1), ({}, 2)):
        model = nn.Linear(20, 10, bias=False)
        mon, sink = watch(model, **options)
        assert drive(mon, sink, model, steps=3, micro=micro, small=4, noise=10.0) == [None] * 3
    model = nn.Linear(20, 10, bias=False)
    mon, sink = watch(model, samples_per_step=8)
    model.weight.grad = torch.zeros_like(model.weight)
    mon.micro_step()
    mon.clip_grad_norm_(1.0)
    mon.step(1)
    assert "Gradients/noise_scale" not in sink[0]


def test_one_broken_step_does_not_count_and_averages_go_on_after_loading():
    model = nn.Linear(200, 100, bias=False)
    options = {"samples_per_step": 8, "every": {"Model/*": 0, "Activations/*": 0}}
    mon, sink = watch(model, **options)
    drive(mon, sink, model, steps=20, micro=4, small=2, noise=50.0)
    before = sink[-1]["Gradients/noise_scale"]
    model.weight.grad = torch.full_like(model.weight, math.nan)
    mon.micro_step()
    mon.clip_grad_norm_(1.0)
    mon.step(21)
    assert sink[-1]["Gradients/noise_scale"] == before
    again, rows = watch(model, **options)
    again.load_state_dict(mon.state_dict())
    assert drive(again, rows, model, steps=1, micro=4, small=2, noise=50.0)[0] == pytest.approx(
        before, rel=0.1
    )


def test_a_scaled_first_gradient_is_unscaled():
    class Scaler:
        _scale = torch.tensor(1024.0)

    model = nn.Linear(200, 100, bias=False)
    mon, sink = watch(model, samples_per_step=8, scaler=Scaler(), every={"Model/*": 0, "Activations/*": 0})
    found = drive(mon, sink, model, steps=100, micro=4, small=2, noise=50.0, scale=1024.0)
    assert found[-1] == pytest.approx(50.0, rel=0.08)


def test_a_gradient_of_one_rank_stands_for_fewer_samples():
    model = nn.Linear(200, 100, bias=False)
    mon, sink = watch(model, samples_per_step=16, every={"Model/*": 0, "Activations/*": 0})
    mon._scene.world_size = (
        2  # 4 micro-batches of 2 samples on each of 2 ranks, whose mean the final gradient is
    )
    d, noise = model.weight.numel(), 50.0
    direction = torch.randn(d) / d**0.5
    direction /= direction.norm()
    for step in range(1, 151):
        first = direction + torch.randn(d) * (noise / d / 2) ** 0.5
        rest = 7 * direction + torch.randn(d) * (7 * noise / d / 2) ** 0.5
        model.weight.grad = first.view_as(model.weight) / 4
        mon.micro_step(reduced=False)
        mon.micro_step(reduced=False)
        mon.micro_step(reduced=False)
        model.weight.grad = (first + rest).view_as(model.weight) / 8
        mon.clip_grad_norm_(1.0)
        mon.step(step)
    assert sink[-1]["Gradients/noise_scale"] == pytest.approx(noise, rel=0.06)
