"""A look at a layer that is not entered yet, for what is expanded beforehand; and a hold of all."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.client.conftest import MODEL
from tests.client.fake_opened import FakeOpened, run_pass
from tierd_client import Client
from tierd_client.device_leasing import DeviceLeases
from tierd_client.errors import DaemonGone, LeaseLost, UnsupportedOperation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.client.conftest import FakeDaemon


def leases_of(opened: Any, order: Sequence[int]) -> DeviceLeases:
    return DeviceLeases(opened, order)


def test_a_lease_that_was_asked_for_ahead_is_taken_in_when_its_grant_has_come() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2))
    leases.enter(0)
    with leases.glimpse(1) as lease:
        assert lease is not None
        assert opened.log[-1] == ("resolve", 1)
    assert opened.fences == [1]
    leases.leave(0)
    assert leases.enter(1) is lease, "the one that was looked at"
    counters = leases.counters()
    assert (counters.entries, counters.leases, counters.ahead, counters.kept) == (2, 2, 1, 0)
    assert opened.log.count(("ahead", 1)) == 1
    assert ("acquire", 1) not in opened.log


def test_nobody_waits_for_a_grant_that_has_not_come_and_nobody_asks() -> None:
    opened = FakeOpened(room=1)
    leases = leases_of(opened, (0, 1, 2))
    leases.enter(0)
    for layer in (1, 2):
        with leases.glimpse(layer) as lease:
            assert lease is None
    assert opened.log == [("acquire", 0), ("ahead", 1)]
    assert opened.fences == []
    leases.leave(0)
    leases.enter(1)


def test_the_layer_that_a_thread_is_in_is_there() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1))
    entered = leases.enter(0)
    with leases.glimpse(0) as lease:
        assert lease is entered
    assert leases.current(0) is entered
    leases.leave(0)
    assert opened.log[-1] == ("release", 0)


def test_a_guess_that_was_wrong_goes_back_behind_its_fence() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2, 3))
    leases.enter(0)
    with leases.glimpse(1):
        pass
    leases.leave(0)
    leases.enter(2)
    assert ("release", 1) in opened.log
    assert 1 not in opened.held
    leases.leave(2)


def test_kept_leases_are_looked_at_without_asking() -> None:
    opened = FakeOpened()
    opened.pressed = False
    leases = leases_of(opened, (0, 1))
    run_pass(leases, (0, 1))
    asked = len(opened.log)
    for layer in (0, 1):
        with leases.glimpse(layer) as lease:
            assert lease is not None
    assert len(opened.log) == asked


def test_a_lease_that_was_lost_under_a_look_goes_back() -> None:
    opened = FakeOpened()
    opened.pressed = False
    leases = leases_of(opened, (0, 1))
    run_pass(leases, (0, 1))
    opened.spoilt.add(1)
    with leases.glimpse(1) as lease:
        assert lease is not None
    assert 1 not in opened.held


def test_who_enters_while_a_grant_is_taken_in_gets_that_one() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2))
    leases.enter(0)
    threads: list[threading.Thread] = []

    def enter() -> None:
        leases.enter(1)
        leases.leave(1)

    def meanwhile() -> None:
        opened.on_resolve = None
        threads.append(threading.Thread(target=enter))
        threads[0].start()
        threads[0].join(0.1)
        assert threads[0].is_alive(), "it waits for the turn"

    opened.on_resolve = meanwhile
    with leases.glimpse(1) as lease:
        assert lease is not None
    threads[0].join(20)
    leases.leave(0)
    assert opened.log.count(("resolve", 1)) == 1
    assert ("acquire", 1) not in opened.log


def test_a_lost_daemon_is_raised_and_the_turn_is_free() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2))
    leases.enter(0)

    def gone() -> None:
        raise DaemonGone("tierd is gone")

    opened.on_resolve = gone
    with pytest.raises(DaemonGone), leases.glimpse(1):
        pass
    opened.on_resolve = None
    leases.leave(0)
    leases.enter(1)


def test_closed_leases_are_not_taken_in() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2))
    leases.enter(0)
    leases.close()
    with leases.glimpse(1) as lease:
        assert lease is None


def test_a_daemons_grant_is_seen_without_waiting(daemon: FakeDaemon) -> None:
    daemon.later.add(2)
    with Client(daemon.path) as client:
        opened = client.open(MODEL)
        pending, later = opened.acquire_ahead(1), opened.acquire_ahead(2)
        daemon.wait_until(lambda: pending.granted)
        daemon.may_grant.clear()
        waiting = opened.acquire_ahead(3)
        assert not waiting.granted
        lease = pending.resolve()
        assert not pending.granted, "it was resolved"
        assert not later.granted, "that would ask again"
        daemon.may_grant.set()
        for each in (later.resolve(), waiting.resolve(), lease):
            each.release()


# -------------------------------------------------------------------------------- held for graphs


def test_all_layers_are_held_if_all_are_here_and_their_uses_end_together() -> None:
    opened = FakeOpened()
    opened.pressed = False
    leases = leases_of(opened, (0, 1, 0))
    assert leases.hold() is None
    leases.enter(0)
    leases.leave(0)
    assert leases.hold() is None, "the second one is not here"
    run_pass(leases, (0, 1, 0))
    hold = leases.hold()
    assert hold is not None
    opened.pressed = True
    leases.tend()
    assert sorted(opened.held) == [0, 1]
    opened.fences.clear()
    hold.end()
    assert opened.held == [0], "this thread wants it next"
    assert sorted(opened.fences) == [0, 1]
    hold.end()  # again does nothing
    leases.close()
    assert leases.hold() is None


def test_a_lease_that_changed_is_lost_to_the_hold_and_the_others_go_back() -> None:
    opened = FakeOpened()
    opened.pressed = False
    leases = leases_of(opened, (0, 1))
    run_pass(leases, (0, 1))
    hold = leases.hold()
    assert hold is not None
    hold.check()
    opened.spoilt.add(0)
    opened.raises_lost = True
    with pytest.raises(LeaseLost, match=r"fake/0 changed .* while a graph had it"):
        hold.check()
    opened.pressed = True
    with pytest.raises(LeaseLost):
        hold.end()
    assert opened.held == []  # the one that is wanted next was the lost one


def test_who_captures_sets_no_marks_and_asks_for_nothing() -> None:
    opened = FakeOpened()
    opened.pressed = False
    leases = leases_of(opened, (0, 1, 2))
    run_pass(leases, (0, 1, 2))
    hold = leases.hold()
    assert hold is not None
    opened.fences.clear()
    opened.log.clear()
    with leases.frozen(hold):
        opened.pressed = True
        run_pass(leases, (0, 1, 2))
        with pytest.raises(UnsupportedOperation, match=r"layer three .* was in no pass before"):
            leases.enter(3)
    assert (opened.fences, opened.log) == ([], [])
    run_pass(leases, (0, 1, 2))
    assert opened.fences == [0, 1, 2]
