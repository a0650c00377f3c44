"""Runs last: no kernel without a case."""

import ast
import importlib
from pathlib import Path

MODULES = ("moments", "pair_moments", "newton_schulz", "gram", "spectral", "lanczos")


def launched_by(tree: ast.Module) -> set[str]:
    """Names that a launcher subscripts with a grid: name[grid](...)."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}


def test_every_kernel_has_run(every_kernel_ran):
    found = []
    for name in MODULES:
        path = Path(importlib.import_module(f"fastmon.kernels.{name}").__file__)
        tree = ast.parse(path.read_text())
        functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list}
        kernels = launched_by(tree) & functions
        if name == "gram":
            kernels |= {"gram_narrow", "gram_wide"}  # launched under one name
        assert kernels, name
        assert kernels <= every_kernel_ran, f"{name}: never launched: {sorted(kernels - every_kernel_ran)}"
        found.append(name)
    stems = {path.stem for path in path.parent.glob("*.py")}
    assert stems == {*found, "__init__", "pointers"}, "a kernel file that this test does not know"
