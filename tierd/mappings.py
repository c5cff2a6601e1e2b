"""Who has which chunk of a GPU's arenas, and which chunks everybody has to unmap.

Memory of a GPU that a client has mapped is not given back when the daemon lets go of it, so a
discard waits here until every client that has one of its chunks said that it unmapped it, or is
gone and fenced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Chunk = tuple[int, int]  # arena, number


@dataclass(frozen=True, slots=True)
class Discarding:
    """Chunks [first, first + count) of an arena go back to the driver."""

    arena: int
    first: int
    count: int
    since_ns: int

    def chunks(self) -> Iterable[Chunk]:
        return ((self.arena, self.first + number) for number in range(self.count))


class Mappings:
    """Of one GPU."""

    def __init__(self) -> None:
        self._holders: dict[Chunk, set[int]] = {}
        self._held: dict[int, set[Chunk]] = {}  # by client
        self._waiting: list[Discarding] = []

    def give(self, client: int, arena: int, chunks: Iterable[int]) -> None:
        """The client is about to get these chunks."""
        held = self._held.setdefault(client, set())
        for number in chunks:
            self._holders.setdefault((arena, number), set()).add(client)
            held.add((arena, number))

    def discard(self, discarding: Discarding) -> bool:
        """Whether the chunks can go at once; else `take` or `gone` returns them when they can."""
        if self._is_mapped(discarding):
            self._waiting.append(discarding)
            return False
        return True

    def take(self, client: int, chunks: Iterable[Chunk]) -> list[Discarding]:
        """The client has these no more; those that it did not have are no matter. Returns the
        discards that need not wait any longer."""
        held = self._held.get(client, set())
        for chunk in chunks:
            if chunk in held:
                held.remove(chunk)
                self._drop(chunk, client)
        return self._ready()

    def gone(self, client: int) -> list[Discarding]:
        """The client has nothing any more. Returns as `take`."""
        for chunk in self._held.pop(client, set()):
            self._drop(chunk, client)
        return self._ready()

    def wanted_of(self, client: int) -> dict[int, list[int]]:
        """By arena: the chunks that this client has to unmap."""
        held = self._held.get(client)
        wanted: dict[int, list[int]] = {}
        if held:
            for discarding in self._waiting:
                for arena, number in discarding.chunks():
                    if (arena, number) in held:
                        wanted.setdefault(arena, []).append(number)
        return wanted

    def late(self, before_ns: int) -> set[int]:
        """The clients that were to unmap something before that time, and have not."""
        return {
            client
            for discarding in self._waiting
            if discarding.since_ns < before_ns
            for chunk in discarding.chunks()
            for client in self._holders.get(chunk, ())
        }

    def _ready(self) -> list[Discarding]:
        ready = [discarding for discarding in self._waiting if not self._is_mapped(discarding)]
        if ready:
            self._waiting = [discarding for discarding in self._waiting if discarding not in ready]
        return ready

    def _is_mapped(self, discarding: Discarding) -> bool:
        return any(chunk in self._holders for chunk in discarding.chunks())

    def _drop(self, chunk: Chunk, client: int) -> None:
        holders = self._holders[chunk]
        holders.remove(client)
        if not holders:
            del self._holders[chunk]
