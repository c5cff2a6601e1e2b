"""Leases that clients keep: when they may, and that they keep nobody waiting.

Layers are one granule (G) or as a test says.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.core import by_hand
from tests.core.by_hand import G, feed, key, of
from tierd.core.errors import IllegalEvent
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    BudgetChanged,
    ClientGone,
    Done,
    Evict,
    Grant,
    HolderGone,
    Later,
    ModelRemoved,
    Pin,
    Plan,
    PlanOver,
    Refuse,
    Release,
    Tick,
    Unpin,
)

if TYPE_CHECKING:
    from tierd.core.machine import TierMachine

S = 1_000_000_000
machine_of = partial(by_hand.machine_of, clients=4)


def plan(machine: TierMachine, client: int, layers: int, model: int = 0, at_ns: int = 0) -> bool:
    """Whether it was admitted at once."""
    return bool(of(Admit, feed(machine, Plan(at_ns, client, 1, model, tuple(range(layers))))))


def keep(machine: TierMachine, client: int, layers: int, model: int = 0) -> list[int]:
    """The client takes all layers and gives none back; its leases."""
    asked = (Acquire(0, client, 10 + i, key(i, model), ahead=i > 0) for i in range(layers))
    return [grant.lease for grant in of(Grant, feed(machine, *asked))]


def give_back(machine: TierMachine, client: int, leases: list[int]) -> list[Action]:
    return feed(machine, *(Release(0, client, lease) for lease in leases))


@pytest.mark.parametrize(("granules", "pressed"), [(6, True), (7, False)])
def test_leases_may_be_kept_while_all_layers_and_the_reserve_fit_and_not_below(
    granules: int, pressed: bool
) -> None:
    machine = machine_of(granules, (1, 2, 1, 1))
    assert not machine.pressed
    plan(machine, 1, 4)
    assert machine.pressed is pressed


def test_clients_of_one_model_need_its_layers_once_and_a_reserve_each() -> None:
    machine = machine_of(8, (1,) * 4)
    for client in (1, 2, 3, 4):
        assert plan(machine, client, 4)
    assert not machine.pressed
    for client in (1, 2, 3, 4):
        assert len(keep(machine, client, 4)) == 4, "a client could not keep what is there anyway"
    assert machine.snapshot().memory.used_bytes == 8 * G
    feed(machine, BudgetChanged(0, 1, 7 * G))
    assert machine.pressed


def test_a_plan_waits_only_until_kept_leases_are_given_back() -> None:
    machine = machine_of(6, (1,) * 4, (2,) * 3)
    plan(machine, 1, 4)
    leases = keep(machine, 1, 4)
    assert plan(machine, 2, 3, model=1), "its reserve is beside what is kept"
    assert machine.pressed
    give_back(machine, 1, leases[1:])
    assert of(Grant, feed(machine, Acquire(1, 2, 5, key(0, 1))))

    machine = machine_of(6, (1,) * 4, (3,) * 3)
    plan(machine, 1, 4)
    leases = keep(machine, 1, 4)
    assert not plan(machine, 2, 3, model=1), "what is kept leaves no room for its reserve"
    assert machine.pressed
    assert of(Admit, give_back(machine, 1, leases[1:]))


def test_while_a_plan_waits_nobody_takes_more_of_what_fits_at_once() -> None:
    machine = machine_of(7, (1,) * 5, (4,))
    for client in (1, 2):
        plan(machine, client, 5)
    keep(machine, 1, 5)
    assert not machine.pressed
    assert not plan(machine, 3, 1, model=1)
    asked = Acquire(0, 2, 20, key(0)), Acquire(0, 2, 21, key(1), ahead=True)
    actions = feed(machine, *asked)
    assert len(of(Grant, actions)) == 1
    assert of(Later, actions) == [Later(2, 21)]


def test_nobody_is_asked_for_leases_any_more_once_the_plan_was_refused() -> None:
    machine = machine_of(6, (1,) * 4, (4,) * 2)
    plan(machine, 1, 4)
    keep(machine, 1, 4)
    plan(machine, 2, 2, model=1, at_ns=5)
    assert machine.pressed
    [refusal] = of(Refuse, feed(machine, Tick(5 + 2 * S)))
    assert (refusal.client, refusal.code) == (2, "budget_too_small")
    assert not machine.pressed


def test_a_first_request_without_a_plan_waits_for_kept_leases_like_a_plan() -> None:
    machine = machine_of(6, (1,) * 5, (2,))
    plan(machine, 1, 5)
    leases = keep(machine, 1, 5)
    assert not machine.pressed
    assert not feed(machine, Acquire(1, 2, 7, key(0, 1)))
    assert machine.pressed
    [grant] = of(Grant, give_back(machine, 1, leases[2:]))
    assert (grant.client, grant.request) == (2, 7)


def test_a_first_request_that_nobody_makes_room_for_is_refused_in_the_end() -> None:
    machine = machine_of(6, (1,) * 5, (2,))
    plan(machine, 1, 5)
    keep(machine, 1, 5)
    feed(machine, Acquire(1, 2, 7, key(0, 1)))
    [refusal] = of(Refuse, feed(machine, Tick(2 * S + 1)))
    assert (refusal.request, refusal.code) == (7, "budget_too_small")
    assert not machine.pressed


def test_a_waiting_first_request_ends_with_its_client_or_its_model() -> None:
    for event in (ClientGone(1, 2), ModelRemoved(1, 1)):
        machine = machine_of(6, (1,) * 5, (2,))
        plan(machine, 1, 5)
        keep(machine, 1, 5)
        feed(machine, Acquire(1, 2, 7, key(0, 1)))
        assert machine.pressed
        refusals = of(Refuse, feed(machine, event))
        codes = [refusal.code for refusal in refusals]
        assert codes == ([] if isinstance(event, ClientGone) else ["model_removed"])
        assert not machine.pressed


def test_a_client_within_its_reserve_is_served_whatever_is_kept() -> None:
    """Also with a layer that it never announced: all memory but the reserves is kept by others."""
    machine = machine_of(7, (1,) * 5, (1,) * 3)
    for client in (1, 2):
        plan(machine, client, 5)
    keep(machine, 1, 5)
    assert not machine.pressed
    for layer in (0, 1):
        [grant] = of(Grant, feed(machine, Acquire(0, 2, 50 + layer, key(layer, 1))))
        assert grant.key == key(layer, 1)
    [refusal] = of(Refuse, feed(machine, Acquire(0, 2, 52, key(2, 1))))
    assert refusal.code == "lease_limit"
    assert machine.pressed, "what nobody announced does not fit beside all that was"


def test_what_is_held_counts_once_also_when_its_plan_is_gone() -> None:
    machine = machine_of(8, (1,) * 4, (1,) * 2)
    for client in (1, 2):
        plan(machine, client, 4)
        keep(machine, client, 4)
    feed(machine, Plan(1, 1, 2, 1, (0, 1)), Plan(1, 2, 2, 1, (0, 1)))
    ledger = machine.books.ledger
    assert (ledger.wanted, ledger.apart) == (4 + 2, 2)
    assert not machine.pressed
    feed(machine, ClientGone(2, 1))
    assert (ledger.wanted, ledger.apart) == (4 + 2, 1)
    feed(machine, ClientGone(2, 2))
    assert (ledger.wanted, ledger.apart) == (0, 0)


def test_a_dead_clients_slots_do_not_press_the_others() -> None:
    machine = machine_of(6, (1,) * 4)
    for client in (1, 2):
        plan(machine, client, 4)
        keep(machine, client, 4)
    feed(machine, ClientGone(1, 1, holder=1))
    assert not machine.pressed
    leases = [lease for lease, slot in machine.books.clients[2].leases.items()]
    give_back(machine, 2, leases)
    feed(machine, ClientGone(2, 2))
    assert machine.books.ledger.wanted == 4
    feed(machine, HolderGone(3, 1))
    assert machine.books.ledger.wanted == 0


def test_pins_of_planned_layers_need_no_room_of_their_own() -> None:
    machine = machine_of(5, (1,) * 4, (1,) * 2)
    plan(machine, 1, 4)
    keep(machine, 1, 4)
    assert of(Done, feed(machine, Pin(0, 1, tuple(key(i) for i in range(4)))))
    assert not machine.pressed
    [refusal] = of(Refuse, feed(machine, Pin(0, 2, (key(0, 1),))))
    assert refusal.code == "budget_too_small"
    feed(machine, Unpin(0, 3, tuple(key(i) for i in range(4))))
    assert machine.books.ledger.wanted == 4


def test_slots_are_counted_once_too() -> None:
    machine = machine_of(50, (1,) * 4, slot_limit=7)
    for client in (1, 2, 3):
        assert plan(machine, client, 4)
        assert len(keep(machine, client, 4)) == 4
    assert not machine.pressed
    plan(machine, 4, 4)
    assert machine.pressed


def test_a_budget_lowered_below_what_is_kept_presses_and_sinks_as_leases_end() -> None:
    machine = machine_of(8, (1,) * 6)
    for client in (1, 2):
        plan(machine, client, 6)
    kept = {client: keep(machine, client, 6) for client in (1, 2)}
    assert not machine.pressed
    assert of(Done, feed(machine, BudgetChanged(1, 1, 4 * G)))
    assert machine.pressed
    give_back(machine, 1, kept[1])
    used = machine.snapshot().memory.used_bytes
    assert used == (6 + 1) * G, "what client 2 still has, and the reserve of client 1"
    assert len(of(Evict, give_back(machine, 2, kept[2]))) >= 2
    assert machine.snapshot().memory.used_bytes == 4 * G


def test_a_plan_that_is_over_leaves_its_reserve_and_its_layers_to_others() -> None:
    machine = machine_of(4, (1,) * 4, (3,))
    plan(machine, 1, 4)
    [lease] = keep(machine, 1, 1)
    assert machine.pressed
    feed(machine, PlanOver(1, 1, 0))
    assert not machine.pressed
    assert machine.books.ledger.wanted == 1, "what it still holds counts"
    feed(machine, Release(2, 1, lease))
    assert machine.books.ledger.wanted == 0
    assert plan(machine, 2, 1, model=1)
    assert machine.snapshot().memory.reserved_bytes == 3 * G


def test_a_plan_over_another_model_does_not_end_and_one_that_waits_is_refused() -> None:
    machine = machine_of(6, (1,) * 4, (3,) * 2)
    plan(machine, 1, 4)
    feed(machine, PlanOver(1, 1, 1), PlanOver(1, 2, 1))
    assert machine.snapshot().memory.reserved_bytes == G
    keep(machine, 1, 4)
    assert not plan(machine, 2, 2, model=1)
    [refusal] = of(Refuse, feed(machine, PlanOver(2, 2, 1)))
    assert (refusal.client, refusal.request, refusal.code) == (2, 1, "bad_request")
    assert not machine.pressed
    with pytest.raises(IllegalEvent):
        machine.handle(PlanOver(3, 9, 0))


def test_a_plan_that_comes_while_a_dead_clients_slots_are_fenced_waits_for_that() -> None:
    machine = machine_of(4, (1,) * 4, (2,) * 2)
    plan(machine, 1, 4)
    keep(machine, 1, 4)
    feed(machine, ClientGone(1, 1, holder=1))
    assert not feed(machine, Plan(2, 2, 1, 1, (0, 1))), "refused at once"
    assert machine.pressed
    assert of(Admit, feed(machine, HolderGone(3, 1)))


def test_a_plan_waits_for_processes_of_an_earlier_daemon_no_longer_than_for_others() -> None:
    machine = machine_of(4, (1,) * 4, (2,) * 2)
    plan(machine, 1, 4)
    keep(machine, 1, 4)
    feed(machine, ClientGone(1, 1, holder=1))
    feed(machine, Plan(2, 2, 1, 1, (0, 1)))
    [refusal] = of(Refuse, feed(machine, Tick(2 + 2 * S)))
    assert refusal.code == "budget_too_small"
    assert f"{4 * G} bytes in quarantine" in refusal.text


def test_leases_of_a_model_that_was_removed_are_given_back_and_nobody_is_pressed_any_more() -> None:
    machine = machine_of(9, (1,) * 4, (1,) * 2)
    plan(machine, 1, 4)
    plan(machine, 2, 2, model=1)
    leases = keep(machine, 1, 4)
    keep(machine, 2, 2, model=1)
    assert not machine.pressed
    feed(machine, ModelRemoved(1, 0))
    assert machine.pressed
    give_back(machine, 1, leases)
    assert not machine.pressed
    assert not machine.books.leaving


def test_a_dead_clients_slots_of_a_removed_model_press_nobody() -> None:
    machine = machine_of(9, (1,) * 4)
    plan(machine, 1, 4)
    keep(machine, 1, 4)
    feed(machine, ClientGone(1, 1, holder=1), ModelRemoved(2, 0))
    assert not machine.pressed
    feed(machine, HolderGone(3, 1))
    assert not machine.books.leaving
