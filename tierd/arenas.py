"""The arenas, one for each access group: made, kept by systemd, populated, given back.

One thread does all that takes long with memory, in order. So a discard never overtakes a step of
population that it overlaps, and what was discarded is not populated afterwards: what counts against
the budget is never less than what exists.
"""

from __future__ import annotations

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tierd import sdnotify
from tierd.errors import ArenaError
from tierd.io.arena import Arena
from tierd.io.memory_limits import available_bytes
from tierd.recovery import arena_name
from tierd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.access import AccessGroup
    from tierd.gpu.errors import GpuError
    from tierd.gpu.registrar import Registrar
    from tierd.io.pages import Pages

log = logging.getLogger(__name__)

STEP_BYTES = 16 << 20  # a discard waits for one step at most
RESERVE_BYTES = 64 << 20  # population leaves this much of every limit to others
RETRY_SECONDS = 1.0
#: Address space costs no memory; this much of it keeps large ranges findable between small ones.
SPAN_BUDGETS = 8
MIN_SPAN_BYTES = 16 << 30
SPAN_UNIT = 1 << 30


class Arenas:
    """Owns the arenas and the thread that works on their memory."""

    def __init__(
        self,
        budget_bytes: int,
        pages: Pages,
        *,
        mlock: bool,
        populate: bool,
        registrar: Registrar | None = None,
    ) -> None:
        """populate: whether `populate` does anything; otherwise memory comes with its first use.
        registrar: hears of all memory that exists, where there are GPUs."""
        self.pages = pages  #: what all arenas are made of
        self._mlock = mlock
        self._populates = populate
        self._span_bytes = -(-max(budget_bytes * SPAN_BUDGETS, MIN_SPAN_BYTES) // SPAN_UNIT)
        self._span_bytes *= SPAN_UNIT
        self._thread = ThreadPoolExecutor(1, "tierd-memory")
        self._wanted: list[tuple[int, int, int]] = []  # arena, start, end: still to be populated
        self._step: list[tuple[int, int, int]] = []  # what is left of the step that is under way
        self._registrar = registrar
        self._population: asyncio.Task[None] | None = None
        self.by_group: dict[AccessGroup, Arena] = {}
        self.by_id: dict[int, Arena] = {}
        self._waits: str | None = None  #: why population waits, if it does

    def create(self, group: AccessGroup) -> Arena:
        """A new empty arena for the readers `group`. Raises ArenaError."""
        arena_id = max(self.by_id, default=-1) + 1
        arena = Arena.create(
            arena_id, self._span_bytes, f"tierd-arena-{arena_id}.{group}",
            pages=self.pages, mlock=self._mlock,
        )  # fmt: skip
        self.add(group, arena)
        sdnotify.fdstore(arena_name(arena_id, group), arena.fd, environ=os.environ)
        log.info(
            "arena %d for readers %s: %s of address space, %s",
            arena_id, group, format_size(arena.span_bytes), arena.pages_text,
        )  # fmt: skip
        return arena

    def add(self, group: AccessGroup, arena: Arena) -> None:
        self.by_group[group] = arena
        self.by_id[arena.arena_id] = arena
        if self._registrar is not None:
            self._registrar.add_arena(arena.arena_id, arena.address, arena.span_bytes)

    def exists(self, arena: int, offset: int, nbytes: int) -> None:
        """Memory came into being there, by a read or before this daemon."""
        if self._registrar is not None:
            self._registrar.populated(arena, offset, offset + nbytes)

    @property
    def populated_bytes(self) -> int:
        return sum(arena.populated_bytes for arena in self.by_id.values())

    @property
    def locked_bytes(self) -> int:
        return sum(arena.locked_bytes for arena in self.by_id.values())

    @property
    def pages_text(self) -> str:
        return self.pages.text

    def notes(self) -> list[str]:
        """What an operator should know about this memory."""
        notes = [self.pages.warning] if self.pages.warning else []
        notes += [
            f"arena {arena.arena_id} is not locked in memory: {arena.lock_note}"
            for arena in self.by_id.values()
            if arena.lock_note
        ]
        return notes if self._waits is None else [*notes, self._waits]

    def populate(self, arena: int, start: int, end: int) -> None:
        """Make [start, end) exist, in the background."""
        if start < end and self._populates:
            self._wanted.append((arena, start, end))
        if self._wanted and self._population is None:
            self._population = asyncio.get_running_loop().create_task(self._populate())

    def discard(self, arena: int, offset: int, nbytes: int, done: Callable[[], None]) -> None:
        """Give the memory behind a range back; `done` is called on the loop. An error of the
        system is the daemon's end: what it believes about its memory would be wrong."""
        self._wanted = _without(self._wanted, arena, offset, offset + nbytes)
        self._step = _without(self._step, arena, offset, offset + nbytes)
        if self._registrar is None:
            self._discard(arena, offset, nbytes, done)
            return

        def unregistered(failure: GpuError | None) -> None:
            if failure is not None:
                raise failure
            self._discard(arena, offset, nbytes, done)

        self._registrar.discard(arena, offset, offset + nbytes, unregistered)

    def _discard(self, arena: int, offset: int, nbytes: int, done: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._thread, self.by_id[arena].discard, offset, nbytes)

        def finished(outcome: asyncio.Future[None]) -> None:
            outcome.result()
            done()

        work.add_done_callback(finished)

    async def discard_all_but(self, kept: dict[int, list[tuple[int, int]]]) -> None:
        """Give back everything outside the ranges [start, end) that `kept` lists by arena."""
        loop = asyncio.get_running_loop()
        for arena_id, arena in self.by_id.items():
            start = 0
            for begin, end in [*sorted(kept.get(arena_id, [])), (arena.span_bytes, 0)]:
                if start < begin:
                    await loop.run_in_executor(self._thread, arena.discard, start, begin - start)
                start = max(start, end)

    async def _populate(self) -> None:
        loop = asyncio.get_running_loop()
        while self._wanted:
            limit = await loop.run_in_executor(self._thread, available_bytes)
            if limit.nbytes < STEP_BYTES + RESERVE_BYTES:
                if self._waits is None:
                    log.warning("population waits: %d bytes left (%s)", limit.nbytes, limit.text)
                self._waits = f"population waits: {format_size(limit.nbytes)} left ({limit.text})"
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._waits = None
            if not self._wanted:  # discarded meanwhile
                break
            arena, start, end = self._wanted[0]
            step = min(STEP_BYTES, end - start)
            self._wanted[0] = (arena, start + step, end)
            if step == end - start:
                del self._wanted[0]
            self._step = [(arena, start, start + step)]
            try:
                await loop.run_in_executor(
                    self._thread, self.by_id[arena].populate_step, start, step
                )
                for _, begin, finish in self._step:
                    self.exists(arena, begin, finish - begin)
            except ArenaError as error:  # the memory then comes with its first use, or not
                log.warning("population ends: %s", error)
                self._waits = f"population ended early: {error}"
                self._wanted = []
        self._population = None
        log.info(
            "population finished: %s exist, %s locked",
            format_size(self.populated_bytes), format_size(self.locked_bytes),
        )  # fmt: skip

    def abandon(self) -> None:
        """Give up arenas that nobody uses yet: the start has to be made again without them."""
        self._thread.shutdown()
        for group, arena in self.by_group.items():
            sdnotify.fdstore_remove(arena_name(arena.arena_id, group), environ=os.environ)
            arena.close()

    async def close(self) -> None:
        """Stop working on memory and close the arenas. What systemd and clients hold lives on."""
        self._wanted = []
        if self._population is not None:
            self._population.cancel()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._thread.shutdown)
        for arena in self.by_id.values():
            arena.close()


def _without(
    ranges: list[tuple[int, int, int]], arena: int, start: int, end: int
) -> list[tuple[int, int, int]]:
    left: list[tuple[int, int, int]] = []
    for of, begin, finish in ranges:
        if of != arena or finish <= start or end <= begin:
            left.append((of, begin, finish))
            continue
        if begin < start:
            left.append((of, begin, start))
        if end < finish:
            left.append((of, end, finish))
    return left
