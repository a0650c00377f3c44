"""Choice of implementations: rows, refusals with reasons, forcing, and every op under opcheck and torch.compile."""

import logging
import subprocess
import sys

import pytest
import torch

from fastmon import backend, ops
from fastmon.backend import OPS, BackendError, Facts, Impl, choose, explain, force
from tests import cases

FP32 = frozenset({torch.float32})


def example(name):
    """Small positional arguments for every registered op; a new op must be added here to pass."""
    ws = [cases.gaussian(6, 5), cases.gaussian(3, 9)]
    state = ops.spectral_state(ws)
    half = (torch.randn(state.numel() - 32), torch.rand(2, 1, 1) + 1, torch.rand(2) + 1)
    return {
        "moments": ([cases.gaussian(7), cases.gaussian(3, 4)], 4),
        "pair_moments": ([cases.gaussian(7)], [cases.gaussian(7)]),
        "spectral_norm": (ws, state, 2),
        "gram_matvec": (ws, state),
        "spectral_finish": (*half, state, [5, 9]),
        "spectral_state": (ws, 2, 0),
        "lanczos": (ws, state, 3),
        "newton_schulz": ([cases.gaussian(6, 5), cases.gaussian(2, 3, 9)], "ns5", 5, torch.float32, None),
        "newton_schulz_moments": (
            [cases.gaussian(6, 5), cases.gaussian(3, 9)],
            "ns5",
            5,
            torch.float32,
            None,
        ),
        "tap": None,  # mutates a buffer of its own: tests/test_monitors.py
    }[name]


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_passes_opcheck(name):
    args = example(name)
    if args is None:
        pytest.skip("checked with its monitor")
    torch.library.opcheck(OPS[name].overload, args)


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_states_its_traffic_and_tolerance(name):
    args = example(name)
    if args is None:
        pytest.skip("checked with its monitor")
    traffic = OPS[name].traffic(*args)
    assert traffic.bytes > 0
    assert traffic.flops > 0
    assert all(t.why for t in OPS[name].tolerance.values())


def test_public_functions_compile_to_one_graph():
    def watch(x, w):
        m = ops.moments([x * 2, w])
        return m.l2, m.std, ops.pair_moments([x], [x + 1]).cosine, ops.spectral_norm([w]).sigma

    x, w = torch.randn(10), torch.randn(8, 6)
    compiled = torch.compile(watch, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x, w), watch(x, w), strict=True):
        assert torch.equal(got, want)


def test_prepared_lists_may_compile_and_agree():
    xs = [cases.gaussian(40), cases.gaussian(6, 7)]
    with force("compile"):
        prepared = OPS["moments"].prepare(xs, 2)
        with pytest.raises(BackendError, match="only prepared lists"):
            ops.moments(xs)
    with force("eager"):
        want = ops.moments(xs)
    counts, stats = prepared(xs, 2)
    assert torch.equal(counts, torch.stack(want[:3]))
    torch.testing.assert_close(stats, torch.stack(want[3:10]), rtol=1e-5, atol=1e-6)


def test_preparing_leaves_the_state_alone():
    ws = [cases.gaussian(6, 5)]
    state = ops.spectral_state(ws)
    before = state.clone()
    with force("compile"):
        prepared = OPS["spectral_norm"].prepare(ws, state, 1)
    assert torch.equal(state, before)
    with force("eager"):
        want = ops.spectral_norm(ws, state=before)
    torch.testing.assert_close(prepared(ws, state, 1)[0], want.sigma)


def test_a_refused_wish_lists_every_row_with_its_reason():
    with force("triton"), pytest.raises(BackendError) as caught:
        ops.moments(torch.ones(3))
    for impl in OPS["moments"].impls:
        assert impl.name in str(caught.value)
    assert "for cuda, the tensors are on cpu" in str(caught.value)


def test_environment_variable_forces(monkeypatch):
    monkeypatch.setenv("FASTMON_BACKEND", "eager")
    assert choose(OPS["moments"], Facts("cpu", FP32)).name == "eager"
    monkeypatch.setenv("FASTMON_BACKEND", "nonesuch")
    with pytest.raises(BackendError, match="nonesuch"):
        ops.moments(torch.ones(3))


def test_unknown_dtype_falls_to_a_row_that_takes_it():
    got = ops.moments(torch.ones(4, dtype=torch.float64))
    assert got.l2.item() == 2


@pytest.mark.parametrize(
    ("impl", "facts", "words"),
    [
        (Impl("x", max, device="cuda"), Facts("cpu", FP32), "for cuda, the tensors are on cpu"),
        (Impl("x", max, sm=90), Facts("cuda", FP32, sm=80), "needs sm_90, this device is sm_80"),
        (Impl("x", max, sm=80), Facts("cuda", FP32), "not an NVIDIA GPU"),
        (Impl("x", max, dtypes=backend.HALF), Facts("cpu", FP32), "does not take float32"),
        (Impl("x", max, compiled=True), Facts("cpu", FP32), "only prepared lists"),
        (Impl("x", max, fits=lambda f: "too small"), Facts("cpu", FP32), "too small"),
    ],
)
def test_refusals_are_sentences(impl, facts, words):
    assert words in impl.refuses(facts)


def test_missing_parts_are_reasons(monkeypatch):
    monkeypatch.setattr(backend, "extension", lambda: "not built")
    monkeypatch.setattr(backend, "triton_missing", lambda: "triton is not installed")
    reasons = {impl.name: why for impl, why in explain(OPS["moments"], Facts("cuda", FP32, prepared=True))}
    assert reasons["triton"] == "triton is not installed"
    assert reasons["compile"] == "triton is not installed"
    reasons = {impl.name: why for impl, why in explain(OPS["moments"], Facts("cpu", FP32))}
    assert reasons["cpp"] == "not built"
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    prepared = {i.name: why for i, why in explain(OPS["moments"], Facts("cpu", FP32, prepared=True))}
    assert prepared["compile"] == "no C++ compiler on this machine"


def test_a_fallback_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "extension", lambda: "not built")
    monkeypatch.setattr(backend, "_choices", {})
    with caplog.at_level(logging.INFO, logger="fastmon"):
        ops.moments(torch.ones(3))
        ops.moments(torch.ones(3))
    lines = [r.getMessage() for r in caplog.records if "fastmon::moments" in r.getMessage()]
    assert lines == ["fastmon::moments uses eager on cpu (cpp: not built)"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fastmon", ("torch", "triton", "numpy")),
        ("fastmon.metrics", ("torch",)),
        ("fastmon.config", ("torch",)),
        ("fastmon.report.runlog", ("torch",)),
        ("fastmon.ops", ("triton", "torch._dynamo", "torch._inductor")),
        ("fastmon.monitor", ("triton", "torch._dynamo", "torch._inductor")),
    ],
)
def test_imports_stay_light(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
