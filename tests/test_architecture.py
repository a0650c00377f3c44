"""The house rules, checked: direction of imports, file length, no host waits, everything documented and tested."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastmon"
FILES = sorted(PACKAGE.rglob("*.py"))
CODE = [
    *FILES,
    ROOT / "train.py",
    *sorted((ROOT / "tests").glob("*.py")),
    *sorted((ROOT / "benchmarks").rglob("*.py")),
]

# Each room may import from the layers before its own, and from its own layer.
LAYER = {
    "kernels": 0, "device": 0, "metrics": 0, "schedules": 0,
    "backend": 1,
    "ops": 2,
    "plan": 3, "distributed": 3, "precision": 3,
    "readback": 4, "sinks": 4,
    "monitors": 5, "optim": 5, "mup": 5, "data": 5, "checkpoint": 5, "runs": 5,
    "monitor": 6, "simple_logger": 6,
    "workloads": 7, "integrations": 7, "report": 7,
    "config": 8, "flags": 8, "cli": 8, "__main__": 8,
}  # fmt: skip
TORCH_FREE = ("metrics", "sinks", "report", "config", "flags")

# Rooms that may wait for a device: the readback, evaluation, checkpoints, and the one documented synchronising call.
MAY_WAIT = {
    "readback.py": None,
    "monitors/spectral.py": {"compute_weight_spectral_norms"},
}
WAITS = {"item", "tolist", "numpy"}


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            base = "fastmon." + room(path) + "." if node.level else ""
            yield base + node.module
            yield from (f"{base}{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    if here == "__init__":
        return  # the lazy front door
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "fastmon" and len(parts) > 1 and parts[1] in LAYER:
            assert LAYER[parts[1]] <= LAYER[here], f"{path.name} (layer {LAYER[here]}) imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_room_has_a_layer(path):
    assert room(path) in LAYER or room(path) == "__init__"


def test_kernels_import_torch_and_triton_only():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for module in imports(path):
            top = module.split(".")[0]
            assert top in ("torch", "triton", "fastmon", *sys.stdlib_module_names), (
                f"{path.name} imports {module}"
            )
            assert top != "fastmon" or module.startswith("fastmon.kernels"), f"{path.name} imports {module}"


def test_torch_stays_out_of_the_rooms_without_tensors():
    for path in FILES:
        if room(path) in TORCH_FREE:
            assert not any(m.split(".")[0] == "torch" for m in _top_level_imports(path)), path.name


def _top_level_imports(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_csrc_files_are_short():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert len(path.read_text().splitlines()) <= 500, path.name


def test_train_is_lean():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 300


def test_setup_is_lean():
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_waits_for_the_device(path):
    """No .item(), .tolist(), .numpy() and no float()/int()/bool() of a call on a tensor outside the rooms that may."""
    allowed = MAY_WAIT.get(str(path.relative_to(PACKAGE)), set())
    if allowed is None or room(path) in ("checkpoint", "data", "report", "cli"):
        return
    found = []
    for function, node in _calls(ast.parse(path.read_text())):
        if function in allowed or function.startswith(("evaluate", "state_dict", "load_state_dict")):
            continue
        if isinstance(node.func, ast.Attribute) and node.func.attr in WAITS:
            found.append(f"{function}: .{node.func.attr}() at line {node.lineno}")
        if isinstance(node.func, ast.Attribute) and node.func.attr == "synchronize":
            found.append(f"{function}: synchronize() at line {node.lineno}")
    assert not found, f"{path.name}: {found}"


def _calls(tree, function=""):
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        if isinstance(node, ast.Call):
            yield inner, node
        yield from _calls(node, inner)


def test_backend_is_chosen_in_one_file():
    for path in [*FILES, ROOT / "train.py"]:
        if path.name in ("backend.py", "cli.py"):
            continue
        text = path.read_text()
        assert "FASTMON_BACKEND" not in text, path.name
        assert not re.search(r"\buse_(triton|cuda|cpp|native)\b", text), path.name


def test_ascii_and_no_unfinished_marks():
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"])
    for path in [*CODE, ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]:
        text = path.read_text()
        assert text.isascii(), path.name
        assert not re.search(rf"\b({marks})\b", text), path.name


def test_room_names_say_what_is_in_them():
    vague = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
    assert not [p for p in FILES if p.stem in vague]


def test_every_op_has_a_reference_documented_and_a_test():
    import fastmon.ops  # noqa: F401
    from fastmon.backend import OPS

    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for name, op in OPS.items():
        assert op.reference.__doc__, name
        assert any(impl.name == "eager" for impl in op.impls), f"{name} has no eager row"
        assert name in tests, f"no test speaks of {name}"


def test_every_metric_is_tested():
    from fastmon.metrics import METRICS

    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    rows = METRICS.values() if isinstance(METRICS, dict) else METRICS
    missing = [row.name for row in rows if row.name.split("<")[0].rstrip("/") not in tests]
    assert not missing


def test_every_config_field_is_a_flag_with_help_and_a_test():
    from fastmon.config import Config

    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for field in dataclasses.fields(Config):
        assert field.name in tests or field.name.replace("_", "-") in tests, f"no test speaks of {field.name}"


def test_documents_name_no_private_places():
    names = [
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Makefile",
        "setup.py",
        "pyproject.toml",
        ".ci/run",
    ]
    for path in [*CODE, *(ROOT / n for n in names), *(ROOT / "docs").glob("*.md")]:
        if path.name == "test_architecture.py" or not path.exists():
            continue
        assert not re.search(r"(^|[\s\"'(])/(work|root|home)/", path.read_text()), path.name
