from __future__ import annotations

import faulthandler
import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch

from tierd_client.errors import ProtocolBroken
from tierd_client.gpu.memfd_memory import MemfdMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 2 << 20


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("chunk-under-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, CHUNK)
    os.pwrite(fd, b"chunk", 0)
    yield fd
    os.close(fd)


def mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("chunk-under-test" in line for line in maps)


def test_a_chunk_lies_at_its_place_in_the_arena(fd: int) -> None:
    memory = MemfdMemory(4 * CHUNK, CHUNK, "arena 0")
    memory.map(2, fd)
    assert bytes(memory.buffer(2 * CHUNK, 5)) == b"chunk"
    tensor = memory.tensor(torch.uint8, (5,), (1,), 2 * CHUNK)
    assert bytes(tensor.tolist()) == b"chunk"


def test_neighbouring_chunks_are_one_range(fd: int) -> None:
    memory = MemfdMemory(4 * CHUNK, CHUNK, "arena 0")
    memory.map(1, fd)
    memory.map(2, fd)
    tail = bytes(memory.buffer(2 * CHUNK - 3, 8))
    assert tail == b"\0\0\0chunk"


def test_a_chunk_that_is_let_go_takes_no_memory_of_this_process(fd: int) -> None:
    memory = MemfdMemory(4 * CHUNK, CHUNK, "arena 0")
    memory.map(0, fd)
    memory.map(3, fd)
    assert mapped() == 2
    memory.unmap(3)
    assert mapped() == 1
    memory.map(3, fd)
    assert bytes(memory.buffer(3 * CHUNK, 5)) == b"chunk"
    del memory
    assert mapped() == 0


def test_what_is_not_mapped_kills_who_reads_it(fd: int) -> None:
    memory = MemfdMemory(2 * CHUNK, CHUNK, "arena 0")
    memory.map(0, fd)
    memory.unmap(0)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(memory.buffer(0, 1)[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_a_chunk_that_is_too_short_is_refused_with_both_sizes(fd: int) -> None:
    os.ftruncate(fd, 4096)
    memory = MemfdMemory(2 * CHUNK, CHUNK, "arena 0")
    with pytest.raises(ProtocolBroken, match=f"chunk 1 of arena 0 has 4096 bytes.* {CHUNK}"):
        memory.map(1, fd)


def test_a_handle_is_refused() -> None:
    with pytest.raises(ProtocolBroken, match="memfd"):
        MemfdMemory(CHUNK, CHUNK, "arena 0").map_all(b"x" * 64, CHUNK)
