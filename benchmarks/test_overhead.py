"""The monitor's cost per step under pytest-benchmark: off, each preset and each part alone, against off.

    pytest benchmarks/test_overhead.py --benchmark-enable --benchmark-json=overhead.json

Before every timed stretch an unmonitored copy of the same run trains one stretch too (pytest-benchmark's
set-up, not in the figure); the ratio to it goes to the JSON's extra_info, so a slow minute of the machine
hits both.
"""

import statistics
import time

import pytest
import torch

from benchmarks import loop

STRETCH = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return loop.default_config("nano", **loop.random_shards(tmp_path_factory.mktemp("shards"), vocab=8192))


@pytest.fixture(scope="module")
def off(cfg):
    job = loop.Loop("off", cfg, DEVICE)
    yield job
    job.close()


def train(job):
    for _ in range(STRETCH):
        job.step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("variant", ["off", *loop.PRESETS, *loop.MONITORS])
def test_overhead(benchmark, cfg, off, variant):
    job = loop.Loop(variant, cfg, DEVICE)
    base = []

    def unmonitored():
        start = time.perf_counter()
        train(off)
        base.append(time.perf_counter() - start)

    train(job)
    benchmark.group = f"{STRETCH} steps of the nano run"
    benchmark.pedantic(train, args=(job,), setup=unmonitored, rounds=10)
    job.close()
    if benchmark.stats is not None:
        pairs = zip(benchmark.stats.stats.data, base[-10:], strict=True)
        benchmark.extra_info["ratio_to_off"] = statistics.median(of / to for of, to in pairs)
