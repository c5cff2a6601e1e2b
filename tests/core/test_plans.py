"""Positions, distances and the expected time of the next use."""

from __future__ import annotations

import random

import pytest

from tierd.core.orders import Order, between, first_after, last_before
from tierd.core.plans import NEVER, PlanState


def plan_of(*order: int, kind: str = "cyclic") -> PlanState:
    return PlanState(0, Order(order), kind=kind, lookahead=1, at_ns=0)


def test_the_next_use_of_a_layer_is_counted_from_the_position() -> None:
    plan = plan_of(0, 1, 2, 3)
    assert [plan.distance(layer) for layer in range(4)] == [1, 2, 3, 4]
    plan.advance(1, 10)
    assert [plan.distance(layer) for layer in range(4)] == [3, 4, 1, 2]


def test_a_tied_embedding_is_used_twice_a_pass() -> None:
    plan = plan_of(0, 1, 2, 0)
    plan.advance(0, 0)
    assert plan.distance(0) == 3
    plan.advance(2, 0)
    assert plan.distance(0) == 1
    plan.advance(0, 0)
    assert (plan.position, plan.distance(0), plan.distance(1)) == (3, 1, 2)


def test_a_plan_that_is_no_cycle_ends() -> None:
    plan = plan_of(0, 1, 2, kind="once")
    plan.advance(1, 0)
    assert plan.distance(0) is None
    assert plan.due(0) == NEVER
    assert plan.ahead(1) == 2
    assert plan.ahead(2) is None


def test_leaving_the_plan_does_not_move_along_it() -> None:
    plan = plan_of(0, 1, 2)
    plan.advance(0, 0)
    plan.advance(17, 0)
    assert plan.position == 0
    plan.advance(2, 0)
    assert plan.position == 2


@pytest.mark.parametrize("seed", range(10))
def test_distances_equal_a_walk_along_the_order(seed: int) -> None:
    rng = random.Random(seed)
    plan = plan_of(*(rng.randrange(6) for _ in range(rng.randint(1, 12))))
    for _ in range(30):
        for layer in range(6):
            steps = next((d for d in range(1, len(plan.order) + 1) if plan.ahead(d) == layer), None)
            assert plan.distance(layer) == steps
        plan.advance(rng.randrange(6), 0)


def test_a_silent_client_is_expected_later_than_a_busy_one() -> None:
    silent, busy = plan_of(0, 1, 2), plan_of(0, 1, 2)
    for step in range(3):
        silent.advance(step, step * 1_000_000)
        busy.advance(step, 60_000_000_000 + step * 1_000_000)
        busy.last_ns = 60_000_000_000 + step * 1_000_000
    assert silent.due(0) > busy.due(2)


def test_the_time_of_a_step_follows_the_client_but_not_its_pauses() -> None:
    plan = plan_of(0, 1, 2, 3)
    for step in range(60):
        plan.advance(step % 4, step * 2_000_000)
    assert 1_900_000 < plan.step_ns < 2_200_000
    plan.advance(0, 3_600_000_000_000)
    assert plan.step_ns < 4_500_000


def test_a_client_that_stalls_does_not_look_slow() -> None:
    """The disk makes each step ten times as long; what the client computes is seen through it."""
    plan, free = plan_of(0, 1, 2, 3), plan_of(0, 1, 2, 3)
    for step in range(60):
        plan.advance(step % 4, step * 20_000_000)
        plan.waited(18_000_000)
        free.advance(step % 4, step * 2_000_000)
    assert 1_900_000 < plan.compute_ns < 2_200_000
    assert 17_000_000 < plan.wait_ns < 19_000_000
    assert plan.step_ns == plan.compute_ns + plan.wait_ns
    assert abs(plan.compute_ns - free.compute_ns) < 100_000


@pytest.mark.parametrize("seed", range(5))
def test_sets_of_places_agree_with_a_walk(seed: int) -> None:
    rng = random.Random(seed)
    length = rng.randint(1, 90)
    for _ in range(40):
        places = rng.getrandbits(length) if rng.random() < 0.9 else 0
        position = rng.randrange(-1, length)
        ahead = [(position + step) % length for step in range(1, length + 1)]
        there = [place for place in ahead if places >> place & 1]
        assert first_after(places, position) == (there[0] if there else None)
        behind = [(position - step) % length for step in range(length)]
        back = [place for place in behind if places >> place & 1]
        assert last_before(places, position) == (back[0] if back else None)
        place = rng.choice(ahead)
        upto = ahead[: ahead.index(place)]
        assert between(places, position, place) == sum(places >> at & 1 for at in upto)
