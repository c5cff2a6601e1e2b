"""The watchdog is pinged while readers move bytes or have nothing to do, and only then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tierd.watchdog import STUCK_SECONDS, Watchdog

if TYPE_CHECKING:
    import asyncio


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


def watchdog(clock: Clock, engine: Any, readers: Any) -> Watchdog:
    loop = cast("asyncio.AbstractEventLoop", clock)
    pool = cast("Any", SimpleNamespace(statistics=lambda: readers))
    return Watchdog(loop, engine, pool, readers=4)


@pytest.fixture
def readers() -> SimpleNamespace:
    return SimpleNamespace(read_bytes=0, reads=0, failed=0, bandwidth_limit=None)


def test_readers_without_work_are_well(readers: SimpleNamespace) -> None:
    clock, engine = Clock(), SimpleNamespace(reads=0)
    dog = watchdog(clock, engine, readers)
    clock.now += 10 * STUCK_SECONDS
    assert dog.stuck_seconds() is None


def test_readers_that_move_nothing_for_long_are_stuck(readers: SimpleNamespace) -> None:
    clock, engine = Clock(), SimpleNamespace(reads=1)
    dog = watchdog(clock, engine, readers)
    for _ in range(10):
        clock.now += STUCK_SECONDS - 1
        readers.read_bytes += 1
        assert dog.stuck_seconds() is None
    clock.now += STUCK_SECONDS + 1
    assert dog.stuck_seconds() == STUCK_SECONDS + 1
    readers.failed += 1
    assert dog.stuck_seconds() is None


def test_readers_that_are_throttled_have_more_time(readers: SimpleNamespace) -> None:
    clock, engine = Clock(), SimpleNamespace(reads=1)
    readers.bandwidth_limit = 1 << 20  # 4 MiB blocks of four readers: 16 s
    dog = watchdog(clock, engine, readers)
    clock.now += STUCK_SECONDS + 15
    assert dog.stuck_seconds() is None
    clock.now += 2
    assert dog.stuck_seconds() is not None
