"""CuPy's `cupy.cuda.runtime`, as far as CUDA IPC goes, beside a `FakeDriver`.

A handle names the process and the descriptor behind an allocation. As with CUDA, opening one in the
process that made it fails, opening it twice gives the same address, and whoever has it can write.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

import tests.fake_cuda.driver as fake

if TYPE_CHECKING:
    from tests.fake_cuda.driver import FakeDriver

_HANDLE = struct.Struct("<4sIIQ44x")  # 64 bytes, as cudaIpcMemHandle_t
_MAGIC = b"fake"


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int, name: str) -> None:
        super().__init__(name)
        self.status = status


class FakeRuntime:
    """Attributes are named as the module's."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.faults: dict[str, int] = {}
        self.opened: dict[bytes, list[int]] = {}  # handle -> address, how often
        self.suballocates = False  #: whether an allocation is a part of a block

    def setDevice(self, device: int) -> None:
        self._fail("setDevice")
        if device >= self.driver.gpus:
            raise CUDARuntimeError(101, "cudaErrorInvalidDevice: invalid device ordinal")

    def deviceSynchronize(self) -> None:
        self._fail("deviceSynchronize")
        self.driver.cuCtxSynchronize()

    def malloc(self, nbytes: int) -> int:
        self._fail("malloc")
        skipped = 4096 if self.suballocates else 0
        try:
            memory = self.driver.new_memory(nbytes + skipped)
        except fake.Refused as refused:
            raise CUDARuntimeError(2, "cudaErrorMemoryAllocation: out of memory") from refused
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = fake.map_at(None, memory.nbytes, protection, mmap.MAP_SHARED, memory.fd)
        self.driver.allocations[address] = memory
        return address + skipped

    def free(self, address: int) -> None:
        self._fail("free")
        for start, memory in self.driver.allocations.items():
            if start <= address < start + memory.nbytes:
                del self.driver.allocations[start]
                fake._libc.munmap(start, memory.nbytes)
                os.close(memory.fd)
                return
        raise CUDARuntimeError(1, "cudaErrorInvalidValue: invalid argument")

    def ipcGetMemHandle(self, address: int) -> bytes:
        self._fail("ipcGetMemHandle")
        for start, memory in self.driver.allocations.items():
            if start <= address < start + memory.nbytes:
                return _HANDLE.pack(_MAGIC, os.getpid(), memory.fd, memory.nbytes)
        raise CUDARuntimeError(1, "cudaErrorInvalidValue: invalid argument")

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:
        self._fail("ipcOpenMemHandle")
        magic, pid, fd, nbytes = _HANDLE.unpack(handle)
        if magic != _MAGIC or pid == os.getpid():
            raise CUDARuntimeError(201, "cudaErrorDeviceUninitialized: invalid device context")
        if handle in self.opened:
            self.opened[handle][1] += 1
            return self.opened[handle][0]
        memory = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = fake.map_at(None, nbytes, protection, mmap.MAP_SHARED, memory)
        os.close(memory)
        self.opened[handle] = [address, 1]
        self.driver.opened[address] = nbytes
        return address

    def ipcCloseMemHandle(self, address: int) -> None:
        self._fail("ipcCloseMemHandle")
        for handle, (start, count) in self.opened.items():
            if start == address:
                self.opened[handle][1] -= 1
                if count == 1:
                    del self.opened[handle], self.driver.opened[start]
                    fake._libc.munmap(start, _HANDLE.unpack(handle)[3])
                return
        raise CUDARuntimeError(1, "cudaErrorInvalidValue: invalid argument")

    def _fail(self, name: str) -> None:
        if name in self.faults:
            raise CUDARuntimeError(self.faults[name], f"cudaError{self.faults[name]}: injected")
