"""Where the clients of one model are on their cycle, and who should wait for whom: a pure search.

The cycle is cut in one place. The group behind the cut is the *runner*: it goes on and picks up the
others, who wait where they are. Each place to cut costs other waits; the reads that are saved are
about the same. A wait is worth it where these reads, over as many passes as the clients will stay
together, take the device longer than the wait takes all who wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NEAR = 2  #: steps between clients that are in phase, if nothing between them is missing
PAYBACK = 8  #: passes at most over which saved reads count
APART = 8  #: clients that are this part of a pass apart are out of phase
CUTS = 8  #: places to cut the cycle that are weighed: the widest gaps


@dataclass(frozen=True, slots=True)
class Rider:
    """A client on its cycle."""

    client: int
    position: int  #: index into the order of the layer that it asked for last
    step_ns: int  #: from one layer to the next
    compute_ns: int  #: of it, without waiting
    rested: bool = True  #: it may be held


@dataclass(frozen=True, slots=True)
class Group:
    """Riders in phase."""

    riders: tuple[Rider, ...]  #: the last one is in front
    reads: int  #: in a pass, that closing the gap behind the group saves

    @property
    def front(self) -> Rider:
        return self.riders[-1]


@dataclass(frozen=True, slots=True)
class Wait:
    """A group that waits for the runner."""

    clients: tuple[int, ...]
    wait_ns: int  #: of each of them, about
    reads: int  #: that are saved in a pass
    gain_ns: int  #: of the device's time, less what all of them wait


@dataclass(frozen=True, slots=True)
class Gathering:
    """Who runs, and who waits for it: the nearest first."""

    runner: int
    waits: tuple[Wait, ...]


class Cycle:
    """`missing`: of each layer in order, whether it is not in memory; `read_ns`: of one of them."""

    def __init__(self, missing: Sequence[bool], read_ns: int) -> None:
        self._length = len(missing)
        self._missing = sum(missing)
        self._read_ns = read_ns
        self._before = [0, *accumulate([*missing, *missing])]  # missing before each index

    def gather(self, riders: Sequence[Rider], longest_ns: int) -> Gathering | None:
        """What brings most riders into phase for the least waiting, none above `longest_ns`; None
        if nothing is worth it. Takes O(riders x log riders + layers)."""
        groups = self.groups(sorted(riders, key=lambda rider: (rider.position, rider.client)))
        best: Gathering | None = None
        best_ns = 0
        for start in self._cuts(groups):
            waits = tuple(self._waits([*groups[start:], *groups[:start]], longest_ns))
            gain_ns = sum(wait.gain_ns for wait in waits)
            if gain_ns > best_ns:
                best_ns, best = gain_ns, Gathering(groups[start].front.client, waits)
        return best

    def groups(self, riders: Sequence[Rider]) -> list[Group]:
        """Riders by position, together with those whom they are in phase with."""
        found: list[list[Rider]] = []
        for rider in riders:
            if found and self._in_phase(found[-1][-1], rider):
                found[-1].append(rider)
            else:
                found.append([rider])
        if len(found) > 1 and self._in_phase(found[-1][-1], found[0][0]):
            found[0] = found.pop() + found[0]
        groups = []
        for index, group in enumerate(found):
            steps, gaps = self._between(found[index - 1][-1], group[-1])
            # Where the one behind finds gaps, it reads all that is missing for itself. Where not,
            # the layers between the two stay in memory for it, and others have to be read again.
            groups.append(Group(tuple(group), self._missing if gaps else steps))
        return groups

    def _between(self, behind: Rider, front: Rider) -> tuple[int, int]:
        """Steps from one to the other, and layers missing in between."""
        steps = (front.position - behind.position) % self._length
        begin = behind.position + 1
        return steps, self._before[max(begin, behind.position + steps)] - self._before[begin]

    def _in_phase(self, behind: Rider, front: Rider) -> bool:
        steps, gaps = self._between(behind, front)
        return steps <= NEAR and not gaps

    def _cuts(self, groups: Sequence[Group]) -> list[int]:
        """The groups that could run: those with the widest gaps behind them."""
        if len(groups) < 2:
            return []

        def narrow(index: int) -> tuple[int, int]:
            return -self._between(groups[index - 1].front, groups[index].front)[0], index

        return sorted(range(len(groups)), key=narrow)[:CUTS]

    def _waits(self, groups: Sequence[Group], longest_ns: int) -> Iterator[Wait]:
        """What the others wait if the first group runs; who is too far ahead does not."""
        runner = groups[0].front
        for group in groups[1:]:
            steps, _ = self._between(runner, group.front)
            wait_ns = steps * max(runner.step_ns, group.front.step_ns)
            if wait_ns > longest_ns:
                return
            clients = tuple(rider.client for rider in group.riders if rider.rested)
            if clients:
                saved_ns = group.reads * self._read_ns * self._together(runner, group.front)
                gain_ns = saved_ns // self._length - wait_ns * len(clients)
                yield Wait(clients, wait_ns, group.reads, gain_ns)

    def _together(self, one: Rider, other: Rider) -> int:
        """Steps for which two riders stay in phase: both wait for the device, or the faster one
        leaves the other behind."""
        device_ns = self._missing * self._read_ns // self._length
        fast_ns, slow_ns = sorted(max(rider.compute_ns, device_ns) for rider in (one, other))
        longest = PAYBACK * self._length
        if slow_ns == fast_ns:
            return longest
        return min(longest, self._length * slow_ns // (APART * (slow_ns - fast_ns)))
