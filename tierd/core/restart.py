"""A warm restart: slots that the previous daemon left behind, and who still reads them.

Quarantine serves the slots of a dead client of a GPU too: its device may read them for a while.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.residency import Slot, SlotNumbers, SlotState

if TYPE_CHECKING:
    from tierd.core.books import Books
    from tierd.core.emptying import Emptier
    from tierd.core.model import Adopted, AdoptedSlot, HolderGone


class Restart:
    """Adopts slots, keeps quarantine."""

    def __init__(self, books: Books, emptier: Emptier) -> None:
        self._books = books
        self._emptier = emptier

    def adopt_all(self, event: Adopted) -> None:
        if self._books.slots or self._books.clients:
            raise self._books.illegal("slots can be adopted only before anything else happens")
        unknown = next((s for s in event.slots if not self._books.memory.has_arena(s.arena)), None)
        if unknown is not None:
            raise self._books.illegal(
                f"slot {unknown.slot} lies in arena {unknown.arena}: no such arena"
            )
        places = [(s.arena, s.offset, s.nbytes) for s in event.slots]
        clash = self._books.memory.clash(places)
        if clash is not None or len({s.slot for s in event.slots}) < len(event.slots):
            raise self._books.illegal(f"slots cannot be adopted: {clash or 'one is there twice'}")
        limit = self._books.config.slot_limit
        if any(found.slot >= limit for found in event.slots):
            raise self._books.illegal(f"slots cannot be adopted: the limit is {limit} slots")
        for found in event.slots:
            self._adopt(found)
        self._books.numbers = SlotNumbers(self._books.config.slot_limit, tuple(self._books.slots))
        generations = [found.generation + 1 for found in event.slots]
        self._books.next_generation = max([self._books.next_generation, *generations])
        self._books.memory.shrinking = True  # the budget may be smaller than before the restart

    def _adopt(self, found: AdoptedSlot) -> None:
        place = self._books.memory.adopt(found.arena, found.offset, found.nbytes)
        model = None if found.key is None else self._books.models.get(found.key.model)
        key = found.key
        if (
            key is None
            or model is None
            or model.arena != found.arena
            or not 0 <= key.layer < len(model.slots)
            or model.layer_bytes[key.layer] != found.nbytes
            or model.slots[key.layer] is not None
        ):
            key = model = None
        slot = Slot(found.slot, found.generation, key, found.arena, place, SlotState.RESIDENT)
        self._books.slots[slot.id] = slot
        if model is not None:
            model.put(slot)
        for holder in found.holders:
            self.quarantine(slot, holder)
        self._books.policy.resident(slot)
        what = "resident" if key is not None else "not served"
        self._books.tell("adopt", key, "slot {}: {}, held by {} processes", slot.id, what,
            len(slot.holders),
        )  # fmt: skip
        self._emptier.no_longer_used(slot)

    def quarantine(self, slot: Slot, holder: int) -> None:
        """Keeps the slot as it is until `holder_gone`."""
        if holder in slot.holders:
            return
        if not slot.holders:
            self._books.ledger.quarantined += slot.place.range.granules
            self._books.ledger.quarantined_slots += 1
            self._books.wanted.quarantined(slot)
        slot.holders[holder] = None
        self._books.holders.setdefault(holder, []).append(slot)

    def holder_gone(self, event: HolderGone) -> None:
        for slot in self._books.holders.pop(event.holder, ()):
            del slot.holders[event.holder]
            if not slot.holders:
                self._books.ledger.quarantined -= slot.place.range.granules
                self._books.ledger.quarantined_slots -= 1
                self._books.wanted.read_no_more(slot)
                self._books.policy.resident(slot)
                self._emptier.no_longer_used(slot)
