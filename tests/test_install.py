"""A base install works without a compiler, without triton and without nvtx, and says what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WORKS = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import torch, fastmon
from fastmon import ops, backend
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with fastmon.Monitor(model, optimizer, preset="usual", sinks=[]) as mon:
    for step in (1, 2, 3):
        model(torch.ones(4, 8)).sum().backward()
        mon.clip_grad_norm_(1.0)
        optimizer.step()
        mon.step(step, {{}})
        optimizer.zero_grad()
facts = backend.Facts({device!r}, frozenset({{torch.float32}}))
print({{impl.name: why for impl, why in backend.explain(backend.OPS["moments"], facts)}})
"""


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )


@pytest.mark.parametrize("name", ["triton", "nvtx"])
def test_works_without(name):
    done = run(WORKS.format(blocked=[name], device="cuda"))
    assert done.returncode == 0, done.stderr
    if name == "triton":
        assert "triton is not installed" in done.stdout


def test_works_without_the_extension(tmp_path):
    shutil.copytree(
        ROOT / "fastmon", tmp_path / "fastmon", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + WORKS.format(blocked=[], device="cpu")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the C++ extension is not built" in done.stdout


def test_builds_without_a_compiler(tmp_path):
    """No working compiler: the build succeeds as pure Python and says what it left out."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(
        ROOT / "fastmon", tmp_path / "fastmon", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    env = {**os.environ, "CXX": "no-such-compiler", "CC": "no-such-compiler"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("fastmon/_C*.so"))
    assert "C++" in done.stdout + done.stderr
    assert "left out" in done.stdout + done.stderr
