"""The only copy from the device to the host, and the only place that may wait for a device.

A row's numbers travel as one flat fp32 buffer, the *tape*: raw sums and norms; whatever is a ratio or a root of them
is derived on the host, in fp64. int64 counts ride along bit by bit, as two words each. The tape begins with the head,
the few numbers that are summed over ranks by the one all-reduce of the row; whether an observer's part is valid is one
of them (1 for each rank where it did not fail).

Four slots form a ring. CUDA: asynchronous copy to pinned memory behind an event; `arrived` hands out the rows whose
event has completed, usually one step late; only when all four are under way is the oldest waited for. MPS: the same
with its own events. CPU: the tape is written where it is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SLOTS = 4
Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(slots=True)
class _Slot:
    tape: Tensor  # (capacity,) fp32 on the device
    host: Tensor  # (capacity,) fp32 on the host; the tape itself on a CPU
    event: Any = None


class Readback:
    """A ring of tapes. `push` enqueues one row's numbers, `arrived` yields (numbers, note) in the order of `push`.

    reduce: sums a tensor over the ranks in place; called on the head of every tape, so a row costs one collective.
    """

    def __init__(self, device: torch.device, *, reduce: Callable[[Tensor], object] | None = None) -> None:
        self.device = device
        self.reduce = reduce
        self._free: deque[_Slot] = deque()
        self._under_way: deque[tuple[_Slot, int, Any]] = deque()
        self._capacity = 0

    def push(
        self,
        parts: Sequence[Tensor],  # flat fp32 tensors on the device, in the order in which they are read back
        note: Any,  # what the host needs to read them
        *,
        head: int = 0,  # how many of the first floats are summed over ranks
    ) -> None:
        """Enqueue the copy of one row's numbers; never waits. Where the ring is `full`, take `next_row` first."""
        size = sum([part.numel() for part in parts])
        slot = self._take(size)
        if size:
            tape = slot.tape[:size]
            torch.cat(list(parts), out=tape)
            if head and self.reduce is not None:
                self.reduce(tape[:head])
            if slot.host is not slot.tape:
                slot.host[:size].copy_(tape, non_blocking=True)
            if slot.event is not None:
                slot.event.record()
        self._under_way.append((slot, size, note))

    def arrived(self) -> Iterator[tuple[Numbers, Any]]:
        """The rows that are here by now, oldest first; never waits. The numbers are valid until the next `push`."""
        while self._under_way and self._is_here(self._under_way[0][0]):
            yield self._pop()

    def drain(self) -> Iterator[tuple[Numbers, Any]]:
        """All rows, waiting for those that are still under way."""
        while self._under_way:
            self._wait(self._under_way[0][0])
            yield self._pop()

    def full(self) -> bool:
        """Whether the next `push` needs a slot that is still under way; read `next_row` first."""
        return len(self._under_way) >= SLOTS

    def next_row(self) -> tuple[Numbers, Any]:
        """The oldest row, waiting for it."""
        self._wait(self._under_way[0][0])
        return self._pop()

    def memory_bytes(self) -> int:
        """Bytes of all slots on the device."""
        return 4 * self._capacity * SLOTS

    def _pop(self) -> tuple[Numbers, Any]:
        slot, size, note = self._under_way.popleft()
        self._free.append(slot)
        return slot.host.numpy()[:size], note

    def _is_here(self, slot: _Slot) -> bool:
        return slot.event is None or bool(slot.event.query())

    def _wait(self, slot: _Slot) -> None:
        if slot.event is not None and not slot.event.query():
            slot.event.synchronize()

    def _take(self, size: int) -> _Slot:
        assert not self.full(), "the ring is full: read next_row() first"
        while self._free:
            slot = self._free.popleft()
            if slot.tape.numel() >= size:
                return slot
        self._capacity = max(self._capacity, 256, 1 << (size - 1).bit_length() if size else 0)
        tape = torch.empty(self._capacity, device=self.device)
        if self.device.type == "cpu":
            return _Slot(tape, tape)
        cuda = self.device.type == "cuda"
        event: Any = torch.cuda.Event() if cuda else torch.mps.Event()
        return _Slot(tape, torch.empty(self._capacity, pin_memory=cuda), event)


def words(counts: Tensor) -> Tensor:  # int64, contiguous (n,) -> fp32 (2n,)
    """Counts as they ride on the tape: the same bits, two fp32 words each. A view."""
    return counts.view(torch.float32)


def counts(numbers: Numbers) -> Numbers:  # fp32 (2n,) -> int64 (n,)
    """The counts back from `words`."""
    return np.ascontiguousarray(numbers).view(np.int64)


def floats(numbers: Numbers) -> list[float]:
    """Host numbers as Python floats."""
    values: list[float] = np.asarray(numbers, dtype=np.float64).tolist()
    return values


def global_norm(norms: Numbers) -> float:
    """sqrt(sum norms^2) in fp64, which no fp32 norm overflows."""
    wide = np.asarray(norms, dtype=np.float64)
    return float(np.sqrt(np.dot(wide, wide)))
