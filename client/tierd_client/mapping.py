"""Read-only mappings of what the daemon shares in files: the DRAM arenas and the slot tables."""

from __future__ import annotations

import os
import threading
import weakref

from tierd_client import fork
from tierd_client.errors import ProtocolBroken
from tierd_client.host_memory import HostMemory
from tierd_layouts.errors import FormatError
from tierd_layouts.slot_table import SlotTable

POPULATE_BYTES = 2 << 20  # granule in which touched ranges are remembered


class Mapping(HostMemory):
    """`nbytes` of a descriptor, mapped PROT_READ | MAP_SHARED. The descriptor may be closed after.

    Raises ProtocolBroken when the file is shorter than `nbytes` (a read would be a SIGBUS), OSError
    when mmap fails.
    """

    def __init__(self, fd: int, nbytes: int, what: str) -> None:
        size = os.fstat(fd).st_size
        if nbytes <= 0 or size < nbytes:
            raise ProtocolBroken(f"{what} has {size} bytes, the daemon announced {nbytes}")
        super().__init__(nbytes, what)
        self._populated: set[int] = set()
        self._show(fd, 0, nbytes, what)

    def populate(self, offset: int, nbytes: int) -> None:
        """Make a range's pages present, before it is first read.

        Only what this process never touched: pages stay mapped while the daemon refills a slot.
        """
        first, last = offset // POPULATE_BYTES, (offset + nbytes - 1) // POPULATE_BYTES
        if first in self._populated and last in self._populated:
            return
        self._touch(offset, nbytes)
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
        self._tables: weakref.WeakValueDictionary[tuple[int, str], TableMapping]
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

    def table(self, epoch: int, tier: str, fd: int, nbytes: int) -> TableMapping:
        """The mapping of a tier's slot table. The caller keeps `fd` and closes it."""
        with self._lock:
            mapping = self._tables.get((epoch, tier))
            if mapping is None:
                mapping = self._tables[epoch, tier] = TableMapping(fd, nbytes)
            return mapping

    def _forget(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._arenas = weakref.WeakValueDictionary()
        self._tables = weakref.WeakValueDictionary()
        fork.in_child(self, Mappings._forget)


mappings = Mappings()
