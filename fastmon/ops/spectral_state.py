"""The warm state of the spectral ops: start vectors and exponents of a list of matrices, flat on their device.

Per matrix: 16 floats of header (word 0 holds the exponent e; the matrix is used as W 2^-e), then `block` unit vectors
of n floats, each padded with zeros to a multiple of 16, so that every vector starts on a 64-byte line. The block is
not stored: the size of the state gives it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmon.backend import FLOATS, Impl, Op, Tolerance, Traffic
from fastmon.ops.inputs import as_matrices, element_bytes
from fastmon.ops.moments import moments
from fastmon.ops.moments import reference as moments_reference
from fastmon.ops.scaling import exponent

HEADER = 16  # floats: word 0 is the exponent, the rest keeps the vectors on 64-byte lines


def spectral_state(ws: Tensor | Sequence[Tensor], *, block: int = 1, seed: int = 0) -> Tensor:
    """A fresh state: `block` orthonormal Gaussian vectors per matrix and the exponent of |W|_F. Flat fp32.

    Each matrix draws from its own generator, seeded alike, so a list equals a loop. block: 1 to 8.
    """
    matrices = as_matrices(ws, "spectral_state")
    if not 1 <= block <= 8:
        raise ValueError(f"block is 1 to 8, got {block}")
    with torch.no_grad():
        state: Tensor = state_op(matrices, block, seed)
    return state


def state_reference(ws: list[Tensor], block: int, seed: int) -> Tensor:
    """Every matrix's header and start vectors, laid end to end on the matrices' device. One read of W."""
    ns = [w.shape[1] for w in ws]
    if not ns:
        return torch.empty(0, dtype=torch.float32)
    state = _upload(torch.cat([_start(n, block, seed) for n in ns]), ws[0].device)
    heads = _upload(torch.tensor(offsets(ns, block)[:-1], dtype=torch.int64), ws[0].device)
    return state.index_copy_(0, heads, exponent(moments(ws).l2))


@functools.lru_cache(maxsize=64)
def _start(n: int, block: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.zeros(block, pad16(n), dtype=torch.float32)
    if n:
        drawn = torch.randn(block, n, generator=generator, dtype=torch.float64)
        vectors[: min(block, n), :n] = torch.linalg.qr(drawn.T).Q.T.to(torch.float32)
    return torch.cat([torch.zeros(HEADER, dtype=torch.float32), vectors.reshape(-1)])


def _upload(host: Tensor, where: torch.device) -> Tensor:
    """Onto the device without waiting for it."""
    return host.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else host.to(where)


def pad16(n: int) -> int:
    """n rounded up to a multiple of 16 floats (64 bytes)."""
    return (n + 15) // 16 * 16


def offsets(ns: Sequence[int], block: int) -> list[int]:
    """Start of every matrix's segment in the state, and the total: len(ns) + 1 integers."""
    ends = [0]
    for n in ns:
        ends.append(ends[-1] + HEADER + block * pad16(n))
    return ends


def block_of(ns: Sequence[int], state: Tensor) -> int:
    """How many vectors per matrix a state of this size holds; ValueError where it belongs to other matrices."""
    width = sum(pad16(n) for n in ns)
    block = (state.numel() - HEADER * len(ns)) // width if width else 1
    if state.numel() != HEADER * len(ns) + block * width:
        raise ValueError(
            f"a state of {state.numel()} floats does not belong to {len(ns)} matrices of these widths"
        )
    return block


def vectors_of(state: Tensor, ns: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(exponent (), vectors (block, n)) of every matrix, as views into the state."""
    block = block_of(ns, state)
    views = []
    for start, n in zip(offsets(ns, block), ns, strict=False):
        rows = state[start + HEADER : start + HEADER + block * pad16(n)].view(block, pad16(n))
        views.append((state[start], rows[:, :n]))
    return views


def check_state(ws: list[Tensor], state: Tensor) -> None:
    """ValueError unless `state` is flat fp32, on the matrices' device, and of their size."""
    if state.dtype != torch.float32 or state.ndim != 1 or not state.is_contiguous():
        raise ValueError(
            f"a state is a flat contiguous float32 tensor, got {state.dtype} {tuple(state.shape)}"
        )
    if ws and state.device != ws[0].device:
        raise ValueError(f"the state is on {state.device}, the matrices are on {ws[0].device}")
    if not 1 <= block_of([w.shape[1] for w in ws], state) <= 8:
        raise ValueError(f"a state of {state.numel()} floats does not belong to matrices of these widths")


def _frobenius(ws: list[Tensor]) -> Tensor:
    """|W|_F of every matrix, (count,). Plain torch: a reference may be compiled, so it calls no registered op."""
    return moments_reference(ws, 2)[1][6]


def set_exponents(ws: list[Tensor], state: Tensor) -> None:
    """Write the exponent of every |W|_F into the state; zero and non-finite matrices keep theirs."""
    l2 = _frobenius(ws)
    for i, (e, _) in enumerate(vectors_of(state, [w.shape[1] for w in ws])):
        known = torch.isfinite(l2[i]) & (l2[i] > 0)
        e.copy_(torch.where(known, exponent(l2[i]), e))


def _fake_state(ws: list[Tensor], block: int, seed: int) -> Tensor:
    total = offsets([w.shape[1] for w in ws], block)[-1]
    return torch.empty(total, dtype=torch.float32, device=ws[0].device if ws else None)


_WHY = "the vectors are drawn in fp64, orthonormalised and rounded once"
state_op = Op(
    "spectral_state(Tensor[] ws, int block, int seed) -> Tensor",
    reference=state_reference,
    fake=_fake_state,
    traffic=lambda ws, block, seed: Traffic(element_bytes(ws), 2 * sum(w.numel() for w in ws)),
    tolerance={dtype: Tolerance(1e-6, 1e-6, _WHY) for dtype in FLOATS},
    impls=(Impl("eager", state_reference),),
)
