"""Pings to systemd's watchdog: only while the loop runs and the readers move bytes."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from tierd import sdnotify
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    import asyncio

    from tierd.engine import Engine
    from tierd.io.ssd import ReaderPool

log = logging.getLogger(__name__)

STUCK_SECONDS = 60.0  # a device that answers nothing for so long needs a restart, and an operator


class Watchdog:
    """That `_tick` runs shows that the loop does. The readers must have moved something lately,
    unless they have nothing to do."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, engine: Engine, pool: ReaderPool, readers: int
    ) -> None:
        self._loop = loop
        self._engine = engine
        self._pool = pool
        self._readers = readers
        self._moved: tuple[int, int, int] = (0, 0, 0)
        self._moved_at = loop.time()

    def start(self) -> None:
        """Ping as often as systemd wants; not at all when it does not watch."""
        interval_s = sdnotify.watchdog_interval_s(os.environ)
        if interval_s is not None:
            self._tick(interval_s)

    def _tick(self, interval_s: float) -> None:
        stuck_s = self.stuck_seconds()
        if stuck_s is None:
            sdnotify.notify("WATCHDOG=1", environ=os.environ)
        else:
            log.error("the readers moved no byte for %.0f s: no ping to the watchdog", stuck_s)
        self._loop.call_later(interval_s, self._tick, interval_s)

    def stuck_seconds(self) -> float | None:
        """For how long the readers moved nothing that they should have; None when all is well."""
        readers = self._pool.statistics()
        moved = (readers.read_bytes, readers.reads, readers.failed)
        if moved != self._moved or not self._engine.reads:
            self._moved, self._moved_at = moved, self._loop.time()
        limit_s = STUCK_SECONDS
        if readers.bandwidth_limit is not None:  # a block may take long because it should
            limit_s += self._readers * BLOCK_BYTES / readers.bandwidth_limit
        stuck_s = self._loop.time() - self._moved_at
        return stuck_s if stuck_s > limit_s else None
