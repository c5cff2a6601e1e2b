"""The memory of one tier as an outsider sees it, kept from actions and completions alone.

It shares no code with the machine's own books: what their `check()` overlooks, this does not. Every
call costs as much as the memory that it changes, however much there is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.sim.errors import BrokenPromise

if TYPE_CHECKING:
    from collections.abc import Container

    from tierd.core.model import Adopted, ArenaAdded, Discard, Evict, Grant, LayerKey, Read
    from tierd.core.stack_model import Copy, DirectRead, GpuArenaAdded, Unload


@dataclass(slots=True)
class Content:
    """What lies in a slot."""

    key: LayerKey | None
    generation: int
    arena: int
    offset: int
    nbytes: int
    filled: bool
    writing: bool = True  #: something fills it at present
    adopted: bool = False  #: its key may turn out to be of no use
    leases: set[int] = field(default_factory=set)
    copies: int = 0  #: to other tiers, under way
    holders: set[int] = field(default_factory=set)

    @property
    def in_use(self) -> bool:
        return bool(self.leases or self.copies or self.holders or self.writing)


class World:
    """Granules with memory behind them, slots with bytes in them, leases on slots."""

    def __init__(self, budget_bytes: int, granule_bytes: int, *, gpu: bool = False) -> None:
        #: a GPU's machine counts memory from when it wants to read; the copy may never come to be
        self._gpu = gpu
        self.granule_bytes = granule_bytes
        self.budget = budget_bytes // granule_bytes
        self.allowed = self.budget  #: above the budget only after that became smaller
        self.slots: dict[int, Content] = {}
        self.leases: dict[int, int] = {}  #: lease -> slot
        self.generations: set[int] = set()
        self.spans: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}  #: holder -> slots
        self._slots_in: dict[tuple[int, int], list[int]] = {}  #: granule -> slots
        self._warm: set[tuple[int, int]] = set()
        self._discarding: set[tuple[int, int]] = set()

    @property
    def warm(self) -> int:
        return len(self._warm)

    def arena_added(self, event: ArenaAdded | GpuArenaAdded) -> None:
        self.spans[event.arena] = event.span_bytes
        self._warm |= self._granules(event.arena, 0, event.warm_bytes)
        self._check_budget()

    def adopted(self, event: Adopted) -> None:
        for slot in event.slots:
            self._warm |= self._granules(slot.arena, slot.offset, slot.nbytes)
            content = Content(
                slot.key, slot.generation, slot.arena, slot.offset, slot.nbytes,
                filled=True, writing=False, adopted=True, holders=set(slot.holders),
            )  # fmt: skip
            self._put(slot.slot, content)
            for holder in slot.holders:
                self._held.setdefault(holder, []).append(slot.slot)
            self.generations.add(slot.generation)
        self.allowed = max(self.budget, self.warm)

    def set_budget(self, budget_bytes: int) -> None:
        self.budget = budget_bytes // self.granule_bytes
        self.allowed = max(self.budget, self.allowed)

    def settled(
        self, coming: int, promised: int, pinned: Container[LayerKey], *, shrinking: bool
    ) -> None:
        """An event is over. Above the budget there is only what is `promised`, or cannot go: slots
        that somebody uses, or that are pinned, and `coming` granules of those being filled."""
        if not shrinking:
            self.allowed = self.budget
            self._check_budget()
        elif self.warm > self.budget and not self._discarding:
            stay = {
                granule
                for slot in self.slots.values()
                if slot.in_use or not slot.filled or slot.key in pinned
                for granule in self._granules(slot.arena, slot.offset, slot.nbytes)
            }
            if self.warm > max(self.budget, promised, len(stay) + coming):
                raise BrokenPromise(
                    f"{self.warm} granules hold memory, the budget is {self.budget}, but only "
                    f"{len(stay)} are in use and {coming} are being filled"
                )

    def holder_gone(self, holder: int) -> None:
        for slot in self._held.pop(holder, ()):
            self.slots[slot].holders.discard(holder)

    def read(self, action: Read | Copy | DirectRead) -> None:
        """The range is overwritten from now on."""
        if action.slot in self.slots:
            raise BrokenPromise(f"{action} into a slot that is not empty")
        if action.generation in self.generations:
            raise BrokenPromise(f"{action} uses generation {action.generation} again")
        if action.offset % 4096 or action.offset + action.nbytes > self.spans[action.arena]:
            raise BrokenPromise(f"{action} is not aligned, or beyond the arena")
        begin, end = action.offset, action.offset + action.nbytes
        granules = self._granules(action.arena, action.offset, action.nbytes)
        for number in self._in(granules):
            other = self.slots[number]
            if other.offset < end and begin < other.offset + other.nbytes:
                raise BrokenPromise(f"{action} overwrites slot {number}: {other}")
        if granules & self._discarding:
            raise BrokenPromise(f"{action} into memory that is being discarded")
        self._warm |= granules
        self._check_budget()
        self.generations.add(action.generation)
        self._put(
            action.slot,
            Content(
                action.key, action.generation, action.arena, begin, action.nbytes, filled=False
            ),
        )

    def read_done(self, slot: int) -> None:
        self.slots[slot].filled = True
        self.slots[slot].writing = False

    def read_failed(self, slot: int) -> None:
        """Nothing writes to it any more."""
        self.slots[slot].writing = False

    def check_source(self, slot: int, key: LayerKey, offset: int) -> None:
        """The slot holds what is copied from it, or is being filled with that."""
        content = self.slots.get(slot)
        if content is None or (content.key, content.offset) != (key, offset):
            raise BrokenPromise(f"layer {key} is copied from slot {slot}, which is {content}")

    def copy_from(self, slot: int, key: LayerKey, offset: int) -> None:
        """Another tier reads the slot until `copied`."""
        content = self.slots.get(slot)
        if content is None or not content.filled or (content.key, content.offset) != (key, offset):
            raise BrokenPromise(f"layer {key} is copied from slot {slot}, which is {content}")
        content.copies += 1

    def copied(self, slot: int) -> None:
        self.slots[slot].copies -= 1

    def evict(self, action: Evict | Unload) -> None:
        content = self.slots.get(action.slot)
        if content is None or content.in_use:
            raise BrokenPromise(f"{action}, but the slot is {content}")
        self._take_out(action.slot, content)
        demoted = content.adopted and action.key is None
        if content.generation != action.generation or (content.key != action.key and not demoted):
            raise BrokenPromise(f"{action} names something else than {content}")

    def discard(self, action: Discard) -> None:
        granules = self._granules(action.arena, action.offset, action.nbytes)
        for number in self._in(granules):
            raise BrokenPromise(f"{action} discards memory of slot {number}")
        if granules & self._discarding or not (self._gpu or granules <= self._warm):
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

    def fence(self, lease: int, holder: int) -> None:
        """The lease ends, but `holder` may read the slot until `holder_gone`."""
        slot = self.leases.pop(lease)
        self.slots[slot].leases.discard(lease)
        if holder not in self.slots[slot].holders:
            self.slots[slot].holders.add(holder)
            self._held.setdefault(holder, []).append(slot)

    def _put(self, slot: int, content: Content) -> None:
        self.slots[slot] = content
        for granule in self._granules(content.arena, content.offset, content.nbytes):
            self._slots_in.setdefault(granule, []).append(slot)

    def _take_out(self, slot: int, content: Content) -> None:
        del self.slots[slot]
        for granule in self._granules(content.arena, content.offset, content.nbytes):
            self._slots_in[granule].remove(slot)
            if not self._slots_in[granule]:
                del self._slots_in[granule]

    def _in(self, granules: set[tuple[int, int]]) -> list[int]:
        """The slots that have some of these granules."""
        return sorted({slot for granule in granules for slot in self._slots_in.get(granule, ())})

    def _granules(self, arena: int, offset: int, nbytes: int) -> set[tuple[int, int]]:
        first, last = offset // self.granule_bytes, -(-(offset + nbytes) // self.granule_bytes)
        return {(arena, granule) for granule in range(first, last)}

    def _check_budget(self) -> None:
        if self.warm > self.allowed:
            raise BrokenPromise(
                f"{self.warm} granules hold memory, the budget is {self.budget}, and was "
                f"{self.allowed}"
            )
