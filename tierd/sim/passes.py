"""The passes of clients that do the same for ever: when they are alike, and what one costs then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 4  #: passes that are compared with as many before
FIRST_PASSES = 3  #: fill the memory, and are never counted
MOST_PASSES = 60
MOST_STEPS = 40_000  #: layers computed by all clients together
SETTLED = 0.01  #: difference between two windows of a steady state


@dataclass(frozen=True, slots=True)
class Mark:
    """The sums at the end of a pass of one client."""

    at_ns: int
    stall_ns: int
    read_bytes: int
    ssd_busy_ns: int
    copied_bytes: int
    copy_busy_ns: int


class Passes:
    """Of `clients` that compute `steps` layers a pass."""

    def __init__(self, clients: int, steps: int) -> None:
        self._marks: list[list[Mark]] = [[] for _ in range(clients)]
        self._steps = steps

    def ended(self, client: int, mark: Mark) -> None:
        self._marks[client].append(mark)

    @property
    def fewest(self) -> int:
        """That any client ended."""
        return min(len(marks) for marks in self._marks)

    @property
    def over(self) -> bool:
        """Whether there were enough of them."""
        passes = self.fewest
        steps = passes * self._steps * len(self._marks)
        if passes >= MOST_PASSES or (passes > FIRST_PASSES and steps >= MOST_STEPS):
            return True
        return passes >= FIRST_PASSES + 2 * WINDOW and self.settled

    @property
    def settled(self) -> bool:
        """Whether the last passes of every client cost what those before them did."""
        for marks in self._marks:
            if len(marks) <= FIRST_PASSES + 2 * WINDOW - 1:
                return False
            first, middle, last = marks[-1 - 2 * WINDOW], marks[-1 - WINDOW], marks[-1]
            for one, two in (
                (middle.at_ns - first.at_ns, last.at_ns - middle.at_ns),
                (middle.read_bytes - first.read_bytes, last.read_bytes - middle.read_bytes),
            ):
                if abs(one - two) > SETTLED * max(one, two):
                    return False
        return True

    def mean_ns(self, sums: Callable[[Mark], int]) -> int:
        """What a sum grew by in one of the last passes."""
        window = self._window
        grown = sum(sums(last) - sums(first) for first, last in self._ends)
        return grown // (window * len(self._marks))

    def rate(self, sums: Callable[[Mark], int]) -> float:
        """Per nanosecond: the mean over the clients' windows, which are not the same time."""
        rates = [
            (sums(last) - sums(first)) / max(last.at_ns - first.at_ns, 1)
            for first, last in self._ends
        ]
        return sum(rates) / len(rates)

    @property
    def _window(self) -> int:
        return min(WINDOW, self.fewest - 1)

    @property
    def _ends(self) -> list[tuple[Mark, Mark]]:
        """The begin and the end of each client's last passes."""
        window = self._window
        return [(marks[-1 - window], marks[-1]) for marks in self._marks]
