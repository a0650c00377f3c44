"""What is measured, as data: (op, named shapes, dtype), times every row of the op's table and every peer.

The rows come from `fastmon.ops.OPS`, so an implementation that is listed is measured and none can hide. Every
case's tensors are views of one flat buffer per argument: `torch.sum` over that buffer viewed as fp32 reads
exactly the same bytes and is the yardstick of the memory-bound ops.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from fastmon import ops
from fastmon.backend import Op, Traffic
from fastmon.ops.spectral import gram_op

LANCZOS_ITERS = 20
FRESH = frozenset({"lanczos"})  # started from the vector it has just found, it would stop after one iteration


@dataclass(frozen=True)
class Case:
    """One op on one named list in one dtype. `compile`: also time the compile row, whose set-up takes
    long."""

    op: str
    shape: str
    dtype: torch.dtype
    compile: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def id(self) -> str:
        """Name in tables and test ids: `pair_moments-flat-85m-bfloat16`."""
        return f"{self.op}-{self.shape}-{str(self.dtype).removeprefix('torch.')}"


F32, BF16 = torch.float32, torch.bfloat16
GPU = ("cuda",)
CASES: tuple[Case, ...] = (
    *(Case("moments", "gpt2-124m", dtype) for dtype in (F32, BF16)),
    *(Case("moments", name, F32) for name in ("gpt2-124m-hidden", "nano", "odd", "many-small")),
    Case("moments", "gpt2-block", F32, compile=True),
    *(Case("pair_moments", "flat-85m", dtype, compile=True) for dtype in (F32, BF16)),
    *(Case("pair_moments", name, BF16) for name in ("gpt2-124m", "odd", "many-small")),
    Case("pair_moments", "nano", F32),
    *(Case("spectral_norm", "gpt2-124m-hidden", dtype) for dtype in (F32, BF16)),
    *(Case("spectral_norm", name, F32) for name in ("nano-hidden", "odd", "per-head", "square-1024")),
    Case("spectral_norm", "gpt2-block", F32, compile=True),
    Case("spectral_norm", "square-4096", F32, devices=GPU),
    *(Case("gram_matvec", "gpt2-124m-hidden", dtype) for dtype in (F32, BF16)),
    Case("spectral_finish", "gpt2-124m-hidden", F32),
    Case("spectral_state", "gpt2-124m-hidden", F32),
    *(Case("lanczos", name, F32) for name in ("gpt2-block", "nano-hidden")),
    *(Case("newton_schulz", f"square-{n}", BF16) for n in (256, 512, 768, 1024)),
    *(Case("newton_schulz", f"square-{n}", BF16, devices=GPU) for n in (2048, 4096)),
    *(Case("newton_schulz", name, BF16) for name in ("wide-4:1", "wide-3:1", "nano-hidden")),
    *(
        Case("newton_schulz", name, BF16, devices=GPU)
        for name in ("square-768-batch", "wide-4:1-batch", "gpt2-124m-hidden")
    ),
    Case("newton_schulz", "per-head", BF16, devices=GPU),
    Case("newton_schulz_moments", "nano-hidden", BF16),
    *(Case("newton_schulz", name, F32) for name in ("square-512", "wide-4:1")),
)


@dataclass(frozen=True)
class Inputs:
    """One set of arguments in the schema's order, and the flat buffers that hold their tensors."""

    args: tuple[Any, ...]
    flats: tuple[Tensor, ...]

    @property
    def lists(self) -> list[list[Tensor]]:
        """The tensor lists among the arguments."""
        return [arg for arg in self.args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]


Builder = Callable[[list[Tensor], "_Source"], tuple[Any, ...]]


@dataclass(frozen=True)
class _Source:
    """Where a builder gets a second list like the first one."""

    case: Case
    device: torch.device
    seed: int
    flats: list[Tensor]

    def another(self) -> list[Tensor]:
        flat, views = shapes.packed(
            self.case.shape, dtype=self.case.dtype, device=self.device, seed=self.seed + 1000
        )
        self.flats.append(flat)
        return views


def _newton_schulz(xs: list[Tensor], source: _Source) -> tuple[Any, ...]:
    return xs, "ns5", 5, source.case.dtype, None


def _finish(ws: list[Tensor], source: _Source) -> tuple[Any, ...]:
    state = ops.spectral_state(ws)
    return *gram_op(ws, state), state, [w.shape[1] for w in ws]


ARGUMENTS: dict[str, Builder] = {
    "moments": lambda xs, _: (xs, 2),
    "pair_moments": lambda xs, source: (xs, source.another()),
    "spectral_state": lambda ws, _: (ws, 1, 0),
    "spectral_norm": lambda ws, _: (ws, ops.spectral_state(ws), 1),
    "gram_matvec": lambda ws, _: (ws, ops.spectral_state(ws)),
    "spectral_finish": _finish,
    "lanczos": lambda ws, _: (ws, ops.spectral_state(ws), LANCZOS_ITERS),
    "newton_schulz": _newton_schulz,
    "newton_schulz_moments": _newton_schulz,
}


def inputs(case: Case, device: torch.device, *, seed: int = 0) -> Inputs:
    """Fresh arguments of a case: Gaussian tensors, a fresh state where the op keeps one."""
    flat, views = shapes.packed(case.shape, dtype=case.dtype, device=device, seed=seed)
    source = _Source(case, device, seed, [flat])
    args = ARGUMENTS[case.op](views, source)
    return Inputs(args, tuple(source.flats))


@dataclass(frozen=True)
class Variant:
    """Something to time on a case: a row of the op's table or a peer, bound to every input set."""

    name: str
    kind: str  # "row" or "peer"
    function: Callable[..., Any]
    args: tuple[tuple[Any, ...], ...]  # one tuple per input set
    setup_s: float = 0.0


def rows(
    op: Op,
    case: Case,
    sets: Sequence[Inputs],
    *,
    only: str = "",
) -> tuple[list[Variant], dict[str, str]]:
    """Every row of the op's table that runs here, with its own copy of what the op writes; and the refusals
    by row."""
    found: list[Variant] = []
    refused: dict[str, str] = {}
    facts = op.facts(sets[0].args, prepared=True)
    for impl in op.impls:
        if only not in ("", impl.name):
            continue
        reason = impl.refuses(facts)
        if reason is None and impl.compiled and not case.compile:
            reason = "timed on the cases that say so (set-up takes minutes on long lists)"
        if reason is not None:
            refused[impl.name] = reason
            continue
        args = tuple(_own_state(op, one.args) for one in sets)
        start = time.perf_counter()
        function = impl.function()
        if impl.compiled:  # as Op.prepare does, but for this row
            function = torch.compile(function, fullgraph=True, dynamic=False)
            _no_grad(function)(*_own_state(op, args[0]))
        setup = time.perf_counter() - start if impl.compiled else 0.0
        call = _no_grad(_with_fresh_state(op, function) if op.name in FRESH else function)
        found.append(Variant(impl.name, "row", call, args, setup))
    return found, refused


def row_names(op: Op) -> list[str]:
    """Names of the op's rows, best first."""
    return [impl.name for impl in op.impls]


def traffic(op: Op, one: Inputs) -> Traffic:
    """Bytes and FLOPs of one call."""
    return op.traffic(*one.args)


def _own_state(op: Op, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.clone() if i in op.mutated else arg for i, arg in enumerate(args))


def _with_fresh_state(op: Op, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*_own_state(op, args))


def _no_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return call
