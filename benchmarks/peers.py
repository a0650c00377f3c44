"""What others would call instead: torch's own functions and a compiled fused reduction, timed in the same
rounds.

Each peer is a row of data: the ops it stands beside, how to bind it to a case's inputs, and the largest case
it can finish in reasonable time. `torch.sum` is the yardstick of the memory-bound ops: over the same bytes,
viewed as fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import frozen_ns5_power
from benchmarks.cases import Case, Inputs, Variant

REDUCTIONS = ("moments", "pair_moments")
MATVECS = ("spectral_norm", "gram_matvec")


@dataclass(frozen=True)
class Peer:
    """A competitor. `bind(inputs)` gives the arguments for `function`; `most` bounds the case's elements."""

    name: str
    ops: tuple[str, ...]
    function: Callable[..., Any]
    bind: Callable[[Inputs], tuple[Any, ...]]
    most: int = 1 << 62
    compiled: bool = False
    captures: bool = True  # may be captured into a CUDA graph (does not synchronise)


def _sum_bytes(*flats: Tensor) -> list[Tensor]:
    return [flat.view(torch.float32).sum() for flat in flats]


def _foreach_norm(*lists: list[Tensor]) -> list[tuple[Tensor, ...]]:
    return [torch._foreach_norm(xs) for xs in lists]


def _norms_and_dots(xs: list[Tensor], ys: list[Tensor]) -> list[Any]:
    return [
        torch._foreach_norm(xs),
        torch._foreach_norm(ys),
        *(x.view(-1) @ y.view(-1) for x, y in zip(xs, ys, strict=True)),
    ]


def _cosines(xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
    return [F.cosine_similarity(x.view(-1), y.view(-1), dim=0) for x, y in zip(xs, ys, strict=True)]


def _fused(xs: list[Tensor], ys: list[Tensor]) -> list[tuple[Tensor, ...]]:
    out = []
    for x, y in zip(xs, ys, strict=True):
        a, b = x.view(-1).float(), y.view(-1).float()
        d = a - b
        out.append(((a * b).sum(), (a * a).sum(), (b * b).sum(), (d * d).sum()))
    return out


def _two_mv(ws: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
    out = []
    for w, v in zip(ws, vs, strict=True):
        z = w.T @ (w @ v)
        out.append(z / z.norm())
    return out


def _svd_norm(ws: list[Tensor]) -> list[Tensor]:
    return [torch.linalg.matrix_norm(w.float(), ord=2) for w in ws]


def _svd_lowrank(ws: list[Tensor]) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        return [torch.svd_lowrank(w.float(), q=6, niter=2)[1] for w in ws]


def _torch_muon(xs: list[Tensor]) -> list[Tensor]:
    from torch.optim._muon import _zeropower_via_newtonschulz

    return [_zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7) for x in xs]


def _lists(one: Inputs) -> tuple[Any, ...]:
    return tuple(one.lists)


def _vectors(one: Inputs) -> tuple[Any, ...]:
    ws = one.lists[0]
    return ws, [torch.randn(w.shape[1], device=w.device).to(w.dtype) for w in ws]


PEERS: tuple[Peer, ...] = (
    Peer("torch.sum", (*REDUCTIONS, *MATVECS), _sum_bytes, lambda one: one.flats),
    Peer("_foreach_norm", REDUCTIONS, _foreach_norm, _lists),
    Peer("get_total_norm", ("moments",), torch.nn.utils.get_total_norm, _lists),
    Peer("_foreach_norm + dot", ("pair_moments",), _norms_and_dots, _lists),
    Peer("F.cosine_similarity", ("pair_moments",), _cosines, _lists),
    Peer("compiled sums", ("pair_moments",), _fused, _lists, compiled=True),
    Peer("two mv calls", MATVECS, _two_mv, _vectors),
    Peer(
        "frozen ns5 + 7 power",
        ("spectral_norm",),
        frozen_ns5_power.spectral_norms,
        _lists,
        most=2_000_000,
        captures=False,
    ),
    Peer(
        "matrix_norm(ord=2)", ("spectral_norm", "lanczos"), _svd_norm, _lists, most=2_000_000, captures=False
    ),
    Peer("svd_lowrank", ("spectral_norm", "lanczos"), _svd_lowrank, _lists, most=2_000_000, captures=False),
    Peer("torch.optim.Muon", ("newton_schulz",), _torch_muon, _lists),
)


def variants(case: Case, sets: Sequence[Inputs], *, only: str = "") -> list[Variant]:
    """The peers of a case's op, bound to its input sets; compiled ones only where the case says so."""
    count = sum(x.numel() for xs in sets[0].lists for x in xs)
    found = []
    for peer in PEERS:
        if (
            only not in ("", peer.name)
            or case.op not in peer.ops
            or count > peer.most
            or (peer.compiled and not case.compile)
        ):
            continue
        if sets[0].flats[0].is_cuda and not peer.captures:
            continue
        args = tuple(peer.bind(one) for one in sets)
        function, setup = _quiet(peer.function), 0.0
        if peer.compiled:
            start = time.perf_counter()
            function = _quiet(torch.compile(peer.function, fullgraph=True, dynamic=False))
            function(*args[0])
            setup = time.perf_counter() - start
        found.append(Variant(peer.name, "peer", function, args, setup))
    return found


def _quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return call
