"""The kernels' own cases: run by tests/test_kernels.py in a process of their own, by file name."""

import os

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRET else "cuda"
NAN, INF = float("nan"), float("inf")


def pytest_configure(config):
    # numpy's, in the interpreter, where a test overflows on purpose
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")


@pytest.fixture(autouse=True, scope="session")
def every_kernel_ran():
    """Count the kernels that were launched; coverage.py fails where one has no case."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    ran: set[str] = set()
    patch = pytest.MonkeyPatch()
    for kind in (InterpretedFunction, JITFunction):
        if hasattr(kind, "run"):

            def watched(self, *args, _run=kind.run, **kwargs):
                ran.add(self.fn.__name__)
                return _run(self, *args, **kwargs)

            patch.setattr(kind, "run", watched)
    yield ran
    patch.undo()
