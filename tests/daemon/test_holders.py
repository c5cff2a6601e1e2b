"""How many processes work with leases: who counts, and who does no longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from tierd.holders import QUIET_SECONDS, TICK_SECONDS, Holders

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

ONE, TWO = (11, 100), (12, 100)  # processes


class Loop:
    """A loop whose time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Any:
        entry = (self.now + seconds, callback)
        self.timers.append(entry)
        return type("Handle", (), {"cancel": lambda _: self.timers.remove(entry)})()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while any(at <= end for at, _ in self.timers):
            entry = min(self.timers, key=lambda timer: timer[0])
            self.timers.remove(entry)
            self.now = entry[0]
            entry[1]()
        self.now = end


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def written() -> list[int]:
    return []


@pytest.fixture
def holders(loop: Loop, written: list[int]) -> Holders:
    return Holders(cast("asyncio.AbstractEventLoop", loop), written.append)


def test_a_new_daemon_knows_of_nobody(holders: Holders, written: list[int]) -> None:
    assert written == [0]


def test_processes_count_from_their_first_lease_to_their_last(
    holders: Holders, written: list[int]
) -> None:
    holders.granted(1, ONE)
    holders.granted(2, TWO)
    holders.granted(1, ONE)
    holders.released(1)
    holders.released(2)
    holders.released(1)
    holders.gone(1)
    assert written == [0, 1, 2, 1, 0]


def test_two_clients_of_one_process_are_one_holder(holders: Holders, written: list[int]) -> None:
    holders.granted(1, ONE)
    holders.granted(2, ONE)
    holders.gone(1)
    assert written == [0, 1]
    holders.gone(2)
    assert written == [0, 1, 0]


def test_a_client_that_only_keeps_what_it_asked_for_ahead_counts_until_it_is_silent(
    loop: Loop, holders: Holders, written: list[int]
) -> None:
    holders.granted(1, ONE)
    loop.pass_time(QUIET_SECONDS - TICK_SECONDS)
    assert written == [0, 1]
    loop.pass_time(3 * TICK_SECONDS)
    assert written == [0, 1, 0]
    holders.granted(1, ONE)  # its next prompt
    assert written == [0, 1, 0, 1]


def test_a_client_in_a_long_product_counts_although_it_is_silent(
    loop: Loop, holders: Holders, written: list[int]
) -> None:
    holders.granted(1, ONE)
    holders.granted(1, ONE)
    loop.pass_time(100 * QUIET_SECONDS)
    assert written == [0, 1]
    holders.released(1)
    loop.pass_time(QUIET_SECONDS + 2 * TICK_SECONDS)
    assert written == [0, 1, 0]


def test_a_busy_client_with_one_lease_at_a_time_counts(
    loop: Loop, holders: Holders, written: list[int]
) -> None:
    holders.granted(1, ONE)
    for _ in range(20):
        loop.pass_time(QUIET_SECONDS / 2)
        holders.granted(1, ONE)
        holders.released(1)
    assert written == [0, 1]


def test_a_daemon_whose_clients_are_idle_is_not_woken(loop: Loop, holders: Holders) -> None:
    holders.granted(1, ONE)
    loop.pass_time(2 * QUIET_SECONDS)
    assert not loop.timers
    holders.granted(1, ONE)
    assert loop.timers
    holders.stop()
    assert not loop.timers


def test_whoever_left_silently_is_not_discounted_twice(
    loop: Loop, holders: Holders, written: list[int]
) -> None:
    holders.granted(1, ONE)
    loop.pass_time(2 * QUIET_SECONDS)
    holders.granted(2, TWO)
    holders.gone(1)
    holders.gone(3)  # never held anything
    assert written == [0, 1, 0, 1]
