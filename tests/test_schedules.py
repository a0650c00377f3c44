"""Learning-rate shapes: their ends, their warm-up, and the closed forms between."""

import math

import pytest

from fastmon.config import FIELDS
from fastmon.schedules import SHAPES, factor


def test_the_flag_offers_every_shape():
    assert FIELDS["schedule"].choices == tuple(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_ends_and_warmup(shape):
    facts = {"steps": 110, "warmup": 10, "low": 0.1}
    assert [factor(shape, s, **facts) for s in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(shape, 110, **facts) == pytest.approx(1.0 if shape == "constant" else 0.1)
    values = [factor(shape, s, **facts) for s in range(10, 111)]
    assert values == sorted(values, reverse=True)  # never rises after the warm-up
    assert factor(shape, 1, steps=1, warmup=0, low=0.1) == pytest.approx(values[-1])
    assert factor(shape, 3, steps=3, warmup=6, low=0.1) == 0.5


def test_between_the_ends():
    half = {"step": 60, "steps": 110, "warmup": 10, "low": 0.0}
    assert factor("linear", **half) == pytest.approx(0.5)
    assert factor("cosine", **half) == pytest.approx(0.5)
    assert factor("wsd", **half) == 1.0
    assert factor("cosine", 35, steps=110, warmup=10, low=0.0) == pytest.approx(
        (1 + math.cos(math.pi / 4)) / 2
    )
    assert factor("wsd", 100, steps=110, warmup=10, low=0.0) == pytest.approx(0.5)
    # with low = 0.1 the factor is (1 + 99 t)^-1/2: at t = 1/33 it is one half
    assert factor("inverse-sqrt", 10, steps=330, warmup=0, low=0.1) == pytest.approx(0.5)
