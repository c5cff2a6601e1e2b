"""What happens when: the clock of a simulation, and what is still to come."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Agenda:
    """Things to do, each at its time; those of one time in the order in which they were put."""

    def __init__(self) -> None:
        self.now = 0  #: ns
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0

    def __bool__(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._heap)

    def time(self) -> int:
        """`now`, for whom wants to ask later."""
        return self.now

    def at(self, at_ns: int, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at_ns, self._sequence, act))

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        self.at(self.now + delay_ns, act)

    def step(self) -> None:
        """Does what is next; there must be something."""
        self.now, _, act = heapq.heappop(self._heap)
        act()
