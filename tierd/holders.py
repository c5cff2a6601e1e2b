"""How many processes work with leases: the slot table's `holders`, by which clients share cores.

A client that computes holds the layer that it is in, and mostly the one that it asked for ahead. A
model that waits for its next prompt still holds the one that it asked for ahead, for hours maybe,
and needs no processor. So a client with a single lease counts only while it is heard of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

#: A client with one lease counts for so long after the daemon granted it or took back another.
QUIET_SECONDS = 2.0
TICK_SECONDS = 0.5

Process = tuple[int, int]  # pid, start time


@dataclass(slots=True)
class _Client:
    process: Process
    leases: int = 0
    heard: float = 0.0  # of the loop's clock
    counted: bool = False


class Holders:
    """Counts processes, not clients: one that serves itself two models computes with one pool of
    threads. `write` is called with each new number, before the client hears of its grant."""

    def __init__(self, loop: asyncio.AbstractEventLoop, write: Callable[[int], None]) -> None:
        self._loop = loop
        self._write = write
        self._clients: dict[int, _Client] = {}
        self._counted: dict[Process, int] = {}  # process -> clients of it that count
        self._tick: asyncio.TimerHandle | None = None
        write(0)

    def granted(self, client: int, process: Process) -> None:
        """`client` of `process` gets a lease."""
        holder = self._clients.get(client)
        if holder is None:
            holder = self._clients[client] = _Client(process)
        holder.leases += 1
        holder.heard = self._loop.time()
        if not holder.counted:
            self._count(holder)

    def released(self, client: int) -> None:
        """A lease of `client` ended."""
        holder = self._clients[client]
        holder.leases -= 1
        holder.heard = self._loop.time()
        if not holder.leases:
            self.gone(client)

    def gone(self, client: int) -> None:
        """`client` holds nothing any more, if it ever did."""
        holder = self._clients.pop(client, None)
        if holder is not None and holder.counted:
            self._discount(holder)

    def stop(self) -> None:
        """Count no more; the number stays as it is."""
        if self._tick is not None:
            self._tick.cancel()

    def _count(self, holder: _Client) -> None:
        holder.counted = True
        others = self._counted.get(holder.process, 0)
        self._counted[holder.process] = others + 1
        if not others:
            self._write(len(self._counted))
        if self._tick is None:
            self._tick = self._loop.call_later(TICK_SECONDS, self._look)

    def _discount(self, holder: _Client) -> None:
        holder.counted = False
        self._counted[holder.process] -= 1
        if not self._counted[holder.process]:
            del self._counted[holder.process]
            self._write(len(self._counted))

    def _look(self) -> None:
        """Discount who fell silent. Looks again only while somebody counts."""
        self._tick = None
        since = self._loop.time() - QUIET_SECONDS
        for holder in self._clients.values():
            if holder.counted and holder.leases == 1 and holder.heard < since:
                self._discount(holder)
        if self._counted:
            self._tick = self._loop.call_later(TICK_SECONDS, self._look)
