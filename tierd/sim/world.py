"""Memory as an outsider sees it, kept from actions and completions alone.

It shares no code with the machine's own books: what their `check()` overlooks, this does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.sim.errors import BrokenPromise

if TYPE_CHECKING:
    from tierd.core.model import Adopted, ArenaAdded, Discard, Evict, Grant, LayerKey, Read


@dataclass(slots=True)
class Content:
    """What lies in a slot."""

    key: LayerKey | None
    generation: int
    arena: int
    offset: int
    nbytes: int
    filled: bool
    adopted: bool = False  #: its key may turn out to be of no use
    leases: set[int] = field(default_factory=set)
    holders: set[int] = field(default_factory=set)


class World:
    """Granules with memory behind them, slots with bytes in them, leases on slots."""

    def __init__(self, budget_bytes: int, granule_bytes: int) -> None:
        self.granule_bytes = granule_bytes
        self.budget = budget_bytes // granule_bytes
        self.allowed = self.budget  #: above the budget only while a warm restart shrinks
        self.slots: dict[int, Content] = {}
        self.leases: dict[int, int] = {}  #: lease -> slot
        self.generations: set[int] = set()
        self.spans: dict[int, int] = {}
        self._warm: set[tuple[int, int]] = set()
        self._discarding: set[tuple[int, int]] = set()

    @property
    def warm(self) -> int:
        return len(self._warm)

    def arena_added(self, event: ArenaAdded) -> None:
        self.spans[event.arena] = event.span_bytes
        self._warm |= self._granules(event.arena, 0, event.warm_bytes)
        self._check_budget()

    def adopted(self, event: Adopted) -> None:
        for slot in event.slots:
            self._warm |= self._granules(slot.arena, slot.offset, slot.nbytes)
            self.slots[slot.slot] = Content(
                slot.key,
                slot.generation,
                slot.arena,
                slot.offset,
                slot.nbytes,
                filled=True,
                adopted=True,
                holders=set(slot.holders),
            )
            self.generations.add(slot.generation)
        self.allowed = max(self.budget, self.warm)

    def holder_gone(self, holder: int) -> None:
        for content in self.slots.values():
            content.holders.discard(holder)

    def read(self, action: Read) -> None:
        """The range is overwritten from now on."""
        if action.slot in self.slots:
            raise BrokenPromise(f"{action} into a slot that is not empty")
        if action.generation in self.generations:
            raise BrokenPromise(f"{action} uses generation {action.generation} again")
        if action.offset % 4096 or action.offset + action.nbytes > self.spans[action.arena]:
            raise BrokenPromise(f"{action} is not aligned, or beyond the arena")
        begin, end = action.offset, action.offset + action.nbytes
        for number, other in self.slots.items():
            if (
                other.arena == action.arena
                and other.offset < end
                and begin < other.offset + other.nbytes
            ):
                raise BrokenPromise(f"{action} overwrites slot {number}: {other}")
        granules = self._granules(action.arena, action.offset, action.nbytes)
        if granules & self._discarding:
            raise BrokenPromise(f"{action} into memory that is being discarded")
        self._warm |= granules
        self._check_budget()
        self.generations.add(action.generation)
        self.slots[action.slot] = Content(
            action.key, action.generation, action.arena, begin, action.nbytes, filled=False
        )

    def read_done(self, slot: int) -> None:
        self.slots[slot].filled = True

    def evict(self, action: Evict) -> None:
        content = self.slots.pop(action.slot, None)
        if content is None or content.leases or content.holders:
            raise BrokenPromise(f"{action}, but the slot is {content}")
        demoted = content.adopted and action.key is None
        if content.generation != action.generation or (content.key != action.key and not demoted):
            raise BrokenPromise(f"{action} names something else than {content}")

    def discard(self, action: Discard) -> None:
        granules = self._granules(action.arena, action.offset, action.nbytes)
        for number, content in self.slots.items():
            if granules & self._granules(content.arena, content.offset, content.nbytes):
                raise BrokenPromise(f"{action} discards memory of slot {number}")
        if not granules <= self._warm - self._discarding:
            raise BrokenPromise(f"{action} discards what is cold or on its way already")
        self._discarding |= granules

    def discard_done(self, arena: int, offset: int, nbytes: int) -> None:
        granules = self._granules(arena, offset, nbytes)
        self._warm -= granules
        self._discarding -= granules

    def grant(self, action: Grant) -> None:
        content = self.slots.get(action.slot)
        if (
            content is None
            or not content.filled
            or (content.key, content.generation) != (action.key, action.generation)
            or (content.arena, content.offset, content.nbytes)
            != (action.arena, action.offset, action.nbytes)
        ):
            raise BrokenPromise(f"{action}, but the slot is {content}")
        if action.lease in self.leases:
            raise BrokenPromise(f"{action} hands lease {action.lease} out twice")
        content.leases.add(action.lease)
        self.leases[action.lease] = action.slot

    def release(self, lease: int) -> None:
        self.slots[self.leases.pop(lease)].leases.discard(lease)

    def _granules(self, arena: int, offset: int, nbytes: int) -> set[tuple[int, int]]:
        first, last = offset // self.granule_bytes, -(-(offset + nbytes) // self.granule_bytes)
        return {(arena, granule) for granule in range(first, last)}

    def _check_budget(self) -> None:
        self.allowed = max(self.budget, min(self.allowed, self.warm))
        if self.warm > self.allowed:
            raise BrokenPromise(f"{self.warm} granules hold memory, the budget is {self.budget}")
