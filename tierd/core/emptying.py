"""Emptying slots: evicted, given up, or gone with their model; giving memory back to the system."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import Discard, Evict
from tierd.core.plans import NEVER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.core.books import Books
    from tierd.core.model import LayerKey
    from tierd.core.placement import Range
    from tierd.core.policy import Victim
    from tierd.core.residency import Slot
    from tierd.core.served import ModelState


class Emptier:
    """Evicts, discards; whom it hits is said by `policy`, or by who calls."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def shrink(self) -> None:
        """After the budget became smaller: what nobody holds goes, as far as it is above it."""
        memory = self._books.memory
        memory.ceiling = max(memory.budget, min(memory.ceiling, self._books.ledger.promised))
        while memory.occupied > memory.budget:
            victims = self._books.policy.victims(1, None, self._books.now)
            if victims is None:
                break
            for victim in victims:
                self.evict(victim.slot, "the budget became smaller")
        self.discard(memory.shed())
        memory.shrinking = (
            max(memory.ceiling, memory.occupied, memory.warm + memory.promised) > memory.budget
        )

    def evict_all(self, victims: list[Victim], wanted: LayerKey) -> None:
        """They give way to a layer."""
        for victim in victims:
            due = "no plan uses it" if victim.due == NEVER else "its next use is further away"
            self.evict(victim.slot, "for {}: {}", wanted, due)

    def ended(self, slot: Slot, *, arrived: bool) -> None:
        """The slot's read is over, or was given up; whether its layer `arrived`."""
        del self._books.in_flight[slot.id]
        self._books.bills.pop(slot.id).settle(self._books.now, arrived=arrived)

    def discard(self, discards: Iterable[Range]) -> None:
        """The system is to have the memory of these ranges."""
        granule = self._books.config.granule_bytes
        for discard in discards:
            self._books.count["discards"] += 1
            offset, nbytes = discard.start * granule, discard.granules * granule
            self._books.actions.append(Discard(discard.arena, offset, nbytes))
            self._books.tell("discard", None, "{} bytes at {} of arena {}", nbytes, offset,
                discard.arena,
            )  # fmt: skip

    def no_longer_used(self, slot: Slot) -> None:
        """A lease or holder is gone: drop what is served no more."""
        if not slot.evictable:
            return
        if slot.key is None:
            self.evict(slot, "nothing that is served")
        elif (model := self._books.models[slot.key.model]).removed:
            self.evict(slot, "model '{}' was removed", model.name)
            self.forget_if_empty(model)

    def evict(self, slot: Slot, reason: str, *values: object) -> None:
        """Empties a slot that nobody reads; its memory stays warm."""
        self._books.memory.release(slot.place)
        self._forget(slot)
        self._books.count["evictions"] += 1
        self._books.actions.append(Evict(slot.id, slot.generation, slot.key))
        self._books.tell("evict", slot.key, reason, *values)

    def abandon(self, slot: Slot) -> None:
        """Gives up a slot that still waits for its memory: no read was started."""
        assert slot.claim is not None
        self._books.memory.abandon(slot.claim)
        self.ended(slot, arrived=False)
        self._forget(slot)

    def _forget(self, slot: Slot) -> None:
        del self._books.slots[slot.id]
        self._books.numbers.give_back(slot.id)
        self._books.policy.evicted(slot)

    def forget_if_empty(self, model: ModelState) -> None:
        """Nothing is left of a model that was removed, as soon as none of its slots is."""
        if model.removed and model.missing == len(model.slots):
            del self._books.models[model.id]
            del self._books.leaving[model.id]
