"""Where slots lie: address ranges of the arenas, and which of their granules hold memory.

All numbers here are granules, except inside a shared granule. A granule is in one of four states:

    cold        no memory behind it, free
    warm        memory behind it, free
    occupied    part of a slot: warm, or *promised* (waits until discards elsewhere made room)
    discarding  free, its memory goes back to the system, counts as warm until it has

Two inequalities hold after every call (a warm restart into a smaller budget aside):

    occupied <= budget
    warm + promised - discarding <= budget      so what is promised can be kept

A slot of less than a granule shares one with others of its kind; larger ones have theirs alone.
Address space is plentiful (the span of an arena is a multiple of the budget), so a range is sought
that reuses most warm memory; where fragments leave none, cold address space is taken and as many
warm free granules elsewhere are discarded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

from tierd.core.errors import InvariantBroken


@dataclass(frozen=True, slots=True)
class Range:
    """Granules `[start, end)` of an arena."""

    arena: int
    start: int
    end: int

    @property
    def granules(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Place:
    """Where a slot lies."""

    range: Range  #: the granules that it needs
    offset: int  #: bytes
    nbytes: int
    shared: bool  #: it has its granule together with other small slots


#: Where no warm run is long enough: so many of the longest are looked at.
LONGEST_TRIED = 8


class FreeRuns:
    """The free granules of one arena as maximal runs of equal warmth, by address."""

    def __init__(self, span: int) -> None:
        self.span = span
        self.warm_granules = 0
        self._starts: list[int] = []
        self._runs: dict[int, tuple[int, bool]] = {}  #: start -> (end, warm)
        #: by warmth: (granules, start), ascending
        self._by_length: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        if span:
            self._insert(0, span, False)

    def add(self, start: int, end: int, warm: bool) -> None:
        """Frees `[start, end)`; it joins neighbours of the same warmth."""
        at = bisect_left(self._starts, start)
        before = self._starts[at - 1] if at else None
        after = self._starts[at] if at < len(self._starts) else None
        if (before is not None and self._runs[before][0] > start) or (
            after is not None and after < end
        ):
            raise InvariantBroken(f"granules [{start}, {end}) are freed twice")
        if after == end and self._runs[end][1] == warm:
            end = self._remove(end)
        if before is not None and self._runs[before] == (start, warm):
            self._remove(before)
            start = before
        self._insert(start, end, warm)

    def take(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Occupies `[start, end)`, which must be free; returns it as runs of equal warmth."""
        at = bisect_left(self._starts, start + 1) - 1
        taken: list[tuple[int, int, bool]] = []
        position = start
        while position < end:
            first = self._starts[at] if 0 <= at < len(self._starts) else end
            last, warm = self._runs.get(first, (first, False))
            if not first <= position < last:
                raise InvariantBroken(f"granule {position} is taken but not free")
            self._remove(first)
            if first < position:
                self._insert(first, position, warm)
                at += 1
            if last > end:
                self._insert(end, last, warm)
            upto = min(last, end)
            taken.append((position, upto, warm))
            position = upto
        return taken

    def is_free(self, start: int, end: int) -> bool:
        at = bisect_left(self._starts, start + 1) - 1
        position = start
        while position < end:
            if not 0 <= at < len(self._starts) or self._starts[at] > position:
                return False
            run_end = self._runs[self._starts[at]][0]
            if run_end <= position:
                return False
            position = run_end
            at += 1
        return True

    def runs(self) -> list[tuple[int, int, bool]]:
        return [(start, *self._runs[start]) for start in self._starts]

    def best_window(self, granules: int, *, from_end: bool = False) -> tuple[int, int] | None:
        """A window of `granules` free granules with few cold ones: (cold, start); None if no range
        is that long.

        Where a warm run is long enough the tightest wins, then the lowest address (the highest with
        `from_end`): small slots live at the far end, away from the large ones. Else a window around
        one of the longest warm runs, the one with the fewest cold granules, then the lowest. Costs
        O(log runs), or O(runs) where the addresses are so fragmented that none of these will do.
        """
        warm = self._by_length[True]
        at = bisect_left(warm, (granules, -1))
        if at < len(warm):
            length = warm[at][0]
            if from_end:
                at = bisect_left(warm, (length + 1, -1)) - 1
            start = warm[at][1]
            return 0, start + length - granules if from_end else start
        tried = warm[: -LONGEST_TRIED - 1 : -1] + self._by_length[False][-1:]
        found = [
            window
            for length, start in tried
            if (window := self._around(start, start + length, granules, from_end)) is not None
        ]
        if not found:
            found = [
                window
                for start in self._starts
                if (window := self._around(start, self._runs[start][0], granules, from_end))
            ]
        if not found:
            return None
        cold, _, start = min(found)
        return cold, start

    def _around(
        self, start: int, end: int, granules: int, from_end: bool
    ) -> tuple[int, int, int] | None:
        """The best window that the run `[start, end)` touches: (cold, order, start)."""
        near: list[tuple[int, int, bool]] = [(start, *self._runs[start])]
        at = bisect_left(self._starts, start)
        for index in range(at - 1, -1, -1):
            first = self._starts[index]
            last, warm = self._runs[first]
            if last != near[0][0] or last <= end - granules:
                break
            near.insert(0, (first, last, warm))
        for index in range(at + 1, len(self._starts)):
            first = self._starts[index]
            if first != near[-1][1] or first >= start + granules:
                break
            near.append((first, *self._runs[first]))
        lowest, highest = near[0][0], near[-1][1] - granules
        if highest < lowest:
            return None
        starts = {highest if from_end else lowest}
        for first, last, warm in near:
            if warm:
                starts.add(min(max(first, lowest), highest))
                starts.add(max(min(last - granules, highest), lowest))
        return min(
            (self._cold(near, first, first + granules), -first if from_end else first, first)
            for first in starts
        )

    @staticmethod
    def _cold(runs: list[tuple[int, int, bool]], start: int, end: int) -> int:
        return sum(
            min(last, end) - max(first, start)
            for first, last, warm in runs
            if not warm and first < end and last > start
        )

    def longest_run(self, *, warm: bool) -> int:
        """The granules of the longest run of this warmth; 0 without one."""
        runs = self._by_length[warm]
        return runs[-1][0] if runs else 0

    def shortest_warm(self) -> tuple[int, int] | None:
        """The shortest warm run, its granules and its start."""
        runs = self._by_length[True]
        return runs[0] if runs else None

    def check(self) -> None:
        runs = self.runs()
        for (_, end, warm), (start, _, next_warm) in pairwise(runs):
            if end > start or (end == start and warm == next_warm):
                raise InvariantBroken(f"free runs overlap or were not joined at granule {start}")
        for warmth, by_length in self._by_length.items():
            if by_length != sorted((e - s, s) for s, e, warm in runs if warm == warmth):
                raise InvariantBroken("the free runs by length are not those by address")
        if self.warm_granules != sum(end - start for start, end, warm in runs if warm):
            raise InvariantBroken("the count of warm free granules is wrong")

    def _insert(self, start: int, end: int, warm: bool) -> None:
        insort(self._starts, start)
        self._runs[start] = (end, warm)
        insort(self._by_length[warm], (end - start, start))
        self.warm_granules += (end - start) * warm

    def _remove(self, start: int) -> int:
        end, warm = self._runs.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        by_length = self._by_length[warm]
        del by_length[bisect_left(by_length, (end - start, start))]
        self.warm_granules -= (end - start) * warm
        return end
