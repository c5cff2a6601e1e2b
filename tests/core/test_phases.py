"""Who should wait for whom, so that clients of one model share their reads."""

from __future__ import annotations

from tierd.core.phases import Cycle, Rider

READ_NS = 1_000_000
LONG_NS = 1_000 * READ_NS
ALL_MISSING = [True] * 24


def rider(client: int, position: int, *, compute: float = 0.2, rested: bool = True) -> Rider:
    """A client that takes two read times for a step, `compute` of one without waiting."""
    return Rider(client, position, 2 * READ_NS, int(compute * READ_NS), rested)


def test_the_one_behind_runs_and_the_one_in_front_waits() -> None:
    gathering = Cycle(ALL_MISSING, READ_NS).gather([rider(1, 3), rider(2, 9)], LONG_NS)
    assert gathering is not None
    assert gathering.runner == 1
    [wait] = gathering.waits
    assert wait.clients == (2,)
    assert wait.wait_ns == 6 * 2 * READ_NS


def test_the_cycle_is_cut_at_its_widest_gap() -> None:
    riders = [rider(1, 1), rider(2, 6), rider(3, 20)]
    gathering = Cycle(ALL_MISSING, READ_NS).gather(riders, LONG_NS)
    assert gathering is not None
    assert gathering.runner == 3  # 5 steps to client 1, 5 more to client 2; 14 are left
    assert [wait.clients for wait in gathering.waits] == [(1,), (2,)]


def test_one_late_client_waits_rather_than_many() -> None:
    crowd = [rider(number, 10) for number in range(4)]
    gathering = Cycle(ALL_MISSING, READ_NS).gather([*crowd, rider(9, 0)], LONG_NS)
    assert gathering is not None
    assert gathering.runner in range(4)  # they come round in 14 steps; 4 would wait for 10
    assert [wait.clients for wait in gathering.waits] == [(9,)]


def test_clients_in_phase_are_left_alone() -> None:
    missing = [False] * 12 + [True] * 12
    assert Cycle(missing, READ_NS).gather([rider(1, 3), rider(2, 5)], LONG_NS) is None
    assert Cycle(missing, READ_NS).gather([rider(1, 23), rider(2, 0)], LONG_NS) is None


def test_two_steps_apart_is_out_of_phase_where_the_layer_between_is_missing() -> None:
    missing = [True] * 6
    [one, other] = Cycle(missing, READ_NS).groups([rider(1, 1), rider(2, 3)])
    assert (one.reads, other.reads) == (6, 6)


def test_nobody_waits_longer_than_is_allowed() -> None:
    riders = [rider(1, 0), rider(2, 4), rider(3, 11)]
    gathering = Cycle(ALL_MISSING, READ_NS).gather(riders, 10 * READ_NS)
    assert gathering is not None
    assert [wait.clients for wait in gathering.waits] == [(2,)]
    assert Cycle(ALL_MISSING, READ_NS).gather([rider(1, 0), rider(2, 12)], READ_NS) is None


def test_clients_of_different_speeds_are_not_brought_together() -> None:
    slow = rider(1, 0, compute=8.0)
    assert Cycle(ALL_MISSING, READ_NS).gather([slow, rider(2, 12)], LONG_NS) is None


def test_computing_at_different_speeds_is_no_matter_while_both_wait_for_the_device() -> None:
    slow = rider(1, 0, compute=0.9)
    assert Cycle(ALL_MISSING, READ_NS).gather([slow, rider(2, 12)], LONG_NS) is not None


def test_a_wait_that_costs_more_than_it_saves_is_not_made() -> None:
    missing = [False] * 23 + [True]  # one read a pass is saved
    riders = [rider(1, 0)] + [rider(number, 8) for number in range(2, 12)]
    gathering = Cycle(missing, READ_NS).gather(riders, LONG_NS)
    assert gathering is None or gathering.runner != 1


def test_who_was_held_lately_is_not_held() -> None:
    riders = [rider(1, 0), rider(2, 10, rested=False)]
    gathering = Cycle(ALL_MISSING, READ_NS).gather(riders, LONG_NS)
    assert gathering is not None
    assert [wait.clients for wait in gathering.waits] == [(1,)]
