"""When Python looks for garbage in cycles: not while somebody waits.

By itself it looks after some hundred new objects, now and then at all of them. With the record full
that takes 20 ms, in the middle of answering. Nearly everything here goes with its last reference;
what is left in cycles is little, and may wait for a quiet moment.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

LOOK_SECONDS = 1.0
#: More objects than when it last collected: fewer are not worth it; with more than the second it
#: collects though somebody may wait. The record alone comes to 125,000 while it fills.
FEW, MANY = 1_000, 250_000


class Garbage:
    """Replaces Python's own collections from `start` on, until `stop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, heard: Callable[[], int]) -> None:
        """heard: how much ever happened; a quiet moment is one look after which it is the same."""
        self._loop = loop
        self._heard = heard
        self._before = -1
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        # Modules and indices live as long as the daemon: no collection has to walk them again.
        gc.freeze()
        gc.disable()
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            gc.enable()

    def _wait(self) -> None:
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        heard, before = self._heard(), self._before
        self._before = heard
        more = gc.get_count()[0]  # made since the last collection, less those that are gone
        if more > MANY or (more > FEW and heard == before):
            gc.collect()
        self._wait()
