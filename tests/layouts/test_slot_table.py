"""The slot table, above all: what a reader sees when the writer dies between any two stores."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tierd_layouts.errors import (
    LeaseInvalid,
    SlotInvalid,
    SlotTableMagicWrong,
    SlotTableTruncated,
    SlotTableVersionUnknown,
)
from tierd_layouts.slot_entries import SlotEntry, SlotState, slot_key, table_bytes
from tierd_layouts.slot_table import SlotTable

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = slot_key("0123456789abcdef", "model.layers.0")
OTHER_KEY = slot_key("0123456789abcdef", "model.layers.1")


def new_table(slots: int = 8, leases: int = 8) -> tuple[bytearray, SlotTable]:
    buffer = bytearray(table_bytes(slots, leases))
    return buffer, SlotTable.create(buffer, slot_count=slots, lease_count=leases, epoch=11)


def fill(table: SlotTable, slot: int, generation: int, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "generation": generation,
        "arena": 0,
        "offset": slot << 20,
        "nbytes": 1 << 20,
        "state": SlotState.RESIDENT,
        "key": KEY,
    }
    table.set_slot(slot, **{**fields, **changes})


def hold(table: SlotTable, entry: int, lease: int, slot: int, generation: int) -> None:
    table.set_lease(entry, lease=lease, pid=77, start_time=99, slot=slot, generation=generation)


def test_the_bytes_are_those_of_the_specification() -> None:
    buffer, table = new_table(slots=2, leases=1)
    table.set_slot(
        1,
        generation=5,
        arena=3,
        offset=0x1000,
        nbytes=0x2000,
        state=SlotState.RESIDENT,
        key=bytes(range(16)),
    )
    table.set_lease(0, lease=9, pid=0x1234, start_time=0x56789, slot=1, generation=5)

    def words(*values: tuple[int, int]) -> bytes:
        return b"".join(value.to_bytes(size, "little") for value, size in values)

    header = b"TIERDSLT" + words((1, 4), (2, 4), (1, 4), (0, 4), (11, 8), (6, 8), (10, 8), (0, 16))
    slot = words((5, 8), (0x1000, 8), (0x2000, 8), (3, 4), (2, 4)) + bytes(range(16)) + bytes(16)
    lease = words((9, 8), (0x56789, 8), (0x1234, 4), (1, 4), (5, 8))
    assert bytes(buffer) == header + bytes(64) + slot + lease


def test_what_clients_are_told_stands_in_words_of_the_header_that_were_zero_before() -> None:
    buffer, table = new_table()
    reader = SlotTable(bytes(buffer))
    assert (reader.pressed, reader.attention) == (False, 0)
    table.pressed = True
    table.call_attention()
    table.call_attention()
    assert buffer[48:64] == bytes([1, 0, 0, 0, 2, 0, 0, 0]) + bytes(8)
    reader = SlotTable(bytes(buffer))
    assert (reader.pressed, reader.attention) == (True, 2)
    table.pressed = False
    assert buffer[48:64] == bytes([0, 0, 0, 0, 2, 0, 0, 0]) + bytes(8)


def test_attention_begins_again_after_its_largest_number() -> None:
    buffer, table = new_table()
    buffer[52:56] = b"\xff" * 4
    table.call_attention()
    assert table.attention == 0
    assert buffer[52:64] == bytes(12)


def test_a_table_in_a_memfd_is_read_through_a_read_only_mapping() -> None:
    fd = os.memfd_create("table")
    try:
        os.ftruncate(fd, table_bytes(4, 4))
        writable = mmap.mmap(fd, table_bytes(4, 4))
        readable = mmap.mmap(fd, table_bytes(4, 4), prot=mmap.PROT_READ)
        writer = SlotTable.create(writable, slot_count=4, lease_count=4)
        reader = SlotTable(readable)
        fill(writer, 2, 7)
        assert reader.generation(2) == 7
        with pytest.raises(TypeError, match="read-only"):
            fill(reader, 2, 8)
        writer.close()
        reader.close()
        writable.close()
        readable.close()
    finally:
        os.close(fd)


def test_an_empty_table_costs_no_pages() -> None:
    fd = os.memfd_create("table")
    try:
        os.ftruncate(fd, table_bytes())
        mapping = mmap.mmap(fd, table_bytes())
        table = SlotTable.create(mapping)
        assert os.fstat(fd).st_blocks * 512 <= 8192
        table.close()
        mapping.close()
    finally:
        os.close(fd)


def test_entries_come_back_as_they_were_set() -> None:
    buffer, table = new_table()
    fill(table, 3, 5, state=SlotState.FILLING, arena=2, key=OTHER_KEY)
    hold(table, 6, 21, 3, 5)
    reader = SlotTable(bytes(buffer))
    entry = SlotEntry(3, 5, 3 << 20, 1 << 20, 2, SlotState.FILLING, OTHER_KEY)
    assert list(reader.slots()) == [entry]
    assert reader.slot(3) == entry
    assert reader.slot(0).state is SlotState.FREE
    (lease,) = reader.leases()
    assert (lease.entry, lease.lease, lease.pid, lease.start_time) == (6, 21, 77, 99)
    assert (lease.slot, lease.generation) == (3, 5)
    reader.parse_check()


def test_cleared_entries_are_gone() -> None:
    _, table = new_table()
    fill(table, 3, 5)
    hold(table, 6, 21, 3, 5)
    table.clear_lease(6)
    table.clear_slot(3)
    assert list(table.leases()) == []
    assert list(table.slots()) == []
    assert table.generation(3) == 0


def test_numbers_are_never_given_twice_even_when_their_entries_are_gone() -> None:
    buffer, table = new_table()
    assert (table.next_generation, table.next_lease) == (1, 1)
    fill(table, 3, 5)
    hold(table, 6, 21, 3, 5)
    table.clear_lease(6)
    table.clear_slot(3)
    reader = SlotTable(bytes(buffer))
    assert (reader.next_generation, reader.next_lease) == (6, 22)
    fill(table, 3, 2)
    assert table.next_generation == 6


def test_readers_see_how_many_work_with_leases() -> None:
    buffer, table = new_table()
    reader = SlotTable(bytes(buffer))
    assert reader.holders == 0
    before = bytes(buffer)
    table.holders = 2**32 - 1
    assert SlotTable(bytes(buffer)).holders == 2**32 - 1
    changed = [at for at, (old, new) in enumerate(zip(before, buffer, strict=True)) if old != new]
    assert changed == [20, 21, 22, 23]


def test_a_new_daemon_life_is_an_epoch() -> None:
    buffer, table = new_table()
    assert SlotTable(bytes(buffer)).epoch == 11
    table.epoch = 2**63 - 1
    assert SlotTable(bytes(buffer)).epoch == 2**63 - 1


def test_keys_tell_packs_and_layers_apart() -> None:
    assert len(KEY) == 16
    assert len({KEY, OTHER_KEY, slot_key("fedcba9876543210", "model.layers.0")}) == 3


# --------------------------------------------------------------------------------------------------
# A kill between any two stores


class Stores:
    """Stands where the table keeps its words, and notes a copy of the buffer at each store."""

    def __init__(self, view: memoryview, buffer: bytearray, images: list[bytes]) -> None:
        self._view, self._buffer, self._images = view, buffer, images

    def __getitem__(self, place: int) -> int:
        number: int = self._view[place]
        return number

    def __setitem__(self, place: int, value: int) -> None:
        assert isinstance(place, int), "one store writes one number"
        assert self._view.itemsize in (4, 8)
        self._view[place] = value
        self._images.append(bytes(self._buffer))


def images_of(
    table: SlotTable, buffer: bytearray, write: Callable[[SlotTable], None]
) -> list[bytes]:
    """Returns the buffer before `write` and after each of its stores."""
    images = [bytes(buffer)]
    recorder: Any = table
    recorder._words = Stores(table._words, buffer, images)
    recorder._halves = Stores(table._halves, buffer, images)
    write(table)
    return images


def crowded_table() -> tuple[bytearray, SlotTable]:
    buffer, table = new_table()
    fill(table, 1, 4)
    fill(table, 2, 5)
    hold(table, 0, 31, 1, 4)
    return buffer, table


def refill(table: SlotTable) -> None:
    fill(table, 2, 6, state=SlotState.FILLING, offset=5 << 20, nbytes=2 << 20, key=OTHER_KEY)


WRITES: dict[str, Callable[[SlotTable], None]] = {
    "a free slot is filled": lambda table: fill(table, 3, 9, state=SlotState.FILLING),
    "a slot becomes resident": lambda table: fill(table, 2, 5, state=SlotState.FILLING),
    "a slot is filled again elsewhere": refill,
    "a slot is cleared": lambda table: table.clear_slot(2),
    "a lease is granted": lambda table: hold(table, 1, 40, 2, 5),
    "a lease entry is used again": lambda table: hold(table, 0, 41, 2, 5),
    "a lease ends": lambda table: table.clear_lease(0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_kill_between_any_two_stores_leaves_the_old_entry_the_new_or_none(name: str) -> None:
    buffer, table = crowded_table()
    images = images_of(table, buffer, WRITES[name])
    assert len(images) > 1
    first, last = SlotTable(images[0]), SlotTable(images[-1])
    for image in images:
        reader = SlotTable(image)
        reader.parse_check()
        for slot in range(reader.slot_count):
            entry = reader.slot(slot)
            if entry.state is not SlotState.FREE:
                assert entry in (first.slot(slot), last.slot(slot))
        known = [*first.leases(), *last.leases()]
        assert all(lease in known for lease in reader.leases())


def test_a_client_that_compares_generations_never_takes_a_refilled_slot_for_its_own() -> None:
    buffer, table = crowded_table()
    images = images_of(table, buffer, refill)
    old = SlotTable(images[0]).slot(2)
    for image in images:
        entry = SlotTable(image).slot(2)
        if entry.generation == old.generation:
            assert replace(entry, state=old.state) == old
    generations = [SlotTable(image).generation(2) for image in images]
    assert generations == sorted(generations, key=[5, 0, 6].index)


def test_the_numbers_in_the_header_are_raised_before_an_entry_uses_them() -> None:
    buffer, table = crowded_table()
    for image in images_of(table, buffer, lambda table: fill(table, 3, 50)):
        reader = SlotTable(image)
        assert all(entry.generation < reader.next_generation for entry in reader.slots())


def test_a_state_change_alone_is_one_store() -> None:
    buffer, table = crowded_table()
    images = images_of(table, buffer, lambda table: fill(table, 2, 5, state=SlotState.FILLING))
    assert len(images) == 2


def test_a_killed_creation_is_not_a_table_yet() -> None:
    buffer, _ = new_table()
    buffer[:8] = bytes(8)  # the magic is the last store
    with pytest.raises(SlotTableMagicWrong):
        SlotTable(buffer)


# --------------------------------------------------------------------------------------------------
# What can be wrong


@pytest.mark.parametrize("nbytes", [0, 63])
def test_a_table_without_a_whole_header_is_refused(nbytes: int) -> None:
    with pytest.raises(SlotTableTruncated, match=f"{nbytes} bytes, its header needs 64"):
        SlotTable(bytearray(nbytes))


def test_a_table_without_all_its_entries_is_refused() -> None:
    buffer, _ = new_table()
    with pytest.raises(SlotTableTruncated, match="8 slots and 8 leases need 832"):
        SlotTable(bytes(buffer[:-1]))
    with pytest.raises(SlotTableTruncated, match="831 bytes"):
        SlotTable.create(bytearray(831), slot_count=8, lease_count=8)


@pytest.mark.parametrize("number", [-1, 8])
def test_an_entry_that_the_table_does_not_have_is_refused(number: int) -> None:
    buffer, table = new_table()
    before = bytes(buffer)
    with pytest.raises(SlotInvalid, match=f"slot {number}: the table has 8"):
        fill(table, number, 5)
    with pytest.raises(LeaseInvalid, match=f"lease entry {number}: the table has 8"):
        hold(table, number, 9, 0, 5)
    assert bytes(buffer) == before


def test_another_magic_is_refused() -> None:
    buffer, _ = new_table()
    buffer[0] ^= 1
    with pytest.raises(SlotTableMagicWrong, match="UIERDSLT"):
        SlotTable(buffer)


def test_another_version_is_refused() -> None:
    buffer, _ = new_table()
    buffer[8] = 2
    with pytest.raises(SlotTableVersionUnknown, match="version 2, known is 1"):
        SlotTable(buffer)


def test_an_unknown_state_is_refused() -> None:
    buffer, table = crowded_table()
    buffer[64 + 64 + 28] = 3
    with pytest.raises(SlotInvalid, match="slot 1: state 3"):
        table.parse_check()


def test_a_generation_that_was_never_given_is_refused() -> None:
    _, table = crowded_table()
    table._slot["generation"][1] = 6
    with pytest.raises(SlotInvalid, match=r"slot 1: generation 6 is not in \[1, 6\)"):
        table.parse_check()
    table._slot["generation"][1] = 0
    with pytest.raises(SlotInvalid, match="slot 1: generation 0"):
        table.parse_check()


def test_slots_that_overlap_are_refused() -> None:
    _, table = crowded_table()
    fill(table, 4, 5, offset=(1 << 20) + 4096)
    with pytest.raises(SlotInvalid, match="slots 1 and 4 overlap in arena 0"):
        table.parse_check()
    fill(table, 4, 5, offset=(1 << 20) + 4096, arena=1)
    table.parse_check()


def test_a_slot_without_bytes_is_refused() -> None:
    _, table = crowded_table()
    table._slot["nbytes"][1] = 0
    with pytest.raises(SlotInvalid, match="0 bytes"):
        table.parse_check()


def test_a_lease_that_was_never_given_is_refused() -> None:
    _, table = crowded_table()
    table._lease["lease"][0] = 32
    with pytest.raises(LeaseInvalid, match=r"lease 32 is not in \[1, 32\)"):
        table.parse_check()


def test_a_lease_that_is_there_twice_is_refused() -> None:
    _, table = crowded_table()
    hold(table, 5, 31, 1, 4)
    with pytest.raises(LeaseInvalid, match="lease 31 is in entries 0 and 5"):
        table.parse_check()


@pytest.mark.parametrize(("slot", "generation"), [(1, 3), (0, 4), (2**32 - 1, 4)])
def test_a_lease_on_another_generation_or_no_slot_is_refused(slot: int, generation: int) -> None:
    _, table = crowded_table()
    hold(table, 0, 31, slot, generation)
    with pytest.raises(LeaseInvalid, match=f"lease 31 is on slot {slot}"):
        table.parse_check()


def test_a_writer_cannot_store_what_a_reader_would_refuse() -> None:
    _, table = crowded_table()
    with pytest.raises(SlotInvalid, match="use clear_slot"):
        fill(table, 0, 5, state=SlotState.FREE)
    with pytest.raises(SlotInvalid, match="use clear_slot"):
        fill(table, 0, 0)
    with pytest.raises(SlotInvalid, match="key has 3 bytes"):
        fill(table, 0, 5, key=b"abc")
    with pytest.raises(LeaseInvalid, match="use clear_lease"):
        hold(table, 1, 0, 1, 4)


def test_only_a_filling_slot_becomes_resident() -> None:
    table = SlotTable.create(bytearray(table_bytes(4, 4)), slot_count=4, lease_count=4, epoch=1)
    with pytest.raises(SlotInvalid, match="state 0"):
        table.mark_resident(2)
    table.set_slot(
        2, generation=5, arena=0, offset=0, nbytes=4096, state=SlotState.FILLING, key=b"k" * 16
    )
    table.mark_resident(2)
    assert table.slot(2).state is SlotState.RESIDENT
    assert table.generation(2) == 5
    with pytest.raises(SlotInvalid, match="state 2"):
        table.mark_resident(2)
