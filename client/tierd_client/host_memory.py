"""Addresses of this process that show what the daemon shares: as bytes and tensors, without a copy.

They stay mapped as long as any array or tensor made from them: `munmap` runs when the last one is
gone, never under a reader. In a forked child they are replaced by ones that fault: a child has no
lease, so it must not read what the daemon may already have overwritten.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

from tierd_client import fork

if TYPE_CHECKING:
    import torch

    from tierd_client.memory import Fence

PAGE_BYTES = mmap.PAGESIZE
HUGE_BYTES = 2 << 20
PROT_NONE = 0
MADV_HUGEPAGE = 14
MADV_DONTDUMP = 16
MADV_POPULATE_READ = 22  # since Linux 5.14
MAP_NORESERVE = 0x4000
MAP_FIXED = 0x10

# mmap.mmap is of no use here: it keeps a duplicate of the descriptor, cannot give its address for
# a read-only mapping, and refuses to close while exported instead of waiting.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class HostMemory:
    """`nbytes` of reserved addresses, on a multiple of 2 MiB, without which no huge page can be
    mapped as one. A subclass shows files there. Raises OSError."""

    def __init__(self, nbytes: int, what: str) -> None:
        self.nbytes = nbytes
        self.what = what
        self._address = _reserve(nbytes, what)
        # Everything made from the memory holds this object, and its end unmaps.
        self._span: Any = (ctypes.c_uint8 * nbytes).from_address(self._address)
        finalizer = weakref.finalize(self._span, _unmap, self._address, nbytes, fork.current())
        finalizer.atexit = False  # at exit the kernel unmaps, after the last reader
        fork.in_child(self._span, _poison)
        self._tensors: dict[torch.dtype, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return _cpu()

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """A read-only view of a range (the caller checked). No copy."""
        return memoryview(self._span).cast("B")[offset : offset + nbytes].toreadonly()

    def tensor(
        self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        """A tensor over a range, whose storage is the whole memory: one torch call, no tracking.

        offset: in bytes, a multiple of the item size. Never write to it: the pages are read-only.
        """
        whole = self._tensors.get(dtype)
        if whole is None:
            import torch

            count = self.nbytes // dtype.itemsize
            with torch.inference_mode(False):  # the thread may leave inference mode later
                whole = torch.frombuffer(self._span, dtype=dtype, count=count)
            self._tensors[dtype] = whole
        return whole.as_strided(shape, strides, offset // dtype.itemsize)

    def tracked(
        self, dtype: torch.dtype, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> tuple[torch.Tensor, Any]:
        """A tensor over a range, and the buffer that its storage holds."""
        import torch

        exporter = self.exporter(offset, nbytes)
        return torch.frombuffer(exporter, dtype=dtype).view(shape), exporter

    def exporter(self, offset: int, nbytes: int) -> Any:
        """A new buffer object over a range, held by the storage of whatever is made from it.

        Its weak reference therefore tells when the last tensor that shares the storage is gone.
        """
        buffer: Any = (ctypes.c_uint8 * nbytes).from_address(self._address + offset)
        buffer.span = self._span
        return buffer

    def fence(self) -> Fence | None:
        """None: what a thread computes from here is done when the call returns."""
        return None

    fence_all = fence

    def _show(self, fd: int, offset: int, nbytes: int, what: str) -> None:
        """Map the beginning of a file, for reading, over a range."""
        flags = mmap.MAP_SHARED | MAP_NORESERVE | MAP_FIXED
        address = self._address + offset
        if _libc.mmap(address, nbytes, mmap.PROT_READ, flags, fd, 0) == _FAILED:
            raise _failed(nbytes, what)
        _libc.madvise(address, nbytes, MADV_HUGEPAGE)  # EINVAL without THP: then 4 KiB it is
        _libc.madvise(address, nbytes, MADV_DONTDUMP)  # a core dump needs no weights

    def _hide(self, offset: int, nbytes: int) -> None:
        """Replace what a range shows by addresses that fault."""
        if _reserve_at(self._address + offset, nbytes) == _FAILED:
            raise _failed(nbytes, self.what)

    def _touch(self, offset: int, nbytes: int) -> None:
        """Make the pages of a range present at once, which is cheaper than a fault for each."""
        begin = offset // PAGE_BYTES * PAGE_BYTES
        _libc.madvise(self._address + begin, offset + nbytes - begin, MADV_POPULATE_READ)


@cache
def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def _reserve(nbytes: int, what: str) -> int:
    """Addresses that fault, up to the end of the last page."""
    room = nbytes + HUGE_BYTES
    reserved = _reserve_at(None, room)
    if reserved is None or reserved == _FAILED:
        raise _failed(nbytes, what)
    address = -(-reserved // HUGE_BYTES) * HUGE_BYTES
    end = address + -(-nbytes // PAGE_BYTES) * PAGE_BYTES
    if address > reserved:
        _libc.munmap(reserved, address - reserved)
    if reserved + room > end:
        _libc.munmap(end, reserved + room - end)
    return address


def _reserve_at(address: int | None, nbytes: int) -> int | None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    if address is not None:
        flags |= MAP_FIXED
    found: int | None = _libc.mmap(address, nbytes, PROT_NONE, flags, -1, 0)
    return found


def _failed(nbytes: int, what: str) -> OSError:
    error = ctypes.get_errno()
    return OSError(error, f"cannot map {nbytes} bytes of {what}: {os.strerror(error)}")


def _unmap(address: int, nbytes: int, life: fork.Life) -> None:
    if life is fork.current():
        _libc.munmap(address, nbytes)


def _poison(span: Any) -> None:
    """Replace the range by one that faults on any access, and keep it reserved."""
    _reserve_at(ctypes.addressof(span), ctypes.sizeof(span))
