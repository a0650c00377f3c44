"""The tape and its ring: order, bits, waiting, the reduction of the head."""

import numpy as np
import pytest
import torch

from fastmon.readback import SLOTS, Readback, _Slot, counts, floats, global_norm, words

CPU = torch.device("cpu")


class LateEvent:
    """A device event that completes when told to."""

    def __init__(self):
        self.done, self.waited = False, 0

    def record(self):
        self.done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.waited += 1
        self.done = True


class LateReadback(Readback):
    """A readback whose copies arrive late, as on a GPU."""

    def __init__(self):
        super().__init__(CPU)
        self.events = []

    def _take(self, size):
        slot = super()._take(size)
        if slot.event is None:
            slot = _Slot(slot.tape, torch.empty_like(slot.tape), LateEvent())
            self.events.append(slot.event)
        return slot


def test_numbers_and_notes_come_back_in_order():
    ring = Readback(CPU)
    for i in range(3):
        ring.push([torch.tensor([float(i)]), torch.arange(i, dtype=torch.float32)], f"row {i}")
        (numbers, note), *rest = list(ring.arrived())
        assert rest == []
        assert note == f"row {i}"
        assert floats(numbers) == [float(i), *map(float, range(i))]
    assert list(ring.arrived()) == []


def test_counts_travel_bit_by_bit():
    numbers = torch.tensor([0, 1, 2**24 + 1, 2**31 + 7, 2**52 + 3, -1, 0x7FC00001, 0x7F800001, 1 << 22])
    ring = Readback(CPU)
    ring.push([torch.randn(3), words(numbers), torch.randn(1)], None)
    ((tape, _),) = ring.arrived()
    assert counts(tape[3:-1]).tolist() == numbers.tolist()


def test_a_row_is_handed_out_when_its_event_has_completed():
    ring = LateReadback()
    ring.push([torch.ones(1)], 1)
    ring.push([torch.ones(1)], 2)
    assert list(ring.arrived()) == []
    ring.events[1].done = True
    assert list(ring.arrived()) == [], "the second row must not overtake the first"
    ring.events[0].done = True
    assert [note for _, note in ring.arrived()] == [1, 2]
    assert [event.waited for event in ring.events] == [0, 0]


def test_it_waits_only_when_the_ring_is_full_and_counts_it():
    ring = LateReadback()
    for i in range(SLOTS):
        assert not ring.full()
        ring.push([torch.full((2,), float(i))], i)
    assert ring.full()
    with pytest.raises(AssertionError, match="full"):
        ring.push([torch.zeros(1)], 9)
    numbers, note = ring.next_row()
    assert (floats(numbers), note) == ([0.0, 0.0], 0)
    assert ring.events[0].waited == 1
    ring.push([torch.zeros(1)], 4)
    assert len(ring.events) == SLOTS, "slots are used again"
    assert [note for _, note in ring.drain()] == [1, 2, 3, 4]


def test_slots_grow_with_the_row_and_empty_rows_pass():
    ring = Readback(CPU)
    for size in (0, 3, 1000, 5, 5000):
        ring.push([torch.arange(size, dtype=torch.float32)], size)
        ((numbers, note),) = ring.arrived()
        assert note == size
        assert numbers.sum() == size * (size - 1) / 2
    assert ring.memory_bytes() >= 4 * 5000


def test_only_the_head_is_reduced_and_once():
    seen = []

    def double(head):
        seen.append(head.clone())
        head.mul_(2)

    ring = Readback(CPU, reduce=double)
    ring.push([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], None, head=2)
    ((numbers, _),) = ring.arrived()
    assert floats(numbers) == [2.0, 4.0, 3.0]
    assert len(seen) == 1
    assert seen[0].tolist() == [1.0, 2.0]


def test_global_norm_is_wide():
    assert global_norm(np.array([3e30, 4e30], dtype=np.float32)) == pytest.approx(5e30)
    assert np.isnan(global_norm(np.array([1.0, np.nan])))
    assert global_norm(np.zeros(0)) == 0.0


@pytest.mark.gpu
def test_cuda_copies_are_asynchronous_and_right():
    ring = Readback(torch.device("cuda"))
    got = []
    for i in range(20):
        if ring.full():
            got.append(ring.next_row())
        ring.push([torch.full((1000,), float(i), device="cuda")], i)
        got += [(numbers.copy(), note) for numbers, note in ring.arrived()]
    got += [(numbers.copy(), note) for numbers, note in ring.drain()]
    assert [note for _, note in got] == list(range(20))
    assert all((numbers == note).all() for numbers, note in got)
