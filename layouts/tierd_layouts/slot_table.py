"""The slot table: what the arenas hold and who reads it, in a memfd of its own.

The daemon writes it; clients map it read-only to check a slot's generation without a round trip,
and a restarted daemon reads it to learn what is resident and which slots orphans still read. It
must therefore be readable after a kill between any two stores. The rule: an entry is dead (state
FREE, lease 0) before any other field changes, and alive only after every other field is complete.
Each field is one aligned store of 4 or 8 bytes.

x86 keeps the order of stores for readers on other cores. On other processors a concurrent reader
could see them in another order, but never a killed writer's successor.
Source: FORMAT.md, section "Slot table".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts import slot_table_rules
from tierd_layouts.errors import (
    LeaseInvalid,
    SlotInvalid,
    SlotTableMagicWrong,
    SlotTableTruncated,
    SlotTableVersionUnknown,
)
from tierd_layouts.slot_entries import (
    DEFAULT_LEASES,
    DEFAULT_SLOTS,
    HEADER,
    HEADER_BYTES,
    KEY_BYTES,
    LEASE,
    MAGIC,
    SLOT,
    SLOT_BYTES,
    VERSION,
    LeaseEntry,
    SlotEntry,
    SlotState,
    table_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap


class SlotTable:
    """A view of a slot table; writing needs a writable buffer.

    Raises SlotTableTruncated, SlotTableMagicWrong, SlotTableVersionUnknown. Call `close` before the
    buffer is unmapped.
    """

    def __init__(self, buffer: memoryview | bytearray | bytes | mmap) -> None:
        raw = np.frombuffer(buffer, np.uint8)
        if raw.size < HEADER_BYTES:
            raise SlotTableTruncated(
                f"slot table has {raw.size} bytes, its header needs {HEADER_BYTES}"
            )
        magic = raw[: len(MAGIC)].tobytes()
        if magic != MAGIC:
            raise SlotTableMagicWrong(f"slot table begins with {magic!r}, expected {MAGIC!r}")
        header = raw[:HEADER_BYTES].view(HEADER)
        version = int(header["version"][0])
        if version != VERSION:
            raise SlotTableVersionUnknown(f"slot table version {version}, known is {VERSION}")
        self._attach(raw, int(header["slot_count"][0]), int(header["lease_count"][0]))

    @classmethod
    def create(
        cls,
        buffer: memoryview | bytearray | mmap,
        *,
        slot_count: int = DEFAULT_SLOTS,
        lease_count: int = DEFAULT_LEASES,
        epoch: int = 0,
    ) -> SlotTable:
        """Writes an empty table into `buffer`, which must be all zero (a new memfd is).

        The buffer is not cleared: that would make every page of a sparse memfd real.
        """
        table = cls.__new__(cls)
        table._attach(np.frombuffer(buffer, np.uint8), slot_count, lease_count)
        header = table._header
        header["version"][0] = VERSION
        header["slot_count"][0] = slot_count
        header["lease_count"][0] = lease_count
        header["epoch"][0] = epoch
        header["next_generation"][0] = 1
        header["next_lease"][0] = 1
        header["magic"][0] = int.from_bytes(MAGIC, "little")  # last: now it is a table
        return table

    def _attach(self, raw: np.ndarray[Any, np.dtype[np.uint8]], slots: int, leases: int) -> None:
        needed = table_bytes(slots, leases)
        if raw.size < needed:
            raise SlotTableTruncated(
                f"slot table has {raw.size} bytes, {slots} slots and {leases} leases need {needed}"
            )
        end_of_slots = HEADER_BYTES + slots * SLOT_BYTES
        self.slot_count = slots
        self.lease_count = leases
        self._header: Any = raw[:HEADER_BYTES].view(HEADER)
        slot_view: Any = raw[HEADER_BYTES:end_of_slots].view(SLOT)
        lease_view: Any = raw[end_of_slots:needed].view(LEASE)
        # One strided view a field: indexing a record first would cost a temporary per store.
        self._slot: dict[str, Any] = {name: slot_view[name] for name in SLOT.names or ()}
        self._lease: dict[str, Any] = {name: lease_view[name] for name in LEASE.names or ()}

    def close(self) -> None:
        """Drops every view of the buffer; the table cannot be used afterwards."""
        self._header = None
        self._slot = {}
        self._lease = {}

    # ----------------------------------------------------------------------------------------------
    # Header

    @property
    def epoch(self) -> int:
        """The daemon life that wrote last."""
        return int(self._header["epoch"][0])

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._header["epoch"][0] = value

    @property
    def next_generation(self) -> int:
        """Above every generation that this table ever held."""
        return int(self._header["next_generation"][0])

    @property
    def next_lease(self) -> int:
        """Above every lease id that this table ever held."""
        return int(self._header["next_lease"][0])

    @property
    def holders(self) -> int:
        """Processes that work with leases right now, as the daemon counts them: an advice to
        clients how to share the cores. 0 until the daemon wrote it, and from one that never does.
        """
        return int(self._header["holders"][0])

    @holders.setter
    def holders(self, value: int) -> None:
        self._header["holders"][0] = value

    @property
    def pressed(self) -> bool:
        """Whether somebody may want memory that others keep: a client then gives back the leases
        that it does not compute with. While it is False they may be kept between uses."""
        return bool(self._header["pressed"][0])

    @pressed.setter
    def pressed(self, value: bool) -> None:
        self._header["pressed"][0] = value

    @property
    def attention(self) -> int:
        """How often the clients of this tier were asked to `attend`, modulo 2**32."""
        return int(self._header["attention"][0])

    def call_attention(self) -> None:
        """The clients of this tier should ask `attend`."""
        self._header["attention"][0] = (self.attention + 1) & 0xFFFFFFFF

    # ----------------------------------------------------------------------------------------------
    # Writing (the daemon only)

    def set_slot(
        self,
        slot: int,
        *,
        generation: int,
        arena: int,
        offset: int,
        nbytes: int,
        state: SlotState,
        key: bytes,
    ) -> None:
        """Describes `slot`. Write FILLING before the slot's bytes change, RESIDENT when verified.

        A change of state alone is one store. Any other change passes through FREE, so a reader
        never sees a new generation with an old range.
        """
        if state is SlotState.FREE or generation < 1:
            raise SlotInvalid(
                f"slot {slot}: state {state.name}, generation {generation}: use clear_slot"
            )
        if len(key) != KEY_BYTES:
            raise SlotInvalid(f"slot {slot}: key has {len(key)} bytes, needs {KEY_BYTES}")
        fields = self._slot
        low = int.from_bytes(key[:8], "little")
        high = int.from_bytes(key[8:], "little")
        same = (
            fields["state"][slot] != SlotState.FREE
            and fields["generation"][slot] == generation
            and fields["offset"][slot] == offset
            and fields["nbytes"][slot] == nbytes
            and fields["arena"][slot] == arena
            and fields["key"][slot, 0] == low
            and fields["key"][slot, 1] == high
        )
        if not same:
            if generation >= self.next_generation:
                self._header["next_generation"][0] = generation + 1
            fields["state"][slot] = SlotState.FREE
            fields["generation"][slot] = 0
            fields["offset"][slot] = offset
            fields["nbytes"][slot] = nbytes
            fields["arena"][slot] = arena
            fields["key"][slot, 0] = low
            fields["key"][slot, 1] = high
            fields["generation"][slot] = generation
        fields["state"][slot] = state

    def mark_resident(self, slot: int) -> None:
        """The bytes of a FILLING slot are verified. Raises SlotInvalid for any other."""
        state = int(self._slot["state"][slot])
        if state != SlotState.FILLING:
            raise SlotInvalid(f"slot {slot}: state {state}, only a FILLING one becomes RESIDENT")
        self._slot["state"][slot] = SlotState.RESIDENT

    def clear_slot(self, slot: int) -> None:
        """Frees `slot`. Its leases must be cleared before."""
        self._slot["state"][slot] = SlotState.FREE
        self._slot["generation"][slot] = 0

    def set_lease(
        self, entry: int, *, lease: int, pid: int, start_time: int, slot: int, generation: int
    ) -> None:
        """Records a lease; must be done before the holder is told."""
        if lease < 1:
            raise LeaseInvalid(f"lease entry {entry}: lease {lease}: use clear_lease")
        fields = self._lease
        if lease >= self.next_lease:
            self._header["next_lease"][0] = lease + 1
        fields["lease"][entry] = 0
        fields["start_time"][entry] = start_time
        fields["pid"][entry] = pid
        fields["slot"][entry] = slot
        fields["generation"][entry] = generation
        fields["lease"][entry] = lease

    def clear_lease(self, entry: int) -> None:
        """Forgets a lease; must be done before its slot is freed or filled again."""
        self._lease["lease"][entry] = 0

    # ----------------------------------------------------------------------------------------------
    # Reading

    def generation(self, slot: int) -> int:
        """Returns the slot's generation, 0 while it is free. A client compares before and after."""
        return int(self._slot["generation"][slot])

    def slot(self, slot: int) -> SlotEntry:
        """Returns one entry, FREE ones too. Raises SlotInvalid for an unknown state."""
        fields = self._slot
        state = int(fields["state"][slot])
        if state > SlotState.RESIDENT:
            raise SlotInvalid(f"slot {slot}: state {state}, known are 0 to 2")
        return SlotEntry(
            slot=slot,
            generation=int(fields["generation"][slot]),
            offset=int(fields["offset"][slot]),
            nbytes=int(fields["nbytes"][slot]),
            arena=int(fields["arena"][slot]),
            state=SlotState(state),
            key=fields["key"][slot].tobytes(),
        )

    def slots(self) -> Iterator[SlotEntry]:
        """Yields every slot that is not FREE."""
        for slot in np.flatnonzero(self._slot["state"]).tolist():
            yield self.slot(slot)

    def leases(self) -> Iterator[LeaseEntry]:
        """Yields every lease."""
        fields = self._lease
        for entry in np.flatnonzero(fields["lease"]).tolist():
            yield LeaseEntry(
                entry=entry,
                lease=int(fields["lease"][entry]),
                start_time=int(fields["start_time"][entry]),
                pid=int(fields["pid"][entry]),
                slot=int(fields["slot"][entry]),
                generation=int(fields["generation"][entry]),
            )

    def parse_check(self) -> None:
        """Raises SlotInvalid or LeaseInvalid for the first entry that cannot be true."""
        slots = {entry.slot: entry for entry in self.slots()}
        slot_table_rules.check_slots(slots.values(), self.next_generation)
        slot_table_rules.check_leases(self.leases(), slots, self.next_lease)
