"""Ragged lists on the device: cached int64 tables, the fixed chunking, and the facts a launch depends on.

A kernel that serves a list of tensors finds them through a table of addresses. A table here is a pure
function of its content (addresses, sizes), so a cached one can never be stale: when gradients move, the
content is another and so is the key. The upload goes through pinned memory on the current stream and waits
for nothing; torch's pinned allocator reuses a staging block only behind the event of its copy.
"""

# Kernels' parameters are Triton values, which have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Read once: Triton fixes the mode when a kernel is decorated.
INTERPRET: bool = bool(triton.knobs.runtime.interpret)

# Spelled out because Triton's default changes to False in 3.10: fma(a, b, c) rounds once and costs one
# instruction.
FUSION: dict[str, bool] = {"enable_fp_fusion": True}

TRITON_DTYPES: dict[torch.dtype, tl.dtype] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

_CAPACITY = (
    64  # tables kept; one training loop uses a handful, and moving gradients replace theirs every step
)
_resident: OrderedDict[Hashable, dict[int, Tensor]] = OrderedDict()
_captured: list[Tensor] = []  # read by CUDA graphs, whose life nobody tells us: never freed, never rewritten


def lanes(device: torch.device) -> int:
    """Return the threads of a warp: 32 on NVIDIA, 64 on AMD's data-centre cards (gfx9)."""
    return 64 if arch(device).startswith("gfx") else 32


@lru_cache(maxsize=16)
def arch(device: torch.device) -> str:
    """Return the compilation target of a device: "sm_90", "gfx942", or "cpu" (the interpreter)."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def resident(key: Hashable, values: Callable[[], Sequence[int]], device: torch.device) -> Tensor:
    """Return ``values()`` as an int64 tensor on ``device``, uploaded at most once per key and stream.

    The key must determine the values. No synchronisation; a hit costs one hash of the key. A table met
    while a CUDA graph is captured stays alive and unchanged for the rest of the process, because a replay
    reads it again; capture itself finds the table of an earlier warm-up call whatever its stream (torch
    synchronises before it captures), so that nothing needs to be uploaded inside the graph.
    """
    key = (key, device)
    if device.type != "cuda":
        stream, capturing = 0, False
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    tables = _resident.get(key)
    if tables is not None:
        _resident.move_to_end(key)
        table = next(iter(tables.values())) if capturing else tables.get(stream)
        if table is not None:
            if capturing:
                _captured.append(table)
            return table
    host = torch.tensor(values(), dtype=torch.int64, pin_memory=device.type == "cuda")
    table = host.to(device, non_blocking=True) if device.type == "cuda" else host
    if capturing:
        _captured.extend((host, table))  # the copy became a node of the graph: both ends must outlive it
        return table
    _resident.setdefault(key, {})[stream] = table
    if len(_resident) > _CAPACITY:
        _resident.popitem(last=False)
    return table


def addresses(xs: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the address of every tensor's first element (0 for an empty one)."""
    return tuple(map(torch.Tensor.data_ptr, xs))


class Group(NamedTuple):
    """Chunks [begin, end) that one launch covers: tensors of one dtype, all or none 16-byte aligned."""

    dtype: torch.dtype
    aligned: bool
    begin: int
    end: int


class Chunking:
    """How a ragged list is cut: tensor t owns chunks [first[t], first[t] + ceil(numel[t] / chunk)).

    Cuts depend on each tensor alone, so a tensor's result does not depend on what else is in the list.
    Chunks are numbered group by group; ``owner[c]`` is the tensor of chunk c. Compared by identity (see
    `chunking`).
    """

    def __init__(
        self, numels: tuple[int, ...], kinds: tuple[tuple[torch.dtype, bool], ...], chunk: int
    ) -> None:
        self.numels = numels
        first = [0] * len(numels)
        owner: list[int] = []
        groups: list[Group] = []
        for kind in dict.fromkeys(kinds):
            begin = len(owner)
            for t, numel in enumerate(numels):
                if kinds[t] == kind:
                    first[t] = len(owner)
                    owner.extend([t] * (-(-numel // chunk)))
            if len(owner) > begin:
                groups.append(Group(*kind, begin, len(owner)))
        self.groups = tuple(groups)
        self.chunks = len(owner)
        self._first, self._owner = first, owner

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return numel (n,), first (n,) and owner (chunks,), int64 on the device, each 16-byte aligned."""
        n = len(self.numels)
        pad = n + n % 2
        fill = [0] * (pad - n)
        words = resident(self, lambda: [*self.numels, *fill, *self._first, *fill, *self._owner], device)
        return words[:n], words[pad : pad + n], words[2 * pad :]


@lru_cache(maxsize=64)
def chunking(numels: tuple[int, ...], kinds: tuple[tuple[torch.dtype, bool], ...], chunk: int) -> Chunking:
    """Return the one `Chunking` of these sizes and kinds (dtype, aligned)."""
    return Chunking(numels, kinds, chunk)


@lru_cache(maxsize=16)
def chunking_at(
    pointers: tuple[int, ...],  # addresses of one list, or of several of equal length one after the other
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    chunk: int,
) -> Chunking:
    """Return the `Chunking` of tensors that lie at these addresses; lists that have not moved cost a look-up."""
    n = len(numels)
    bits = [0] * n  # low bits of all addresses that belong together
    for start in range(0, len(pointers), n):
        bits = [b | p for b, p in zip(bits, pointers[start : start + n], strict=True)]
    return chunking(numels, tuple((d, b % 16 == 0) for d, b in zip(dtypes, bits, strict=True)), chunk)


def dtypes_of(xs: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """Return every tensor's dtype."""
    return tuple(map(attrgetter("dtype"), xs))


def numels_of(xs: Sequence[Tensor]) -> tuple[int, ...]:
    """Return every tensor's number of elements."""
    return tuple(map(torch.Tensor.numel, xs))


@triton.jit
def typed(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Turn an int64 address into a pointer; the hint gives back the vector loads that a table takes away."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def exponent_of(x):
    """Return floor(log2(x)) of positive fp32 x as int32, clamped to [-126, 126], where 2^-e is normal."""
    e = (x.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(tl.maximum(e, -126), 126)


@triton.jit
def pow2(e):
    """Return 2^e in fp32, exact, for int32 e in [-126, 127]."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def pow2_double(e):
    """Return 2^e in fp64, exact, for int32 e in [-1022, 1023]."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Cast fp32 to DTYPE, to nearest even; the interpreter truncates to bf16, so a carry comes first."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        carried = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, carried, x)
    return x.to(DTYPE)
