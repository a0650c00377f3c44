"""Facts of the hardware: known peaks, unknown devices, NVTX ranges."""

import types

import pytest
import torch

from fastmon import device, ops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_peaks(name, tflops):
    assert device.peak_flops(name) == tflops * 1e12
    assert device.peak_bandwidth(name) > 0


def test_unknown_is_none_never_a_guess():
    assert device.peak_flops("AMD EPYC") is None
    assert device.peak_flops("NVIDIA H1000") is None
    assert device.peak_bandwidth("Apple MPS") is None
    assert device.peak_flops("NVIDIA H100 PCIe", dtype=torch.float32) is None
    assert device.sm(torch.device("cpu")) is None


def test_cpu_has_a_name():
    assert device.name(torch.device("cpu"))


@pytest.fixture
def fresh():
    device._annotate.cache_clear()
    yield
    device._annotate.cache_clear()


def test_ranges_only_when_asked(monkeypatch, fresh):
    seen = []

    def annotate(name, domain):
        seen.append((domain, name))
        return device._NOTHING

    monkeypatch.setitem(__import__("sys").modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    monkeypatch.delenv("FASTMON_NVTX", raising=False)
    ops.moments(torch.ones(3))
    assert seen == []
    device._annotate.cache_clear()
    monkeypatch.setenv("FASTMON_NVTX", "1")
    ops.moments(torch.ones(3))
    assert seen == [("fastmon", "moments")]


def test_ranges_without_nvtx_say_so(monkeypatch, fresh):
    monkeypatch.setitem(__import__("sys").modules, "nvtx", None)
    monkeypatch.setenv("FASTMON_NVTX", "1")
    with pytest.raises(RuntimeError, match="nvtx is not installed"):
        device.trace("x")
