"""Clients of one model come into phase and stay there; nobody is held beyond the bound."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tierd_tools.convoy_study import READ_NS, Case, Process, Study, crowd

#: Of a pass that a client may lose because another one joins.
LATE_PASSES = 1.0


def case(clients: int, cache: int, reads: int, *, compute: float = 0.2, seed: int = 1) -> Case:
    return Case(
        "", crowd(clients, (compute / 2, compute), seed), cache, reads=reads, warm=200, measured=120
    )


@pytest.mark.parametrize("reads", [1, 2, 4])
@pytest.mark.parametrize("cache", [4, 12])
@pytest.mark.parametrize("clients", [2, 4])
def test_bytes_of_several_clients_are_those_of_one(clients: int, cache: int, reads: int) -> None:
    together = case(clients, cache, reads)
    alone = replace(together, processes=together.processes[:1])
    assert Study(together).run().reads_per_pass() <= 1.12 * Study(alone).run().reads_per_pass()


def test_without_holds_clients_of_a_small_budget_read_everything_for_themselves() -> None:
    """What the mechanism is for; should others bring this about one day, it can go."""
    off = Study(replace(case(4, 4, 4), config={"convoy_wait_ns": 0})).run()
    on = Study(case(4, 4, 4)).run()
    assert off.reads_per_pass() >= 1.8 * on.reads_per_pass()
    assert on.layers_per_read_time() >= 1.8 * off.layers_per_read_time()


@pytest.mark.parametrize("late", [100.0, 107.3])
@pytest.mark.parametrize(("cache", "reads"), [(12, 1), (12, 2), (12, 4), (4, 2), (4, 4)])
def test_who_joins_late_costs_the_others_less_than_a_pass(
    cache: int, reads: int, late: float
) -> None:
    three = tuple(Process(0.2, start=1.7 * number) for number in range(3))
    before = Case("", three, cache, reads=reads, warm=late, measured=100)
    after = replace(before, processes=(*three, Process(0.2, start=late)))
    ran, joined = Study(before).run(), Study(after).run()
    for number in range(3):
        lost = ran.layers_per_read_time(number) - joined.layers_per_read_time(number)
        assert lost * before.measured <= LATE_PASSES * before.layers


@pytest.mark.parametrize("compute", [2.0, 4.0])
def test_a_slow_client_does_not_hold_fast_ones_up(compute: float) -> None:
    fast = tuple(Process(0.2, start=7.0 * number) for number in range(3))
    mixed = Case("", (*fast, Process(compute, start=3.0)), reads=2, warm=100, measured=200)
    off = Study(replace(mixed, config={"convoy_wait_ns": 0})).run()
    on = Study(mixed).run()
    for number in range(4):
        assert on.layers_per_read_time(number) >= 0.95 * off.layers_per_read_time(number)


def longest_gap(study: Study, number: int, begin: float, end: float) -> float:
    """The longest time between two layers of a client, in read times."""
    at = [at / READ_NS for at in study.runners[number].at if begin <= at / READ_NS <= end]
    return max(later - earlier for earlier, later in pairwise(at))


@pytest.mark.parametrize("ending", ["pauses", "dies"])
def test_a_runner_that_stops_holds_the_others_no_longer_than_the_bound(ending: str) -> None:
    """Whenever it stops: some of these times are in the middle of a hold."""
    holds = 0
    for tenth in range(30, 130, 10):
        stops = {"leaves_at": tenth / 2} if ending == "dies" else {"pause_at": tenth, "pause": 300}
        runner = Process(0.2, jitter=0.0, **stops)
        held = Process(0.2, start=13.0, jitter=0.0)
        bound = 30
        study = Study(
            Case("", (runner, held), 4, reads=4, warm=0, measured=200,
                 config={"convoy_wait_ns": bound * READ_NS})
        ).run()  # fmt: skip
        holds += study.machine.snapshot().counters.holds
        assert longest_gap(study, 1, 20, 200) <= bound + 4
    assert holds


def test_a_bound_of_nothing_holds_nobody() -> None:
    study = Study(replace(case(4, 4, 4), config={"convoy_wait_ns": 0})).run()
    counters = study.machine.snapshot().counters
    assert (counters.holds, counters.held_ns) == (0, 0)


def test_no_hold_is_longer_than_the_bound() -> None:
    bound_ns = 12 * READ_NS
    study = Study(replace(case(4, 4, 4), config={"convoy_wait_ns": bound_ns})).run()
    resumed = [told for told in study.machine.story() if told.what == "resume"]
    assert resumed
    assert all(int(str(told.values[1])) <= bound_ns for told in resumed)


def test_the_books_hold_at_every_event_of_a_run_with_holds() -> None:
    checked = Study(replace(case(4, 4, 4), warm=20, measured=30))
    checked.check = True
    assert checked.run().machine.snapshot().counters.holds
