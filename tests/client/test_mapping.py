from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tierd_client.errors import ProtocolBroken
from tierd_client.host_memory import HUGE_BYTES
from tierd_client.mapping import Mapping, Mappings, TableMapping
from tierd_layouts.slot_entries import SlotState, table_bytes
from tierd_layouts.slot_table import SlotTable

if TYPE_CHECKING:
    from collections.abc import Iterator

SPAN = 3 * HUGE_BYTES


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("mapping-under-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, SPAN)
    yield fd
    os.close(fd)


def mapped() -> int:
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum("mapping-under-test" in line for line in maps)


def test_arrays_show_the_memory_itself_and_cannot_be_written(memfd: int) -> None:
    mapping = Mapping(memfd, SPAN, "arena 0")
    array = np.frombuffer(mapping.buffer(4096, 8), np.uint16)
    assert array.tolist() == [0, 0, 0, 0]
    os.pwrite(memfd, np.arange(4, dtype=np.uint16).tobytes(), 4096)
    assert array.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_tensors_lie_where_the_arrays_lie(memfd: int) -> None:
    mapping = Mapping(memfd, SPAN, "arena 0")
    os.pwrite(memfd, np.arange(6, dtype=np.float32).tobytes(), 512)
    tensor = mapping.tensor(torch.float32, (2, 3), (3, 1), 512)
    assert tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensor.data_ptr() == np.frombuffer(mapping.buffer(512, 1), np.uint8).ctypes.data


@pytest.mark.parametrize("nbytes", [SPAN + 1, 0])
def test_a_file_shorter_than_announced_is_refused_with_both_sizes(memfd: int, nbytes: int) -> None:
    with pytest.raises(ProtocolBroken, match=f"arena 0 has {SPAN} bytes.* {nbytes}"):
        Mapping(memfd, nbytes, "arena 0")


def test_memory_is_unmapped_when_the_last_array_or_tensor_is_gone(memfd: int) -> None:
    before = mapped()
    mapping = Mapping(memfd, SPAN, "arena 0")
    array = np.frombuffer(mapping.buffer(0, 10), np.uint8)
    tensor = mapping.tensor(torch.uint8, (4,), (1,), 0)
    exporter = mapping.exporter(0, 4)
    assert mapped() == before + 1
    del mapping
    assert mapped() == before + 1
    del array, exporter
    assert mapped() == before + 1
    assert tensor.tolist() == [0, 0, 0, 0]
    del tensor
    assert mapped() == before


def test_populating_makes_the_range_present(memfd: int) -> None:
    mapping = Mapping(memfd, SPAN, "arena 0")

    def present() -> int:
        begin = np.frombuffer(mapping.buffer(0, 1), np.uint8).ctypes.data
        with open("/proc/self/smaps") as smaps:
            inside = False
            for line in smaps:
                if line.startswith(f"{begin:x}-"):
                    inside = True
                elif inside and line.startswith("Rss:"):
                    return int(line.split()[1]) << 10
        raise AssertionError("the mapping is not in smaps")

    os.pwrite(memfd, b"x" * SPAN, 0)
    assert present() == 0
    mapping.populate(HUGE_BYTES + 512, 8192)
    assert present() >= 8192
    mapping.populate(HUGE_BYTES + 512, 8192)
    mapping.populate(0, SPAN)
    assert present() == SPAN


def test_one_arena_of_one_daemon_life_is_mapped_once(memfd: int) -> None:
    mappings = Mappings()
    before = mapped()
    first = mappings.arena(1, 0, memfd, SPAN)
    assert mappings.arena(1, 0, memfd, SPAN) is first
    assert mapped() == before + 1
    assert mappings.arena(2, 0, memfd, SPAN) is not first
    assert mappings.arena(1, 1, memfd, SPAN) is not first


def test_the_slot_table_shows_what_the_daemon_writes() -> None:
    nbytes = table_bytes(4, 4)
    fd = os.memfd_create("table", os.MFD_CLOEXEC)
    os.ftruncate(fd, nbytes)
    import mmap

    with pytest.raises(ProtocolBroken, match="unreadable slot table"):
        TableMapping(fd, nbytes)
    writer = SlotTable.create(mmap.mmap(fd, nbytes), slot_count=4, lease_count=4)
    table = TableMapping(fd, nbytes)
    assert table.generation(2) == 0
    writer.set_slot(
        2, generation=9, arena=0, offset=0, nbytes=1, state=SlotState.RESIDENT, key=bytes(16)
    )
    assert table.generation(2) == 9
    assert table.generation(4) == 0  # a slot that does not exist holds no generation
    os.close(fd)
