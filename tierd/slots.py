"""The slot table's owner: writes down what the core decided, before it takes effect.

A slot is FILLING before its bytes change and RESIDENT only after they were verified; a lease is in
the table before its holder hears of it. So whatever instruction the daemon dies at, its successor
never takes a slot for free that somebody reads.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from tierd.errors import ArenaError
from tierd_layouts.slot_entries import DEFAULT_LEASES, DEFAULT_SLOTS, SlotState, table_bytes
from tierd_layouts.slot_table import SlotTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.core.model import Read
    from tierd.core.stack_model import Copy, DirectRead

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Slots:
    """The table in its memfd. `fd` is for the descriptor store, `readonly_fd` for clients."""

    def __init__(self, fd: int, table: SlotTable, memory: mmap.mmap, used: Iterable[int]) -> None:
        self.fd = fd
        self.table = table
        self.nbytes = len(memory)
        self.readonly_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._memory = memory
        taken = set(used)
        self._free = [entry for entry in range(table.lease_count - 1, -1, -1) if entry not in taken]
        self._entries: dict[int, int] = {}  # lease -> entry of the table

    @classmethod
    def create(cls, epoch: int) -> Slots:
        """An empty table. Raises ArenaError when the system refuses the memory."""
        nbytes = table_bytes(DEFAULT_SLOTS, DEFAULT_LEASES)
        try:
            fd = os.memfd_create("tierd-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            os.fchmod(fd, 0o600)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(fd, nbytes)
        except OSError as error:
            raise ArenaError(f"no memory for a slot table of {nbytes} bytes: {error}") from error
        return cls(fd, SlotTable.create(memory, epoch=epoch), memory, ())

    @classmethod
    def adopt(cls, fd: int) -> Slots:
        """The table of an earlier daemon, checked. Raises ArenaError (no sealed memfd of the right
        size) or FormatError (what is in it cannot be true), and leaves `fd` open."""
        nbytes = table_bytes(DEFAULT_SLOTS, DEFAULT_LEASES)
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ArenaError(f"the slot table's descriptor is no memfd: {error}") from error
        if seals & _SEALS != _SEALS or os.fstat(fd).st_size != nbytes:
            raise ArenaError(
                f"the slot table has {os.fstat(fd).st_size} bytes and seals {seals:#x}, "
                f"expected {nbytes} bytes, sealed"
            )
        memory = mmap.mmap(fd, nbytes)
        table = SlotTable(memory)
        table.parse_check()
        slots = cls(fd, table, memory, (held.entry for held in table.leases()))
        slots._entries = {held.lease: held.entry for held in table.leases()}
        return slots

    def filling(self, action: Read | Copy | DirectRead, key: bytes) -> None:
        """The bytes of its slot are about to become those of the layer with this key."""
        self.table.set_slot(
            action.slot,
            generation=action.generation,
            arena=action.arena,
            offset=action.offset,
            nbytes=action.nbytes,
            state=SlotState.FILLING,
            key=key,
        )

    def resident(self, slot: int) -> None:
        """The slot's bytes are verified and will not change."""
        self.table.mark_resident(slot)

    def clear(self, slot: int) -> None:
        self.table.clear_slot(slot)

    def lease(self, lease: int, *, pid: int, start_time: int, slot: int, generation: int) -> None:
        """Write down a lease that will be granted next."""
        entry = self._free.pop()
        self._entries[lease] = entry
        self.table.set_lease(
            entry, lease=lease, pid=pid, start_time=start_time, slot=slot, generation=generation
        )

    def end(self, lease: int) -> None:
        """The lease is over."""
        entry = self._entries.pop(lease)
        self.table.clear_lease(entry)
        self._free.append(entry)

    def set_holders(self, holders: int) -> None:
        """Tell the clients how many processes work with leases."""
        self.table.holders = holders

    @property
    def leases(self) -> int:
        return len(self._entries)

    @property
    def free_leases(self) -> int:
        return len(self._free)

    def close(self) -> None:
        self.table.close()
        self._memory.close()
        os.close(self.readonly_fd)
        os.close(self.fd)
