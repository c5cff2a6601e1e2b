"""The slot table's writer, as its readers and its successor see it."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest

from tierd.core.model import LayerKey, Read
from tierd.errors import ArenaError
from tierd.slots import Slots
from tierd_layouts.errors import SlotTableInvalid
from tierd_layouts.slot_entries import SlotState
from tierd_layouts.slot_table import SlotTable

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = bytes(range(16))


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots.create(epoch=5)
    yield slots
    slots.close()


def fill(slots: Slots, slot: int, generation: int) -> None:
    slots.filling(Read(slot, generation, LayerKey(0, 0), 0, slot * 4096, 4096, "demand"), KEY)


def test_a_reader_sees_filling_before_resident(slots: Slots) -> None:
    memory = mmap.mmap(slots.readonly_fd, slots.nbytes, prot=mmap.PROT_READ)
    table = SlotTable(memory)
    fill(slots, 3, 9)
    assert table.slot(3).state is SlotState.FILLING
    slots.resident(3)
    entry = table.slot(3)
    assert (entry.state, entry.generation, entry.key) == (SlotState.RESIDENT, 9, KEY)
    slots.clear(3)
    assert table.generation(3) != 9
    table.close()
    memory.close()


def test_the_readers_descriptor_cannot_write(slots: Slots) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(slots.readonly_fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(slots.readonly_fd, slots.nbytes)


def test_a_successor_knows_slots_leases_and_where_to_count_on(slots: Slots) -> None:
    fill(slots, 0, 7)
    slots.resident(0)
    for lease in (20, 21, 22):
        slots.lease(lease, pid=1, start_time=2, slot=0, generation=7)
    slots.end(21)
    successor = Slots.adopt(os.dup(slots.fd))
    assert [held.lease for held in successor.table.leases()] == [20, 22]
    assert successor.table.next_generation == 8
    assert successor.table.next_lease == 23
    free = successor.free_leases
    successor.lease(23, pid=1, start_time=2, slot=0, generation=7)
    assert {held.lease for held in slots.table.leases()} == {20, 22, 23}
    successor.end(20)
    successor.end(22)
    successor.end(23)
    assert successor.free_leases == free + 2
    successor.close()


def test_entries_of_ended_leases_are_used_again(slots: Slots) -> None:
    fill(slots, 0, 1)
    before = slots.free_leases
    for lease in range(1, 3 * before):
        slots.lease(lease, pid=1, start_time=2, slot=0, generation=1)
        slots.end(lease)
        if lease > 2000:
            break
    assert slots.free_leases == before


def test_what_cannot_be_true_is_not_adopted(slots: Slots) -> None:
    fill(slots, 0, 1)
    slots.table.set_lease(0, lease=5, pid=1, start_time=1, slot=9, generation=4)
    fd = os.dup(slots.fd)
    with pytest.raises(SlotTableInvalid, match="lease 5"):
        Slots.adopt(fd)
    os.close(fd)


def test_a_descriptor_that_is_no_table_is_not_adopted(tmp_path: object) -> None:
    fd = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(ArenaError, match="4096 bytes"):
        Slots.adopt(fd)
    os.close(fd)
    reader, writer = os.pipe()
    with pytest.raises(ArenaError, match="no memfd"):
        Slots.adopt(reader)
    os.close(reader)
    os.close(writer)
