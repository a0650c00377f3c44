"""Shared options and fixtures: --device, --seed (fixed by default; `random` draws one and prints it)."""

import os
import random

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device that op tests run on (default: cpu)")
    parser.addoption(
        "--seed", default="42", help="an integer, or `random` to draw and print one (default: 42)"
    )


def pytest_configure(config):
    wish = config.getoption("--seed")
    config.fastmon_seed = random.SystemRandom().randrange(2**31) if wish == "random" else int(wish)


def pytest_report_header(config):
    return f"fastmon: seed {config.fastmon_seed}, device {config.getoption('--device')}"


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(request.config.fastmon_seed)


@pytest.fixture
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def seed(request):
    return request.config.fastmon_seed
