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
from tierd_layouts import slot_words as at
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
    LEASE_BYTES,
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


_FREE, _FILLING, _RESIDENT = map(int, SlotState)


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
        words, halves = table._words, table._halves
        halves[at.VERSION] = VERSION
        halves[at.SLOT_COUNT] = slot_count
        halves[at.LEASE_COUNT] = lease_count
        words[at.EPOCH] = epoch
        words[at.NEXT_GENERATION] = 1
        words[at.NEXT_LEASE] = 1
        words[at.MAGIC] = int.from_bytes(MAGIC, "little")  # last: now it is a table
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
        self._slot: Any = raw[HEADER_BYTES:end_of_slots].view(SLOT)
        self._lease: Any = raw[end_of_slots:needed].view(LEASE)
        # For single numbers: numpy takes up to a hundred times as long for one, with cold caches.
        self._words = raw[:needed].data.cast("Q")
        self._halves = raw[:needed].data.cast("I")
        self._first_lease = end_of_slots

    def close(self) -> None:
        """Drops every view of the buffer; the table cannot be used afterwards."""
        self._slot = self._lease = None
        self._words.release()
        self._halves.release()

    # ----------------------------------------------------------------------------------------------
    # Header

    @property
    def epoch(self) -> int:
        """The daemon life that wrote last."""
        return self._words[at.EPOCH]

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._words[at.EPOCH] = value

    @property
    def next_generation(self) -> int:
        """Above every generation that this table ever held."""
        return self._words[at.NEXT_GENERATION]

    @property
    def next_lease(self) -> int:
        """Above every lease id that this table ever held."""
        return self._words[at.NEXT_LEASE]

    @property
    def holders(self) -> int:
        """Processes that work with leases right now, as the daemon counts them: an advice to
        clients how to share the cores. 0 until the daemon wrote it, and from one that never does.
        """
        return self._halves[at.HOLDERS]

    @holders.setter
    def holders(self, value: int) -> None:
        self._halves[at.HOLDERS] = value

    @property
    def pressed(self) -> bool:
        """Whether somebody may want memory that others keep: a client then gives back the leases
        that it does not compute with. While it is False they may be kept between uses."""
        return bool(self._halves[at.PRESSED])

    @pressed.setter
    def pressed(self, value: bool) -> None:
        self._halves[at.PRESSED] = value

    @property
    def attention(self) -> int:
        """How often the clients of this tier were asked to `attend`, modulo 2**32."""
        return self._halves[at.ATTENTION]

    def call_attention(self) -> None:
        """The clients of this tier should ask `attend`."""
        self._halves[at.ATTENTION] = (self.attention + 1) & 0xFFFFFFFF

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
        words, halves = self._words, self._halves
        word, half = self._slot_at(slot)
        low = int.from_bytes(key[:8], "little")
        high = int.from_bytes(key[8:], "little")
        same = (
            halves[half + at.STATE] != _FREE
            and words[word + at.GENERATION] == generation
            and words[word + at.OFFSET] == offset
            and words[word + at.NBYTES] == nbytes
            and halves[half + at.ARENA] == arena
            and words[word + at.KEY] == low
            and words[word + at.KEY + 1] == high
        )
        if not same:
            if generation >= words[at.NEXT_GENERATION]:
                words[at.NEXT_GENERATION] = generation + 1
            halves[half + at.STATE] = _FREE
            words[word + at.GENERATION] = 0
            words[word + at.OFFSET] = offset
            words[word + at.NBYTES] = nbytes
            halves[half + at.ARENA] = arena
            words[word + at.KEY] = low
            words[word + at.KEY + 1] = high
            words[word + at.GENERATION] = generation
        halves[half + at.STATE] = state

    def mark_resident(self, slot: int) -> None:
        """The bytes of a FILLING slot are verified. Raises SlotInvalid for any other."""
        place = self._slot_at(slot)[1] + at.STATE
        state = self._halves[place]
        if state != _FILLING:
            raise SlotInvalid(f"slot {slot}: state {state}, only a FILLING one becomes RESIDENT")
        self._halves[place] = _RESIDENT

    def clear_slot(self, slot: int) -> None:
        """Frees `slot`. Its leases must be cleared before."""
        word, half = self._slot_at(slot)
        self._halves[half + at.STATE] = _FREE
        self._words[word + at.GENERATION] = 0

    def set_lease(
        self, entry: int, *, lease: int, pid: int, start_time: int, slot: int, generation: int
    ) -> None:
        """Records a lease; must be done before the holder is told."""
        if lease < 1:
            raise LeaseInvalid(f"lease entry {entry}: lease {lease}: use clear_lease")
        words, halves = self._words, self._halves
        word, half = self._lease_at(entry)
        if lease >= words[at.NEXT_LEASE]:
            words[at.NEXT_LEASE] = lease + 1
        words[word + at.LEASE] = 0
        words[word + at.START_TIME] = start_time
        halves[half + at.PID] = pid
        halves[half + at.LEASE_SLOT] = slot
        words[word + at.LEASE_GENERATION] = generation
        words[word + at.LEASE] = lease

    def clear_lease(self, entry: int) -> None:
        """Forgets a lease; must be done before its slot is freed or filled again."""
        self._words[self._lease_at(entry)[0] + at.LEASE] = 0

    def _slot_at(self, slot: int) -> tuple[int, int]:
        """Where its words begin, and its halves."""
        if not 0 <= slot < self.slot_count:
            raise SlotInvalid(f"slot {slot}: the table has {self.slot_count}")
        begin = HEADER_BYTES + slot * SLOT_BYTES
        return begin // 8, begin // 4

    def _lease_at(self, entry: int) -> tuple[int, int]:
        if not 0 <= entry < self.lease_count:
            raise LeaseInvalid(f"lease entry {entry}: the table has {self.lease_count}")
        begin = self._first_lease + entry * LEASE_BYTES
        return begin // 8, begin // 4

    # ----------------------------------------------------------------------------------------------
    # Reading

    def generation(self, slot: int) -> int:
        """Returns the slot's generation, 0 while it is free. A client compares before and after."""
        return self._words[self._slot_at(slot)[0] + at.GENERATION]

    def slot(self, slot: int) -> SlotEntry:
        """Returns one entry, FREE ones too. Raises SlotInvalid for an unknown state."""
        words, halves = self._words, self._halves
        word, half = self._slot_at(slot)
        state = halves[half + at.STATE]
        if state > _RESIDENT:
            raise SlotInvalid(f"slot {slot}: state {state}, known are 0 to 2")
        key = words[word + at.KEY], words[word + at.KEY + 1]
        return SlotEntry(
            slot=slot,
            generation=words[word + at.GENERATION],
            offset=words[word + at.OFFSET],
            nbytes=words[word + at.NBYTES],
            arena=halves[half + at.ARENA],
            state=SlotState(state),
            key=b"".join(number.to_bytes(8, "little") for number in key),
        )

    def slots(self) -> Iterator[SlotEntry]:
        """Yields every slot that is not FREE."""
        for slot in np.flatnonzero(self._slot["state"]).tolist():
            yield self.slot(slot)

    def leases(self) -> Iterator[LeaseEntry]:
        """Yields every lease."""
        words, halves = self._words, self._halves
        for entry in np.flatnonzero(self._lease["lease"]).tolist():
            word, half = self._lease_at(entry)
            yield LeaseEntry(
                entry=entry,
                lease=words[word + at.LEASE],
                start_time=words[word + at.START_TIME],
                pid=halves[half + at.PID],
                slot=halves[half + at.LEASE_SLOT],
                generation=words[word + at.LEASE_GENERATION],
            )

    def parse_check(self) -> None:
        """Raises SlotInvalid or LeaseInvalid for the first entry that cannot be true."""
        slots = {entry.slot: entry for entry in self.slots()}
        slot_table_rules.check_slots(slots.values(), self.next_generation)
        slot_table_rules.check_leases(self.leases(), slots, self.next_lease)
