"""The budget: which granules hold memory, over all arenas, and how much of it slots occupy.

See `placement` for the four states of a granule and the two inequalities.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from tierd.core.errors import InvariantBroken
from tierd.core.granule import SMALL_ALIGNMENT, SharedGranule
from tierd.core.placement import FreeRuns, Place, Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Claim:
    """A place that was occupied, and what must happen before it can be filled."""

    place: Place
    pieces: tuple[tuple[int, int, bool], ...]  #: its granules as runs of equal warmth
    promised: int  #: granules that become warm with `Memory.warm_up`
    discards: tuple[Range, ...]  #: to be sent to the system now


@dataclass(slots=True)
class ArenaMemory:
    runs: FreeRuns
    shared: dict[int, SharedGranule] = field(default_factory=dict)  #: by granule


class Memory:
    """All arenas under one budget. Counts are granules where the name does not say bytes."""

    def __init__(self, budget: int, granule_bytes: int, small_layer_bytes: int) -> None:
        self.budget = budget
        #: what slots of accepted requests may occupy; above the budget only after it was lowered
        self.ceiling = budget
        self.shrinking = False  #: more is or may be occupied or warm than the budget
        self.granule_bytes = granule_bytes
        self._small_bytes = min(small_layer_bytes, granule_bytes)
        self.occupied = 0  #: granules of slots
        self.warm = 0  #: granules with memory behind them
        self.peak = 0  #: the most that `warm` ever was
        self.promised = 0  #: occupied granules that are not warm yet
        self.discarding = 0  #: warm granules on their way out
        self._arenas: dict[int, ArenaMemory] = {}
        self._discards: dict[Range, None] = {}

    # ---------------------------------------------------------------------------------- questions

    @property
    def free(self) -> int:
        """Granules that slots may still occupy; negative only after the budget became smaller."""
        return self.budget - self.occupied

    @property
    def most_warm(self) -> int:
        """Granules that may hold memory: the budget, or what is still promised, or occupied.

        Above a lowered budget, what is promised stays warm: a client on a GPU that does not let go
        of memory must not hold up another one, who asks for no more than its reserve.
        """
        return max(self.ceiling, self.occupied)

    def charge(self, nbytes: int) -> int:
        """Granules that a slot of `nbytes` keeps from others, wherever it lies."""
        return -(-nbytes // self.granule_bytes)

    def is_small(self, nbytes: int) -> bool:
        return nbytes < self._small_bytes

    def has_arena(self, arena: int) -> bool:
        return arena in self._arenas

    def span(self, arena: int) -> int:
        return self._arenas[arena].runs.span

    def has_run(self, arena: int, granules: int, without: Iterable[Place] = ()) -> bool:
        """Whether `longest_free_run` is at least `granules`; mostly costs O(1)."""
        runs = self._arenas[arena].runs
        if max(runs.longest_run(warm=False), runs.longest_run(warm=True)) >= granules:
            return True
        return self.longest_free_run(arena, without) >= granules

    def longest_free_run(self, arena: int, without: Iterable[Place] = ()) -> int:
        """The most granules, warm or cold, that one slot could get in this arena's addresses.

        `without`: places that would be released before; shared granules among them do not count.
        """
        free = [(start, end) for start, end, _ in self._arenas[arena].runs.runs()]
        free += [
            (place.range.start, place.range.end)
            for place in without
            if place.range.arena == arena and not place.shared
        ]
        longest = first = last = 0
        for start, end in sorted(free):
            if start != last:
                first = start
            last = end
            longest = max(longest, last - first)
        return longest

    def frees(self, place: Place, gone_before: int) -> int:
        """Granules that `release(place)` frees when `gone_before` slots of its granule are gone."""
        if not place.shared:
            return place.range.granules
        shared = self._arenas[place.range.arena].shared[place.range.start]
        return int(shared.slots - gone_before == 1)

    def is_discarding(self, discard: Range) -> bool:
        return discard in self._discards

    # ------------------------------------------------------------------------------------ changes

    def set_budget(self, budget: int) -> None:
        """Another budget from now on. Above a lower one stays what was promised, and what slots
        occupy until they are released (`shed`)."""
        self.ceiling = max(budget, self.ceiling)
        self.budget = budget
        self.shrinking = True

    def add_arena(self, arena: int, span: int, warm: int) -> None:
        runs = FreeRuns(span)
        if warm:
            runs.take(0, warm)
            runs.add(0, warm, True)
        self._arenas[arena] = ArenaMemory(runs)
        self._grow(warm)

    def claim(self, arena: int, nbytes: int, limit: int | None = None) -> Claim | None:
        """Occupies room for `nbytes`; None where slots would occupy more than `limit` granules
        (None: the budget), or the address space has none."""
        memory = self._arenas[arena]
        small = self.is_small(nbytes)
        if small:
            for granule, shared in memory.shared.items():
                begin = shared.hole(nbytes) if shared.warm else None
                if begin is not None:
                    return Claim(self._share(arena, granule, begin, nbytes), (), 0, ())
        granules = self.charge(nbytes)
        if granules > (self.budget if limit is None else limit) - self.occupied:
            return None
        window = memory.runs.best_window(granules, from_end=small)
        if window is None:
            return None
        cold, start = window
        pieces = tuple(memory.runs.take(start, start + granules))
        self.occupied += granules
        promised = 0
        discards: tuple[Range, ...] = ()
        if cold and self.warm + self.promised + cold > self.most_warm:
            promised = cold
            self.promised += cold
            discards = self.shed()
        else:
            self._grow(cold)
        if small:
            memory.shared[start] = SharedGranule(self.granule_bytes, warm=not promised)
            place = self._share(arena, start, 0, nbytes)
        else:
            taken = Range(arena, start, start + granules)
            place = Place(taken, start * self.granule_bytes, nbytes, shared=False)
        return Claim(place, pieces, promised, discards)

    def can_warm_up(self, claim: Claim) -> bool:
        return self.warm + claim.promised <= self.most_warm

    def warm_up(self, claim: Claim) -> None:
        """Keeps the promise: the claim's granules hold memory from now on."""
        self.promised -= claim.promised
        self._grow(claim.promised)
        if claim.place.shared:
            self._arenas[claim.place.range.arena].shared[claim.place.range.start].warm = True

    def abandon(self, claim: Claim) -> None:
        """Gives up a claim whose promise was not kept yet."""
        place = claim.place
        self.promised -= claim.promised
        self.occupied -= place.range.granules
        memory = self._arenas[place.range.arena]
        if place.shared:
            del memory.shared[place.range.start]
        for start, end, warm in claim.pieces:
            memory.runs.add(start, end, warm)

    def release(self, place: Place) -> None:
        """Frees a place that holds memory; it stays warm."""
        memory = self._arenas[place.range.arena]
        if place.shared:
            shared = memory.shared[place.range.start]
            shared.give_back(place.offset - place.range.start * self.granule_bytes, place.nbytes)
            if shared.slots:
                return
            del memory.shared[place.range.start]
        self.occupied -= place.range.granules
        memory.runs.add(place.range.start, place.range.end, True)

    def shed(self) -> tuple[Range, ...]:
        """Sends warm free granules back to the system until what is promised can be kept.

        The shortest runs go first: they are of least use to a later slot. Enough of them exist
        (`placement` has the sum).
        """
        excess = self.warm + self.promised - self.discarding - self.most_warm
        discards: list[Range] = []
        if excess <= 0:
            return ()
        while excess > 0:
            shortest = [
                (run[0], arena, run[1])
                for arena, memory in self._arenas.items()
                if (run := memory.runs.shortest_warm()) is not None
            ]
            if not shortest:
                break
            length, arena, start = min(shortest)
            taken = min(length, excess)
            discard = Range(arena, start + length - taken, start + length)
            self._arenas[arena].runs.take(discard.start, discard.end)
            discards.append(discard)
            self._discards[discard] = None
            self.discarding += taken
            excess -= taken
        return tuple(discards)

    def discarded(self, discard: Range) -> None:
        """The system has the memory of a discarded range."""
        del self._discards[discard]
        self.discarding -= discard.granules
        self.warm -= discard.granules
        self._arenas[discard.arena].runs.add(discard.start, discard.end, False)

    # ------------------------------------------------------------------------------- warm restart

    def clash(self, slots: Sequence[tuple[int, int, int]]) -> str | None:
        """Why slots at (arena, offset, nbytes) cannot all be adopted; None if they can."""
        end_of: dict[int, int] = {}
        shared: dict[tuple[int, int], bool] = {}
        for arena, offset, nbytes in sorted(slots):
            place = self._place_of(arena, offset, nbytes)
            if offset % SMALL_ALIGNMENT or nbytes <= 0 or offset < end_of.get(arena, 0):
                return f"{nbytes} bytes at {offset} of arena {arena} overlap or are not aligned"
            end_of[arena] = offset + nbytes
            if place.range.end > self.span(arena):
                return f"{nbytes} bytes at {offset} lie beyond the span of arena {arena}"
            for granule in range(place.range.start, place.range.end):
                if (arena, granule) in shared and not (shared[arena, granule] and place.shared):
                    return f"two slots need granule {granule} of arena {arena} alone"
                shared[arena, granule] = place.shared
        return None

    def adopt(self, arena: int, offset: int, nbytes: int) -> Place:
        """Occupies the place of a slot of the previous daemon (`clash`), warm from now on."""
        memory = self._arenas[arena]
        place = self._place_of(arena, offset, nbytes)
        granules = place.range
        if not place.shared or granules.start not in memory.shared:
            pieces = memory.runs.take(granules.start, granules.end)
            self._grow(sum(end - start for start, end, warm in pieces if not warm))
            self.occupied += granules.granules
        if place.shared:
            new = SharedGranule(self.granule_bytes, warm=True)
            shared = memory.shared.setdefault(granules.start, new)
            shared.take(offset - granules.start * self.granule_bytes, nbytes)
        return place

    # -------------------------------------------------------------------------------------- check

    def check(self, places: Sequence[Place]) -> None:
        """Compares the books with the `places` of all slots."""
        alone = [place.range for place in places if not place.shared]
        shared = {place.range for place in places if place.shared}
        ranges = sorted((found.arena, found.start, found.end) for found in (*alone, *shared))
        for (arena, _, end), (other, start, _) in pairwise(ranges):
            if arena == other and start < end:
                raise InvariantBroken(f"granule {start} of arena {arena} is in two slots")
        occupied = sum(end - start for _, start, end in ranges)
        if occupied != self.occupied:
            raise InvariantBroken(f"{occupied} granules occupied, booked {self.occupied}")
        free = 0
        total = 0
        for memory in self._arenas.values():
            memory.runs.check()
            free += memory.runs.warm_granules
            total += memory.runs.span - sum(e - s for s, e, _ in memory.runs.runs())
        discarding = sum(discard.granules for discard in self._discards)
        if discarding != self.discarding or total != self.occupied + self.discarding:
            raise InvariantBroken("granules are lost between the free runs, slots and discards")
        if self.promised < 0 or self.warm + self.promised != free + self.occupied + discarding:
            raise InvariantBroken(
                f"{self.warm} warm + {self.promised} promised granules, but {free} free "
                f"+ {self.occupied} occupied + {discarding} discarding"
            )

    # ------------------------------------------------------------------------------------ private

    def _place_of(self, arena: int, offset: int, nbytes: int) -> Place:
        start, end = offset // self.granule_bytes, -(-(offset + nbytes) // self.granule_bytes)
        shared = self.is_small(nbytes) and end - start == 1
        return Place(Range(arena, start, end), offset, nbytes, shared)

    def _grow(self, granules: int) -> None:
        self.warm += granules
        self.peak = max(self.peak, self.warm)

    def _share(self, arena: int, granule: int, begin: int, nbytes: int) -> Place:
        self._arenas[arena].shared[granule].take(begin, nbytes)
        offset = granule * self.granule_bytes + begin
        return Place(Range(arena, granule, granule + 1), offset, nbytes, shared=True)
