from __future__ import annotations

import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.client.fake_opened import FakeOpened, run_pass
from tierd_client import leasing
from tierd_client.errors import (
    ClientClosed,
    DaemonGone,
    ForkedClient,
    LayerNotFound,
    LeaseLimit,
)
from tierd_client.leasing import LayerLeases

if TYPE_CHECKING:
    from collections.abc import Sequence


def leases_of(opened: Any, order: Sequence[int]) -> LayerLeases:
    return LayerLeases(opened, order)


def test_the_next_layer_of_the_plan_is_asked_for_while_one_is_held() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2))
    assert opened.plans == [(0, 1, 2)]
    leases.enter(0)
    assert opened.log == [("acquire", 0), ("ahead", 1)]
    leases.leave(0)
    leases.enter(1)
    assert opened.log[2:] == [("release", 0), ("resolve", 1), ("ahead", 2)]
    assert leases.counters().ahead == 1


def test_the_plan_is_a_circle() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1))
    run_pass(leases, (0, 1))
    assert opened.log[-2:] == [("ahead", 0), ("release", 1)]
    run_pass(leases, (0, 1))
    assert ("acquire", 0) not in opened.log[1:]


def test_a_layer_that_follows_itself_keeps_its_lease() -> None:
    # A head tied to the embedding: the last layer of a pass is the first of the next one.
    opened = FakeOpened()
    leases = leases_of(opened, (7, 1, 7))
    for _ in range(3):
        run_pass(leases, (7, 1, 7))
    assert [entry for entry in opened.log if entry[1] == 7 and entry[0] != "ahead"] == [
        ("acquire", 7),
        ("release", 7),
        ("resolve", 7),
        ("release", 7),
        ("resolve", 7),
        ("release", 7),
        ("resolve", 7),
    ]
    assert opened.held == [7]
    leases.close()
    assert opened.held == []


def test_threads_in_one_layer_share_a_lease_that_ends_with_the_last() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, ())
    first = leases.enter(3)
    inside, leave = threading.Event(), threading.Event()
    second = []

    def other() -> None:
        second.append(leases.enter(3))
        inside.set()
        leave.wait(10)
        leases.leave(3)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    leases.leave(3)
    assert opened.held == [3]
    leave.set()
    thread.join()
    assert opened.held == []
    assert second == [first]


def test_a_thread_knows_only_the_layers_that_it_is_inside() -> None:
    leases = leases_of(FakeOpened(), ())
    lease = leases.enter(3)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(leases.current(3)))
    thread.start()
    thread.join()
    assert seen == [None]
    assert leases.current(3) is lease
    leases.leave(3)
    assert leases.current(3) is None


def test_a_refused_thread_gets_its_layer_when_another_leaves() -> None:
    opened = FakeOpened(room=1)
    leases = leases_of(opened, ())
    leases.enter(0)
    got = threading.Event()

    def other() -> None:
        leases.enter(1)
        got.set()
        leases.leave(1)

    thread = threading.Thread(target=other)
    thread.start()
    assert not got.wait(0.05)
    leases.leave(0)
    assert got.wait(10)
    thread.join()
    assert opened.held == []


def test_nobody_asks_ahead_while_a_thread_waits_for_room() -> None:
    opened = FakeOpened(room=1)
    leases = leases_of(opened, (0, 1))
    leases.enter(0)
    thread = threading.Thread(target=run_pass, args=(leases, (5,)))
    thread.start()
    while not leases._starved:
        time.sleep(0.001)
    asked = opened.log.count(("ahead", 1))
    leases.enter(0)
    assert opened.log.count(("ahead", 1)) == asked
    leases.leave(0)
    leases.leave(0)
    thread.join(20)
    assert not thread.is_alive()
    assert opened.held == []


def test_a_layer_kept_for_later_makes_room_for_a_thread_that_waits() -> None:
    opened = FakeOpened(room=1)
    leases = leases_of(opened, (0,))  # 0 follows itself
    leases.enter(0)
    thread = threading.Thread(target=run_pass, args=(leases, (5,)))
    thread.start()
    while not leases._starved:
        time.sleep(0.001)
    leases.leave(0)
    thread.join(20)
    assert not thread.is_alive()
    assert opened.held == []


def test_what_was_asked_ahead_makes_room_for_what_is_needed() -> None:
    # Somebody calls a layer out of order: the guess fills the reserve, and nobody is in it.
    opened = FakeOpened(room=2)
    leases = leases_of(opened, (0, 1, 2))
    leases.enter(0)
    assert opened.held == [0, 1]
    leases.enter(2)
    assert opened.held == [0, 2]
    assert opened.log[2:] == [("acquire", 2), ("resolve", 1), ("release", 1), ("acquire", 2)]


def test_a_thread_that_holds_all_itself_is_told_the_daemons_reason() -> None:
    opened = FakeOpened(room=1)
    leases = leases_of(opened, ())
    leases.enter(0)
    with pytest.raises(LeaseLimit, match="client holds 1"):
        leases.enter(1)
    leases.leave(0)
    leases.enter(1)
    leases.leave(1)


def test_what_was_given_back_may_reach_the_daemon_late() -> None:
    # A release is sent behind another thread's request; a cancelled grant when its reply is read.
    opened = FakeOpened(room=1)
    leases = leases_of(opened, ())
    leases.enter(0)
    leases.leave(0)
    opened.held.append(0)  # not yet, for the daemon
    threading.Timer(0.1, opened.held.remove, (0,)).start()
    leases.enter(1)
    assert opened.held == [1]
    assert opened.log.count(("acquire", 1)) > 2


def test_waiting_for_another_thread_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "LIMIT_WAIT_S", 0.05)
    opened = FakeOpened(room=1)
    leases = leases_of(opened, ())
    thread = threading.Thread(target=leases.enter, args=(0,))
    thread.start()
    thread.join()
    with pytest.raises(LeaseLimit):
        leases.enter(1)


def test_a_wrong_guess_is_taken_back() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2, 3))
    leases.enter(0)
    leases.leave(0)
    leases.enter(2)
    assert ("cancel", 1) in opened.log
    assert [pending.layer for pending in opened.waiting] == [3]


def test_a_failed_acquire_leaves_nothing_behind() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1))
    opened.broken.add(0)
    with pytest.raises(LayerNotFound):
        leases.enter(0)
    assert leases.current(0) is None
    opened.broken.clear()
    leases.enter(0)
    leases.leave(0)
    assert opened.held == [1]  # asked ahead


def test_the_first_whole_pass_teaches_the_order() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1, 2))
    leases.begin_pass()
    leases.enter(2)
    leases.leave(2)  # a pass that fails here teaches nothing
    run_pass(leases, (2, 0, 1, 2))
    run_pass(leases, (0, 1, 2))
    assert opened.plans == [(0, 1, 2), (2, 0, 1, 2)]
    assert leases.order == (2, 0, 1, 2)


def not_pressed(room: int = 1000) -> FakeOpened:
    opened = FakeOpened(room)
    opened.pressed = False
    return opened


def test_while_memory_is_not_short_a_second_pass_asks_for_nothing() -> None:
    opened = not_pressed()
    leases = leases_of(opened, (0, 1, 2))
    run_pass(leases, (0, 1, 2))
    asked = list(opened.log)
    for _ in range(3):
        run_pass(leases, (0, 1, 2))
    assert opened.log == asked
    counters = leases.counters()
    assert (counters.entries, counters.leases, counters.kept) == (12, 3, 9)


def test_what_is_kept_goes_back_as_soon_as_memory_is_short() -> None:
    opened = not_pressed()
    leases = leases_of(opened, (0, 1, 2, 3))
    run_pass(leases, (0, 1, 2, 3))
    leases.begin_pass()
    leases.enter(0)
    opened.pressed = True
    leases.leave(0)
    assert 0 not in opened.held
    leases.enter(1)
    assert opened.held == [1, 2]  # in use; asked ahead, so to speak
    leases.leave(1)
    assert opened.held == [2]


def test_a_model_that_idles_gives_back_what_it_kept_when_tended() -> None:
    opened = not_pressed()
    leases = leases_of(opened, (0, 1, 2))
    run_pass(leases, (0, 1, 2))
    leases.tend()
    assert sorted(opened.held) == [0, 1, 2]
    opened.pressed = True
    leases.tend()
    assert opened.held == [0]  # the next pass begins with it
    run_pass(leases, (0, 1, 2))
    assert opened.held == [0]


def test_what_a_thread_computes_with_is_not_given_back_by_tending() -> None:
    opened = not_pressed()
    leases = leases_of(opened, (0, 1, 2))
    run_pass(leases, (0, 1, 2))
    leases.enter(1)
    opened.pressed = True
    leases.tend(quiet_s=0.0)
    assert sorted(opened.held) == [0, 1, 2][1:]
    leases.leave(1)


def test_a_model_that_is_quiet_for_long_keeps_nothing() -> None:
    opened = not_pressed()
    leases = leases_of(opened, (0, 1, 2))
    run_pass(leases, (0, 1, 2))
    leases.tend(quiet_s=60.0)
    assert sorted(opened.held) == [0, 1, 2]
    time.sleep(0.002)
    leases.tend(quiet_s=0.001)
    assert opened.held == [0]


def test_a_lease_that_a_view_outlives_or_that_was_lost_is_not_kept() -> None:
    opened = not_pressed()
    leases = leases_of(opened, ())
    opened.spoilt.add(0)
    leases.enter(0)
    leases.leave(0)  # a real lease says what is wrong as it is released
    assert opened.held == []


def test_what_is_kept_makes_room_for_what_is_needed() -> None:
    # The daemon refuses before the client saw that memory is short.
    opened = not_pressed(room=2)
    leases = leases_of(opened, (0, 1, 2, 3))
    run_pass(leases, (0, 1, 2, 3))
    run_pass(leases, (0, 1, 2, 3))
    leases.close()
    assert opened.held == []


def test_a_wrong_guess_is_kept_too_while_memory_is_not_short() -> None:
    opened = not_pressed()
    leases = leases_of(opened, (0, 1, 2))
    run_pass(leases, (0, 1, 2))
    run_pass(leases, (0, 2))
    assert sorted(opened.held) == [0, 1, 2]
    opened.pressed = True
    leases.tend()
    assert opened.held == [0]


def test_the_end_of_the_connection_is_told_to_who_enters_a_layer_that_is_kept() -> None:
    opened = not_pressed()
    leases = leases_of(opened, (0, 1))
    run_pass(leases, (0, 1))
    opened.ended = DaemonGone("it is gone")
    with pytest.raises(DaemonGone):
        leases.enter(0)


def test_nothing_is_entered_after_the_close_and_the_rest_goes_back_when_left() -> None:
    opened = FakeOpened()
    leases = leases_of(opened, (0, 1))
    leases.enter(0)
    leases.close()
    assert opened.waiting == []
    with pytest.raises(ClientClosed, match="fake"):
        leases.enter(1)
    leases.leave(0)
    assert opened.held == []


def test_a_forked_child_is_refused_without_waiting_for_a_lock() -> None:
    leases = leases_of(FakeOpened(), (0,))
    with leases._lock:
        child = os.fork()
        if child == 0:
            try:
                leases.enter(0)
            except ForkedClient:
                os._exit(7)
            finally:
                os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("seed", range(6))
def test_threads_out_of_step_all_finish_within_the_reserve(seed: int) -> None:
    # replay: pytest tests/client/test_leasing.py -k "out_of_step[SEED]"
    rng = random.Random(seed)
    order = list(range(5))
    opened = FakeOpened(room=rng.choice((1, 2, 3)))
    leases = leases_of(opened, order)
    problems: list[BaseException] = []
    ended = threading.Event()

    def press() -> None:
        mine = random.Random(seed)
        try:
            while not ended.wait(0.001):
                opened.pressed = mine.random() < 0.5
                leases.tend()
        except BaseException as problem:
            problems.append(problem)

    presses = threading.Thread(target=press)
    presses.start()

    def run(seed: int) -> None:
        mine = random.Random(seed)
        try:
            for _ in range(30):
                walk = order if mine.random() < 0.7 else mine.sample(order, 3)
                run_pass(leases, walk)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(rng.random(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), f"deadlock at seed {seed}"
    ended.set()
    presses.join(60)
    assert problems == []
    leases.close()
    assert opened.held == []
    assert opened.waiting == []
