"""A budget that changes while the machine runs. Layers are one granule (G) or as a test says."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.core import by_hand
from tests.core.by_hand import G, feed, key, of
from tierd.core.errors import IllegalEvent
from tierd.core.model import (
    OPERATOR,
    Acquire,
    Admit,
    ArenaAdded,
    BudgetChanged,
    Discard,
    Done,
    Evict,
    Grant,
    Later,
    Pin,
    Plan,
    Read,
    ReadDone,
    Refuse,
    Release,
)

if TYPE_CHECKING:
    from tierd.core.machine import TierMachine

machine_of = partial(by_hand.machine_of, clients=2)


def held(machine: TierMachine, client: int, layers: range) -> dict[int, int]:
    """Acquires the layers; the leases by layer."""
    actions = feed(machine, *(Acquire(0, client, 100 + i, key(i), ahead=i > 0) for i in layers))
    return {grant.key.layer: grant.lease for grant in of(Grant, actions)}


def test_what_nobody_holds_goes_at_once_and_its_memory_back_to_the_system() -> None:
    machine = machine_of(6, (1,) * 6)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(6))))
    assert machine.snapshot().memory.resident_bytes == 6 * G
    actions = feed(machine, BudgetChanged(5, 9, 3 * G))
    assert of(Done, actions) == [Done(9, ())]
    assert len(of(Evict, actions)) == 3
    assert sum(discard.nbytes for discard in of(Discard, actions)) == 3 * G
    memory = machine.snapshot().memory
    assert (memory.budget_bytes, memory.used_bytes, memory.above_budget_bytes) == (3 * G, 3 * G, 0)
    assert machine.budget_bytes == 3 * G


def test_cold_memory_is_given_up_before_any_layer() -> None:
    machine = machine_of(6, (1, 1))
    feed(machine, Acquire(0, 1, 1, key(0)), Acquire(0, 2, 1, key(1)))
    actions = feed(machine, BudgetChanged(5, 9, 4 * G))
    assert not of(Evict, actions)
    assert sum(discard.nbytes for discard in of(Discard, actions)) == 2 * G


def test_what_is_leased_beyond_the_new_budget_goes_as_its_leases_end() -> None:
    machine = machine_of(6, (1,) * 6)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(6))))
    leases = held(machine, 1, range(6))
    actions = feed(machine, BudgetChanged(5, 9, 2 * G))
    assert not of(Evict, actions)
    assert not of(Discard, actions)
    assert machine.snapshot().memory.above_budget_bytes == 4 * G
    for gone, lease in enumerate(leases.values(), start=1):
        feed(machine, Release(6, 1, lease))
        above = machine.snapshot().memory.above_budget_bytes
        assert above == max(4 - gone, 0) * G
    assert machine.snapshot().memory.used_bytes == 2 * G


def test_nothing_new_is_taken_while_more_is_held_than_the_budget() -> None:
    machine = machine_of(6, (1,) * 8)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(8))))
    held(machine, 1, range(6))
    actions = feed(machine, BudgetChanged(5, 9, 3 * G), Acquire(6, 1, 50, key(7), ahead=True))
    assert of(Later, actions) == [Later(1, 50)]
    [refusal] = of(Refuse, feed(machine, Acquire(6, 1, 51, key(7))))
    assert refusal.code == "lease_limit"
    assert machine.snapshot().memory.used_bytes == 6 * G


def test_a_client_within_its_reserve_is_served_though_others_hold_more_than_the_new_budget() -> (
    None
):
    machine = machine_of(6, (1,) * 8)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(8))), Plan(0, 2, 1, 0, tuple(range(8))))
    held(machine, 1, range(5))
    feed(machine, BudgetChanged(5, 9, 3 * G))
    [grant] = of(Grant, feed(machine, Acquire(6, 2, 2, key(7))))
    assert machine.snapshot().memory.used_bytes == 6 * G
    feed(machine, Release(7, 2, grant.lease))
    assert machine.snapshot().memory.used_bytes == 6 * G, "its reserve is still promised"


def test_less_than_what_was_promised_is_refused_and_the_text_says_what_is_possible() -> None:
    machine = machine_of(8, (1, 2, 1))
    feed(machine, Plan(0, 1, 1, 0, (0, 1, 2)), Pin(0, 1, (key(0),)))
    [refusal] = of(Refuse, feed(machine, BudgetChanged(5, 9, 4 * G)))
    assert (refusal.client, refusal.request, refusal.code) == (OPERATOR, 9, "budget_too_small")
    assert f"at least {5 * G} are needed" in refusal.text
    assert machine.budget_bytes == 8 * G
    assert of(Done, feed(machine, BudgetChanged(6, 10, 5 * G))) == [Done(10, ())]


@pytest.mark.parametrize("nbytes", [0, 4096, G - 1])
def test_less_than_a_granule_is_refused_even_where_nothing_is_served(nbytes: int) -> None:
    machine = machine_of(4)
    [refusal] = of(Refuse, feed(machine, BudgetChanged(5, 9, nbytes)))
    assert refusal.code == "budget_too_small"


def test_a_budget_is_raised_and_the_memory_used_at_once() -> None:
    machine = machine_of(2, (1,) * 6)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(6))))
    assert machine.snapshot().memory.resident_bytes == 2 * G
    actions = feed(machine, BudgetChanged(5, 9, 6 * G))
    assert of(Done, actions) == [Done(9, ())]
    memory = machine.snapshot().memory
    assert (memory.budget_bytes, memory.resident_bytes) == (6 * G, 6 * G)


def test_a_plan_that_had_no_room_is_admitted_once_the_budget_is_raised() -> None:
    machine = machine_of(4, (2,), (2, 2))
    feed(machine, Plan(0, 1, 1, 1, (0, 1)))
    held_by_1 = feed(machine, Acquire(0, 1, 2, key(0, 1)), Acquire(0, 1, 3, key(1, 1), ahead=True))
    assert len(of(Grant, held_by_1)) == 2
    assert not of(Admit, feed(machine, Plan(1, 2, 1, 0, (0,))))
    assert of(Admit, feed(machine, BudgetChanged(2, 9, 6 * G)))


def test_a_budget_may_be_lowered_again_before_the_first_time_is_over() -> None:
    machine = machine_of(8, (1,) * 8)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(8))))
    leases = held(machine, 1, range(8))
    feed(machine, BudgetChanged(5, 9, 6 * G), BudgetChanged(6, 10, 3 * G))
    assert machine.snapshot().memory.above_budget_bytes == 5 * G
    feed(machine, BudgetChanged(7, 11, 7 * G))
    assert machine.snapshot().memory.above_budget_bytes == G
    feed(machine, *(Release(8, 1, lease) for lease in leases.values()))
    memory = machine.snapshot().memory
    assert (memory.used_bytes, memory.above_budget_bytes) == (7 * G, 0)


def test_an_arena_with_memory_does_not_come_beside_what_is_above_the_budget() -> None:
    machine = machine_of(4, (1,) * 4)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(4))))
    held(machine, 1, range(4))
    feed(machine, BudgetChanged(5, 9, 2 * G))
    with pytest.raises(IllegalEvent):
        machine.handle(ArenaAdded(6, 1, 8 * G, G))
    machine.check()


def test_a_client_that_never_lets_go_of_memory_does_not_hold_up_one_within_its_reserve() -> None:
    """On a GPU a stopped client neither gives its leases back nor unmaps what should go: no discard
    is ever done after the budget was lowered."""
    machine = machine_of(12, (1,) * 5, (2,) * 3)
    feed(machine, Plan(0, 1, 1, 0, tuple(range(5))), Plan(0, 2, 1, 1, tuple(range(3))))
    assert len(held(machine, 1, range(5))) == 5
    assert machine.snapshot().memory.resident_bytes == 11 * G
    actions = machine.handle(BudgetChanged(5, 9, 5 * G))
    assert of(Done, actions)
    assert of(Discard, actions)
    for use in range(12):
        actions = machine.handle(Acquire(6 + use, 2, 10 + use, key(use % 3, 1)))
        for read in of(Read, actions):
            actions += machine.handle(ReadDone(6 + use, read.slot))
        [grant] = of(Grant, actions)
        machine.handle(Release(6 + use, 2, grant.lease))
        machine.check()
    assert machine.snapshot().memory.used_bytes <= 12 * G
