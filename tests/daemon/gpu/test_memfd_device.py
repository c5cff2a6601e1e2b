from __future__ import annotations

import fcntl
import mmap
import os
import stat
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK, MEMORY, Rig, descriptors, make_rig
from tierd.gpu.copy_engine import address_of
from tierd.gpu.errors import DeviceError, DeviceUnavailable, OutOfDeviceMemory
from tierd.gpu.memfd_device import MemfdDevice
from tierd.gpu.registration import HostMemory

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = make_rig("memfd")
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    yield rig
    rig.device.close()


def test_a_client_gets_a_descriptor_that_cannot_be_written_or_resized(rig: Rig) -> None:
    rig.device.back(0, 0, 1)
    fd = rig.device.export(0, 0).fd
    assert fd is not None
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with pytest.raises(PermissionError):
        mmap.mmap(fd, CHUNK, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
    found = os.fstat(fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_size, found.st_blocks * 512) == (CHUNK, CHUNK)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_memory_that_was_freed_lives_on_in_who_mapped_it(rig: Rig) -> None:
    rig.device.back(0, 0, 1)
    rig.device.copy(0, 0, memoryview(b"old")).wait()
    fd = rig.device.export(0, 0).fd
    assert fd is not None
    rig.device.free(0, 0, 1)
    rig.device.back(0, 0, 1)
    rig.device.copy(0, 0, memoryview(b"new")).wait()
    assert os.pread(fd, 3, 0) == b"old"
    assert rig.content(0, 0)[:3] == b"new"
    os.close(fd)


def test_memory_that_it_does_not_have_is_refused_and_nothing_is_taken(rig: Rig) -> None:
    rig.device.back(0, 0, 8)
    rig.device.add_arena(1, BUDGET)
    before = descriptors()
    with pytest.raises(OutOfDeviceMemory, match=r"chunk 4 of arena 1 needs .* of 24.* are free"):
        rig.device.back(1, 0, 8)
    assert rig.device.backed_bytes == BUDGET
    assert descriptors() == before
    rig.device.back(1, 0, (MEMORY - BUDGET) // CHUNK)


@pytest.mark.parametrize("call", ["memfd_create", "posix_fallocate", "fchmod", "open"])
def test_a_system_that_refuses_any_step_is_named_and_nothing_leaks(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = descriptors()
    real = getattr(os, call)
    calls = 0

    def refuse(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(f"tierd.gpu.memfd_device.os.{call}", refuse)
    with pytest.raises(OutOfDeviceMemory, match="for chunk 1 of arena 0 were refused"):
        rig.device.back(0, 0, 3)
    monkeypatch.undo()
    assert rig.device.backed_bytes == 0
    assert descriptors() == before
    rig.device.back(0, 0, 3)


def test_a_descriptor_that_cannot_be_made_is_an_error_that_names_the_chunk(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.device.back(0, 0, 1)

    def refuse(fd: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("tierd.gpu.memfd_device.os.dup", refuse)
    with pytest.raises(DeviceError, match="no descriptor for chunk 0 of arena 0"):
        rig.device.export(0, 0)


def test_addresses_that_the_system_does_not_have_are_refused(rig: Rig) -> None:
    with pytest.raises(DeviceError, match="of address space for arena 1 were refused"):
        rig.device.add_arena(1, 1 << 60)
    with pytest.raises(ValueError, match="there is no arena 1"):
        rig.device.back(1, 0, 1)


def test_without_a_size_of_its_own_it_has_the_machines_memory() -> None:
    device = MemfdDevice(0, CHUNK, 1 << 60)
    with pytest.raises(DeviceUnavailable, match="of memory are free"):
        device.open()
    memory = device.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes


def test_a_chunk_that_is_no_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="a chunk is whole pages of 4096, not 1000 bytes"):
        MemfdDevice(0, 1000, CHUNK)


def test_what_is_copied_from_memory_that_is_not_registered_is_counted() -> None:
    rig = make_rig("memfd", host=HostMemory())
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    rig.device.back(0, 0, 1)
    rig.device.copy(0, 0, memoryview(b"12345")).wait()
    assert rig.device.unpinned_bytes == 5
    rig.device.close()


def test_what_one_of_them_registered_is_registered_for_all_of_a_process() -> None:
    """As with CUDA: a second GPU's copies are cut there too, and are none of unpinned memory."""
    memory = memoryview(bytearray(3 * CHUNK))
    address = -(-address_of(memory) // CHUNK) * CHUNK
    host = HostMemory(CHUNK)
    host.add_arena(0, address, CHUNK)
    host.populated(0, 0, CHUNK)
    first, second = make_rig("memfd", host=host).device, make_rig("memfd", host=host).device
    first.register(address, CHUNK)
    host.registered(0, 0, CHUNK)
    second.open()
    second.add_arena(0, BUDGET)
    second.back(0, 0, 1)
    start = address - address_of(memory)
    second.copy(0, 0, memory[start : start + CHUNK]).wait()
    assert second.unpinned_bytes == 0
    with pytest.raises(DeviceError, match="a part is registered already"):
        second.register(address, CHUNK)
    second.unregister(address, CHUNK)
    second.close()
