"""Every Triton kernel really runs here: on the CPU in interpreter mode, and on the GPU where there is one.

Triton reads TRITON_INTERPRET when it is imported, so the cases of tests/kernels/ run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
CASES = [
    f"tests/kernels/{stem}.py" for stem in ("reductions", "newton_schulz", "spectral", "public", "coverage")
]


def run_cases(interpret: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *CASES, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout, done.stdout


def version(module) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def test_every_kernel_executes_in_the_interpreter():
    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip(
            "the interpreter of this Triton needs numpy < 2.4: it converts arrays of one element to int"
        )
    run_cases(interpret=True)


@pytest.mark.gpu
def test_every_kernel_executes_on_the_gpu():
    assert torch.cuda.is_available()
    run_cases(interpret=False)
