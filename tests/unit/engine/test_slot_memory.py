"""Pages of slots: exact, used again, and given back. What pins them is CUDA's, and recorded here instead."""

import gc
import threading

import pytest
import torch

from engine.slot_memory import SlotMemory


class Pins:
    """What is pinned at the moment, by address."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.num_pinned = 0
        self.memory = SlotMemory(pin=self._pin, unpin=self._unpin)

    def _pin(self, address: int, num_bytes: int) -> None:
        assert address not in self.pinned
        self.pinned[address] = num_bytes
        self.num_pinned += 1

    def _unpin(self, address: int) -> None:
        del self.pinned[address]


def test_pages_are_exact_and_serve_the_next_load_of_their_size() -> None:
    pins = Pins()
    first = pins.memory.allocate(1000, torch.bfloat16)
    address = first.data_ptr()
    assert pins.pinned == {address: 2000}
    first.fill_(1.5)
    part = first[10:20]
    del first
    gc.collect()
    other = pins.memory.allocate(1000, torch.bfloat16)
    assert other.data_ptr() != address  # a view still needs the pages
    assert torch.equal(part, torch.full((10,), 1.5, dtype=torch.bfloat16))
    del part
    gc.collect()
    again = pins.memory.allocate(500, torch.float32)
    assert again.data_ptr() == address
    assert pins.num_pinned == 2


def test_free_pages_of_another_size_are_given_back_before_new_ones_are_taken() -> None:
    pins = Pins()
    tensors = [pins.memory.allocate(100, torch.uint8) for _ in range(3)]
    kept = tensors.pop()
    tensors.clear()
    gc.collect()
    large = pins.memory.allocate(5000, torch.uint8)
    assert pins.pinned == {kept.data_ptr(): 100, large.data_ptr(): 5000}
    del large
    gc.collect()
    pins.memory.release()
    assert pins.pinned == {kept.data_ptr(): 100}


def test_no_more_than_two_free_slots_are_kept() -> None:
    pins = Pins()
    tensors = [pins.memory.allocate(100, torch.uint8) for _ in range(5)]
    tensors.clear()
    gc.collect()
    assert len(pins.pinned) == 2


def test_nothing_stays_pinned_behind_the_last_tensor_of_a_memory_that_is_gone() -> None:
    pins = Pins()
    kept, gone = pins.memory.allocate(100, torch.uint8), pins.memory.allocate(100, torch.uint8)
    address = kept.data_ptr()
    del gone, pins.memory
    gc.collect()
    assert pins.pinned.keys() >= {address}  # the memory lives on for its tensors
    del kept
    gc.collect()
    assert not pins.pinned


def test_a_slot_may_be_collected_while_pages_are_looked_for() -> None:
    pins = Pins()
    kept = [pins.memory.allocate(100, torch.uint8), pins.memory.allocate(100, torch.uint8)]

    class Lookup(list):  # type: ignore[type-arg]
        def __iter__(self):  # type: ignore[no-untyped-def]
            kept.clear()  # as the collector does at any allocation
            return super().__iter__()

    pins.memory._free = Lookup()
    thread = threading.Thread(target=pins.memory.allocate, args=(100, torch.uint8), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_kernel_without_huge_pages_gives_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmap.MADV_HUGEPAGE", 12345)  # which every kernel refuses, as one without them does
    assert SlotMemory().allocate(1000, torch.float32).fill_(1.0).sum() == 1000


def test_memory_that_cannot_be_had_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="no memory for 8000000000000000 bytes"):
        SlotMemory().allocate(10**15, torch.float64)
