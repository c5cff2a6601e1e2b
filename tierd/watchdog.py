"""Pings to systemd's watchdog: while the loop runs and every thread that reads or copies lives.

A device that does not answer is no reason to restart. A thread that waits for it cannot even be
killed, so the restart would hang too, and until then nobody would be served: neither what is
resident nor what other devices hold. So it is reported, and its layers wait.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from tierd import sdnotify

if TYPE_CHECKING:
    import asyncio

    from tierd.io.ssd import ReaderPool
    from tierd.tiers import Tiers

log = logging.getLogger(__name__)


class Watchdog:
    """That `_tick` runs shows that the loop does."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pool: ReaderPool, tiers: Tiers | None = None
    ) -> None:
        self._loop = loop
        self._pool = pool
        self._tiers = tiers
        self._silent: set[str] = set()

    def start(self) -> None:
        """Ping as often as systemd wants; not at all when it does not watch."""
        interval_s = sdnotify.watchdog_interval_s(os.environ)
        if interval_s is not None:
            self._tick(interval_s)

    def _tick(self, interval_s: float) -> None:
        self.look()
        if self._pool.alive() and (self._tiers is None or self._tiers.alive()):
            sdnotify.notify("WATCHDOG=1", environ=os.environ)
        else:
            log.error("a thread ended by itself: no ping to the watchdog")
        self._loop.call_later(interval_s, self._tick, interval_s)

    def look(self) -> None:
        """Log each device once when it falls silent, and once when it is back."""
        silent = {f"device {number}": text for number, text in self._pool.silent().items()}
        if self._tiers is not None:
            silent |= self._tiers.silent()
        for device, text in silent.items():
            if device not in self._silent:
                log.error("%s", text)
        for device in self._silent - silent.keys():
            log.warning("%s answers again", device)
        self._silent = set(silent)
