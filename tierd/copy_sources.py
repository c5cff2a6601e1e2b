"""The DRAM that copies read while it is being filled: who gives memory back waits for them.

The core keeps the source of a copy as long as somebody wants it. That of a copy which is being
stopped, or whose read failed, is free for others at once: what they write there harms nobody, since
the copy's slot never becomes resident. But memory that goes back to the system must not be read any
more, least of all by a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, eq=False)
class Range:
    """Bytes [start, end) of an arena."""

    arena: int
    start: int
    end: int

    def meets(self, other: Range) -> bool:
        return self.arena == other.arena and self.start < other.end and other.start < self.end


class CopySources:
    """Belongs to the loop's thread."""

    def __init__(self) -> None:
        self._read: set[Range] = set()
        self._waiting: list[tuple[Range, Callable[[], None]]] = []

    def begin(self, arena: int, offset: int, nbytes: int) -> Range:
        """A copy follows the read of this slot. Undone by `end`."""
        source = Range(arena, offset, offset + nbytes)
        self._read.add(source)
        return source

    def end(self, source: Range) -> None:
        """Nothing of the copy is under way any more."""
        self._read.remove(source)
        waiting, self._waiting = self._waiting, []
        for memory, then in waiting:
            self._when_free(memory, then)

    def when_free(self, arena: int, offset: int, nbytes: int, then: Callable[[], None]) -> None:
        """Call `then` when no copy reads any of it: at once, or after an `end`."""
        self._when_free(Range(arena, offset, offset + nbytes), then)

    def _when_free(self, memory: Range, then: Callable[[], None]) -> None:
        if any(memory.meets(source) for source in self._read):
            self._waiting.append((memory, then))
        else:
            then()
