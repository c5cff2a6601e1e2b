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


class FreeRuns:
    """The free granules of one arena as maximal runs of equal warmth, by address."""

    def __init__(self, span: int) -> None:
        self.span = span
        self.warm_granules = 0
        self._starts: list[int] = []
        self._runs: dict[int, tuple[int, bool]] = {}  #: start -> (end, warm)
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
        """The window of `granules` free granules with the fewest cold ones: (cold, start).

        Among all-warm ones the tightest run wins, then the lowest address (the highest with
        `from_end`): small slots live at the far end, away from the large ones.
        """
        best: tuple[int, int, int, int] | None = None  # cold, slack, order, start
        gap: list[tuple[int, int, bool]] = []

        def weigh(cold: int, slack: int, start: int) -> None:
            nonlocal best
            score = (cold, slack, -start if from_end else start, start)
            if best is None or score < best:
                best = score

        def weigh_gap() -> None:
            first, last = gap[0][0], gap[-1][1]
            if last - first < granules:
                return
            for start, end, warm in gap:
                if warm and end - start >= granules:
                    weigh(0, end - start - granules, end - granules if from_end else start)
            if best is not None and best[0] == 0:
                return
            starts = {last - granules if from_end else first}
            for start, end, warm in gap:
                if warm:
                    starts.add(min(start, last - granules))
                    starts.add(max(end - granules, first))
            for start in sorted(starts):
                cold = sum(
                    min(end, start + granules) - max(begin, start)
                    for begin, end, warm in gap
                    if not warm and begin < start + granules and end > start
                )
                weigh(cold, 0, start)

        for run in self.runs():
            if gap and gap[-1][1] != run[0]:
                weigh_gap()
                gap = []
            gap.append(run)
        if gap:
            weigh_gap()
        return None if best is None else (best[0], best[3])

    def check(self) -> None:
        runs = self.runs()
        for (_, end, warm), (start, _, next_warm) in pairwise(runs):
            if end > start or (end == start and warm == next_warm):
                raise InvariantBroken(f"free runs overlap or were not joined at granule {start}")
        if self.warm_granules != sum(end - start for start, end, warm in runs if warm):
            raise InvariantBroken("the count of warm free granules is wrong")

    def _insert(self, start: int, end: int, warm: bool) -> None:
        insort(self._starts, start)
        self._runs[start] = (end, warm)
        self.warm_granules += (end - start) * warm

    def _remove(self, start: int) -> int:
        end, warm = self._runs.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        self.warm_granules -= (end - start) * warm
        return end
