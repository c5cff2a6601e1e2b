"""Python looks for garbage in cycles when nothing happens, or when there is much."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, cast

import pytest

from tierd.garbage import FEW, LOOK_SECONDS, MANY, Garbage

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator


class Timer:
    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def cancel(self) -> None:
        self._loop.next = None


class Loop:
    """Keeps what is to be called next."""

    next: Callable[[], None] | None = None

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        assert seconds == LOOK_SECONDS
        self.next = call
        return Timer(self)

    def look(self) -> None:
        call, self.next = self.next, None
        assert call is not None
        call()


class Daemon:
    """What happens, as the test says, and how often it was looked for garbage."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard = self.collected = self.more = 0
        monkeypatch.setattr(gc, "get_count", lambda: (self.more, 0, 0))
        monkeypatch.setattr(gc, "collect", self._collect)
        monkeypatch.setattr(gc, "freeze", lambda: None)
        self.loop = Loop()
        self.garbage = Garbage(cast("asyncio.AbstractEventLoop", self.loop), lambda: self.heard)

    def _collect(self) -> None:
        self.collected += 1
        self.more = 0

    def look(self) -> int:
        self.loop.look()
        return self.collected


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    made = Daemon(monkeypatch)
    made.garbage.start()
    yield made
    made.garbage.stop()


def test_python_does_not_collect_by_itself_from_the_start_to_the_stop(daemon: Daemon) -> None:
    assert not gc.isenabled()
    daemon.garbage.stop()
    assert gc.isenabled()
    assert daemon.loop.next is None


def test_nothing_is_collected_while_events_come(daemon: Daemon) -> None:
    daemon.more = MANY
    for _ in range(3):
        daemon.heard += 1
        assert daemon.look() == 0


def test_what_was_left_is_collected_once_in_a_quiet_moment(daemon: Daemon) -> None:
    daemon.more, daemon.heard = FEW + 1, 7
    assert [daemon.look(), daemon.look(), daemon.look()] == [0, 1, 1]


def test_a_little_is_left_where_it_is(daemon: Daemon) -> None:
    daemon.more = FEW
    assert [daemon.look(), daemon.look()] == [0, 0]


def test_much_is_collected_though_events_come(daemon: Daemon) -> None:
    daemon.more, daemon.heard = MANY + 1, 7
    assert daemon.look() == 1


def test_objects_that_go_are_not_counted() -> None:
    """What the limits are compared with: else a busy daemon would collect for nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        gc.collect()
        for _ in range(4):
            kept: list[object] = [[] for _ in range(FEW)]
            del kept
        assert gc.get_count()[0] < FEW
    finally:
        if was_enabled:
            gc.enable()
