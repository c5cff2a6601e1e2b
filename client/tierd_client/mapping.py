"""Read-only mappings of what the daemon shares: arenas and slot tables, as arrays without a copy.

A mapping lives as long as any array or tensor made from it: `munmap` runs when the last one is
gone, never under a reader. In a forked child its address range is replaced by one that faults: a
child has no lease, so it must not read what the daemon may already have overwritten.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any

from tierd_client import fork
from tierd_client.errors import ProtocolBroken
from tierd_layouts.errors import FormatError
from tierd_layouts.slot_table import SlotTable

if TYPE_CHECKING:
    import torch

PAGE_BYTES = mmap.PAGESIZE
HUGE_BYTES = 2 << 20
POPULATE_BYTES = 2 << 20  # granule in which touched ranges are remembered
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


class Mapping:
    """`nbytes` of a descriptor, mapped PROT_READ | MAP_SHARED. The descriptor may be closed after.

    Raises ProtocolBroken when the file is shorter than `nbytes` (a read would be a SIGBUS), OSError
    when mmap fails.
    """

    def __init__(self, fd: int, nbytes: int, what: str) -> None:
        size = os.fstat(fd).st_size
        if nbytes <= 0 or size < nbytes:
            raise ProtocolBroken(f"{what} has {size} bytes, the daemon announced {nbytes}")
        address = _map(fd, nbytes, what)
        self.nbytes = nbytes
        self.what = what
        self._life = fork.current()
        # Everything made from the mapping holds this object, and its end unmaps.
        self._span: Any = (ctypes.c_uint8 * nbytes).from_address(address)
        finalizer = weakref.finalize(self._span, _unmap, address, nbytes, self._life)
        finalizer.atexit = False  # at exit the kernel unmaps, after the last reader
        fork.in_child(self._span, _poison)
        self._address = address
        self._populated: set[int] = set()
        self._tensors: dict[torch.dtype, torch.Tensor] = {}
        _libc.madvise(address, nbytes, MADV_HUGEPAGE)  # EINVAL without THP: then 4 KiB it is
        _libc.madvise(address, nbytes, MADV_DONTDUMP)  # a core dump needs no weights

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """A read-only view of a range inside the mapping (the caller checked). No copy."""
        return memoryview(self._span).cast("B")[offset : offset + nbytes].toreadonly()

    def tensor(
        self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        """A tensor over a range, whose storage is the whole mapping: one torch call, no tracking.

        offset: in bytes, a multiple of the item size. Never write to it: the pages are read-only.
        """
        whole = self._tensors.get(dtype)
        if whole is None:
            import torch

            count = self.nbytes // dtype.itemsize
            whole = torch.frombuffer(self._span, dtype=dtype, count=count)
            self._tensors[dtype] = whole
        return whole.as_strided(shape, strides, offset // dtype.itemsize)

    def exporter(self, offset: int, nbytes: int) -> Any:
        """A new buffer object over a range, held by the storage of whatever is made from it.

        Its weak reference therefore tells when the last tensor that shares the storage is gone.
        """
        buffer: Any = (ctypes.c_uint8 * nbytes).from_address(self._address + offset)
        buffer.span = self._span
        return buffer

    def populate(self, offset: int, nbytes: int) -> None:
        """Make a range's pages present at once, which is cheaper than a fault for each.

        Only what this process never touched: pages stay mapped while the daemon refills a slot.
        """
        first, last = offset // POPULATE_BYTES, (offset + nbytes - 1) // POPULATE_BYTES
        if first in self._populated and last in self._populated:
            return
        begin = offset // PAGE_BYTES * PAGE_BYTES
        _libc.madvise(self._address + begin, offset + nbytes - begin, MADV_POPULATE_READ)
        self._populated.update(range(first, last + 1))


class TableMapping:
    """A slot table, mapped read-only."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._mapping = Mapping(fd, nbytes, "slot table")
        try:
            self.table = SlotTable(self._mapping.buffer(0, nbytes))
        except FormatError as error:
            raise ProtocolBroken(f"unreadable slot table: {error}") from error

    @property
    def holders(self) -> int:
        """Processes that work with leases now, as the daemon counts; 0 when it does not."""
        return self.table.holders

    @property
    def pressed(self) -> bool:
        """Whether clients should give back what they do not compute with."""
        return self.table.pressed

    @property
    def attention(self) -> int:
        """Changes when clients should ask `attend`."""
        return self.table.attention

    def generation(self, slot: int) -> int:
        """The generation that the slot holds now, 0 when it is free or unknown."""
        return self.table.generation(slot) if 0 <= slot < self.table.slot_count else 0


class Mappings:
    """One mapping for each (daemon epoch, arena) of this process, shared by all its clients."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arenas: weakref.WeakValueDictionary[tuple[int, int], Mapping]
        self._arenas = weakref.WeakValueDictionary()
        self._tables: weakref.WeakValueDictionary[int, TableMapping]
        self._tables = weakref.WeakValueDictionary()
        fork.in_child(self, Mappings._forget)

    def arena(self, epoch: int, arena: int, fd: int, nbytes: int) -> Mapping:
        """The mapping of an arena. The caller keeps `fd` and closes it."""
        with self._lock:
            mapping = self._arenas.get((epoch, arena))
            if mapping is None:
                mapping = Mapping(fd, nbytes, f"arena {arena}")
                self._arenas[epoch, arena] = mapping
            return mapping

    def table(self, epoch: int, fd: int, nbytes: int) -> TableMapping:
        """The mapping of the slot table. The caller keeps `fd` and closes it."""
        with self._lock:
            mapping = self._tables.get(epoch)
            if mapping is None:
                mapping = self._tables[epoch] = TableMapping(fd, nbytes)
            return mapping

    def _forget(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._arenas = weakref.WeakValueDictionary()
        self._tables = weakref.WeakValueDictionary()
        fork.in_child(self, Mappings._forget)


mappings = Mappings()


def _unmap(address: int, nbytes: int, life: fork.Life) -> None:
    if life is fork.current():
        _libc.munmap(address, nbytes)


def _poison(span: Any) -> None:
    """Replace the range by one that faults on any access, and keep it reserved."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
    _libc.mmap(ctypes.addressof(span), ctypes.sizeof(span), PROT_NONE, flags, -1, 0)


def _map(fd: int, nbytes: int, what: str) -> int:
    """Map the file at a multiple of 2 MiB, without which no huge page can be mapped as one."""
    room = nbytes + HUGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    reserved = _libc.mmap(None, room, PROT_NONE, flags, -1, 0)
    if reserved != _FAILED:
        address: int = -(-reserved // HUGE_BYTES) * HUGE_BYTES
        flags = mmap.MAP_SHARED | MAP_NORESERVE | MAP_FIXED
        if _libc.mmap(address, nbytes, mmap.PROT_READ, flags, fd, 0) != _FAILED:
            end = address + -(-nbytes // PAGE_BYTES) * PAGE_BYTES
            if address > reserved:
                _libc.munmap(reserved, address - reserved)
            if reserved + room > end:
                _libc.munmap(end, reserved + room - end)
            return address
    error = ctypes.get_errno()
    if reserved != _FAILED:
        _libc.munmap(reserved, room)
    raise OSError(error, f"cannot map {nbytes} bytes of {what}: {os.strerror(error)}")
