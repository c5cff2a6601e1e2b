from __future__ import annotations

import faulthandler
import gc
import os
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tierd_client.host_memory import HUGE_BYTES, HostMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

SPAN = 3 * HUGE_BYTES


class Shown(HostMemory):
    """A file at its beginning; the rest faults."""

    def __init__(self, fd: int) -> None:
        super().__init__(SPAN, "memory 0")
        self.show(fd)

    def show(self, fd: int) -> None:
        self._show(fd, 0, HUGE_BYTES, "file")

    def hide(self) -> None:
        self._hide(0, HUGE_BYTES)


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("memory-under-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, HUGE_BYTES)
    yield fd
    os.close(fd)


def mapped() -> int:
    gc.collect()
    with open("/proc/self/maps") as maps:
        return sum("memory-under-test" in line for line in maps)


def faults(memory: Shown) -> bool:
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(memory.buffer(0, 1)[0])
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_range_shows_a_file_until_it_is_hidden(memfd: int) -> None:
    memory = Shown(memfd)
    os.pwrite(memfd, b"\7", 5)
    assert memory.buffer(5, 1)[0] == 7
    memory.hide()
    assert mapped() == 0
    memory.show(memfd)
    assert memory.buffer(5, 1)[0] == 7


def test_a_forked_child_faults_where_its_parent_reads(memfd: int) -> None:
    memory = Shown(memfd)
    assert faults(memory)
    assert memory.buffer(0, 1)[0] == 0


def test_it_starts_where_a_huge_page_can(memfd: int) -> None:
    memory = Shown(memfd)
    assert np.frombuffer(memory.buffer(0, 1), np.uint8).ctypes.data % HUGE_BYTES == 0


def test_a_tracked_tensor_holds_an_object_until_its_storage_is_gone(memfd: int) -> None:
    memory = Shown(memfd)
    os.pwrite(memfd, np.arange(6, dtype=np.float32).tobytes(), 512)
    view, held = memory.tracked(torch.float32, (2, 3), 512, 24)
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    alive = weakref.ref(held)
    row = view[1]
    del held, view
    assert alive() is not None
    assert row.tolist() == [3, 4, 5]
    del row
    assert alive() is None


def test_it_is_unmapped_when_the_last_tensor_is_gone(memfd: int) -> None:
    memory = Shown(memfd)
    view, held = memory.tracked(torch.uint8, (4,), 0, 4)
    del memory, held
    assert mapped() == 1
    assert view.tolist() == [0, 0, 0, 0]
    del view
    assert mapped() == 0


def test_on_the_host_a_fence_is_not_needed(memfd: int) -> None:
    memory = Shown(memfd)
    assert memory.fence() is None
    assert memory.device == torch.device("cpu")


def test_more_than_the_address_space_is_refused_with_the_size() -> None:
    with pytest.raises(OSError, match=f"cannot map {1 << 60} bytes of memory 1"):
        HostMemory(1 << 60, "memory 1")
