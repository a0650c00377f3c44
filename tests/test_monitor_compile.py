"""Taps under torch.compile: one graph, and a trace without them refused."""

import pytest
import torch
import torch._dynamo.testing

import fastmon
from tests.tiny import Rows, Tiny, tokens


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_taps_compile_into_one_graph(backend):
    torch.manual_seed(0)
    model = Tiny(p=0.0)
    sinks = []
    for compiled in (False, True):
        sinks.append(Rows())
        mon = fastmon.Monitor(model, preset="full", sinks=[sinks[-1]], every={"Activations/*": 2})
        counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
        forward = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        for step in range(1, 6):
            forward(tokens(step)).backward()
            mon.step(step)
            model.zero_grad()
        mon.close()
    assert counter.frame_count == 1, "one graph, whether a step records or not"
    for i in range(5):
        eager, taped = ({k: v for k, v in sink[i].items() if k.startswith("Activations/")} for sink in sinks)
        assert bool(eager) == (i + 1 in (1, 2, 4))
        assert eager.keys() == taped.keys()
        assert taped == pytest.approx(eager, rel=1e-5, abs=1e-6)
    assert "Time/compile_ms" in sinks[1][0]
    assert "Time/compile_ms" not in sinks[1][4]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["wrapper", "inner", "method", "sibling"])
def test_a_model_that_ran_compiled_is_refused_in_one_sentence(how):
    model = Tiny()
    if how == "method":
        model.compile(backend="eager")
        model(tokens(1))
        watched = model
    elif how == "sibling":  # dynamo would run the other instance's trace
        torch.compile(Tiny(), backend="eager")(tokens(1))
        watched = torch.compile(model, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        compiled(tokens(1))
        watched = compiled if how == "wrapper" else model
    with pytest.raises(ValueError, match=r"already traced Tiny.forward, .* build the Monitor before"):
        fastmon.Monitor(watched, sinks=[])
    fastmon.Monitor(watched, sinks=[], every={"Activations/*": 0}).close()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("held", [False, True])
def test_a_sequential_that_ran_compiled_is_refused(held):
    row = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    compiled = torch.compile(row, backend="eager")
    model = torch.nn.ModuleDict({"row": row}) if held else compiled
    fastmon.Monitor(model, sinks=[]).close()
    compiled(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"already traced Sequential.forward, .* build the Monitor before"):
        fastmon.Monitor(model, sinks=[])
    fastmon.Monitor(torch.nn.Sequential(torch.nn.Linear(4, 4)), sinks=[]).close()


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_function_that_ran_compiled_warns():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    forward = torch.compile(lambda x: model(x), backend="eager")
    forward(tokens(1))
    mon = fastmon.Monitor(model, optimizer, sinks=[])
    forward(tokens(2)).backward()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match="taps recorded nothing"):
        mon.step(1)
    mon.close()


@pytest.mark.usefixtures("fresh_dynamo")
def test_an_eager_model_beside_a_compiled_one_is_welcome():
    torch.compile(Tiny(), backend="eager")(tokens(1))
    model, sink = Tiny(), Rows()
    mon = fastmon.Monitor(model, sinks=[sink])
    model(tokens(1))
    mon.step(1)
    assert sink[0]["Activations/blocks.0_std"] > 0
