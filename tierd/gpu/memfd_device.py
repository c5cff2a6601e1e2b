"""A GPU of ordinary memory, for tests and for trying things out: a memfd for each chunk.

It behaves as `cuda_vmm` does: a chunk is exported as a descriptor that cannot be written through,
its memory lives until the last process has unmapped it, copies run in order beside the caller.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.gpu.copy_engine import CopyEngine, address_of
from tierd.gpu.device import DeviceInfo, DeviceMemory, Export
from tierd.gpu.errors import DeviceError, DeviceFull, OutOfDeviceMemory
from tierd.gpu.registered import Registered
from tierd.gpu.span import Spans
from tierd.io.memory_limits import available_bytes
from tierd.sizes import format_size

if TYPE_CHECKING:
    from tierd.gpu.copy_engine import EngineCopy
    from tierd.gpu.device import Kind, Pending
    from tierd.gpu.registration import HostMemory, Use

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

# Not in Python 3.11's mmap module; values from linux/uapi.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_MAP_FAILED = ctypes.c_void_p(-1).value
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

SPAN_BUDGETS = 8  # addresses cost nothing; many keep large ranges findable between small ones


@dataclass(frozen=True, slots=True)
class _Chunk:
    readonly_fd: int


class MemfdCopy:
    """A `device.Pending`."""

    def __init__(self, copy: EngineCopy, use: Use) -> None:
        self._copy = copy
        self._use = use

    def wait(self) -> None:
        try:
            self._copy.wait()
        finally:
            self._use.end()


class MemfdDevice:
    """A `device.Device`."""

    kind: Kind = "memfd"
    elastic = True

    def __init__(
        self,
        number: int,
        chunk_bytes: int,
        budget_bytes: int,
        *,
        copy_bandwidth: int | None = None,
        copy_latency_us: int = 0,
        memory_bytes: int | None = None,
        host: HostMemory | None = None,
    ) -> None:
        """chunk_bytes: whole pages. copy_bandwidth: bytes per second, None = what the memory
        gives. memory_bytes: of this "GPU", None = what the machine has. host: what of the host's
        memory is registered; nothing is copied differently, but counted."""
        if chunk_bytes <= 0 or chunk_bytes % mmap.PAGESIZE:
            raise ValueError(f"a chunk is whole pages of {mmap.PAGESIZE}, not {chunk_bytes} bytes")
        self.number = number
        self.chunk_bytes = chunk_bytes
        self._budget_bytes = budget_bytes
        self._bandwidth = copy_bandwidth
        self._latency_us = copy_latency_us
        self._memory_bytes = memory_bytes
        self._spans: Spans[_Chunk] = Spans(chunk_bytes)
        self._engine: CopyEngine | None = None
        self._host = host
        self._registered = Registered("memfd") if host is None else host.without_driver
        self.unpinned_bytes = 0

    @property
    def backed_bytes(self) -> int:
        return self._spans.backed_bytes

    def span_bytes(self, budget_bytes: int) -> int:
        return -(-budget_bytes // self.chunk_bytes) * self.chunk_bytes * SPAN_BUDGETS

    def open(self) -> DeviceInfo:
        memory = self.memory()
        if memory.free_bytes < self._budget_bytes:
            raise DeviceFull(
                f"gpu:{self.number} (memfd) was given {format_size(self._budget_bytes)}, but "
                f"{format_size(memory.free_bytes)} of memory are free",
                f"lower --gpu {self.number}=SIZE",
            )
        self._engine = CopyEngine(
            f"tierd-gpu{self.number}-engine", self._bandwidth, self._latency_us
        )
        return DeviceInfo(
            name="shared memory", uuid=f"memfd-{self.number}", driver="memfd",
            total_bytes=memory.total_bytes, free_bytes=memory.free_bytes,
        )  # fmt: skip

    def memory(self) -> DeviceMemory:
        if self._memory_bytes is not None:
            return DeviceMemory(self._memory_bytes, self._memory_bytes - self.backed_bytes)
        total = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
        return DeviceMemory(total, available_bytes().nbytes)

    def add_arena(self, arena: int, span_bytes: int) -> None:
        self._spans.check_new(arena, span_bytes)
        try:
            base = _map(None, span_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        except OSError as error:
            raise DeviceError(
                f"gpu:{self.number} (memfd): {format_size(span_bytes)} of address space for arena "
                f"{arena} were refused: {error}"
            ) from error
        self._spans.add(arena, base, span_bytes)

    def back(self, arena: int, first: int, count: int) -> None:
        span = self._spans[arena]
        missing = span.missing(first, count)
        try:
            for chunk in missing:
                span.chunks[chunk] = self._new_chunk(arena, chunk, span.address(chunk))
        except DeviceError:
            for chunk in missing:
                self.free(arena, chunk, 1)
            raise

    def free(self, arena: int, first: int, count: int) -> None:
        span = self._spans[arena]
        for chunk in span.present(first, count):
            self._drop(span.chunks[chunk], span.address(chunk))
            del span.chunks[chunk]

    def export(self, arena: int, chunk: int) -> Export:
        readonly_fd = self._spans[arena].backing(chunk).readonly_fd
        try:
            return Export(self.chunk_bytes, fd=os.dup(readonly_fd))
        except OSError as error:
            raise DeviceError(
                f"gpu:{self.number} (memfd): no descriptor for chunk {chunk} of arena {arena}: "
                f"{error}"
            ) from error

    def copy(self, arena: int, offset: int, source: memoryview) -> Pending:
        target = self._spans[arena].target(offset, source.nbytes)
        assert self._engine is not None, "copy before open"
        if self._host is None:
            return self._engine.start(target, source)
        use = self._host.use(address_of(source), source.nbytes)
        try:
            self._registered.check(use.spans)
            copy = self._engine.start(target, source)
        except DeviceError:
            use.end()
            raise
        self.unpinned_bytes += use.unpinned_bytes
        return MemfdCopy(copy, use)

    def parts(self, arena: int, offset: int, nbytes: int) -> list[tuple[int, int]]:
        return self._spans[arena].parts(offset, nbytes)

    def enter(self) -> None:
        pass

    def fetch(self, address: int, nbytes: int) -> bytearray:
        return bytearray(ctypes.string_at(address, nbytes))

    def register(self, address: int, nbytes: int) -> None:
        self._registered.add(address, nbytes)

    def unregister(self, address: int, nbytes: int) -> None:
        self._registered.remove(address)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        for span in self._spans.take_all():
            for chunk in span.chunks.values():
                os.close(chunk.readonly_fd)
            _libc.munmap(span.base, span.span_bytes)

    def _new_chunk(self, arena: int, chunk: int, address: int) -> _Chunk:
        memory_bytes = self._memory_bytes
        if memory_bytes is not None and self.backed_bytes + self.chunk_bytes > memory_bytes:
            raise OutOfDeviceMemory(
                f"gpu:{self.number} (memfd): chunk {chunk} of arena {arena} needs "
                f"{format_size(self.chunk_bytes)}, {format_size(memory_bytes - self.backed_bytes)} "
                f"of {format_size(memory_bytes)} are free"
            )
        name = f"tierd-gpu{self.number}-{arena}-{chunk}"
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                return self._fill(fd, address)
            finally:
                os.close(fd)
        except OSError as error:
            kind = OutOfDeviceMemory if error.errno in _NO_MEMORY else DeviceError
            raise kind(
                f"gpu:{self.number} (memfd): {format_size(self.chunk_bytes)} for chunk {chunk} of "
                f"arena {arena} were refused: {error}"
            ) from error

    def _fill(self, fd: int, address: int) -> _Chunk:
        os.posix_fallocate(fd, 0, self.chunk_bytes)  # it exists from now on, or not at all
        os.fchmod(fd, 0o600)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        chunk = _Chunk(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        try:
            _map(address, self.chunk_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd)
        except OSError:
            os.close(chunk.readonly_fd)
            raise
        return chunk

    def _drop(self, chunk: _Chunk, address: int) -> None:
        try:
            _map(address, self.chunk_bytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        except OSError as error:
            raise DeviceError(
                f"gpu:{self.number} (memfd): {format_size(self.chunk_bytes)} at {address:#x} could "
                f"not be unmapped: {error}"
            ) from error
        os.close(chunk.readonly_fd)


_NO_MEMORY = (errno.ENOMEM, errno.ENOSPC)


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    """As mmap(2), at exactly `address` unless that is None. Raises OSError."""
    flags |= _MAP_NORESERVE if address is None else _MAP_NORESERVE | _MAP_FIXED
    found = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if found is None or found == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
