"""The admission rule."""

from __future__ import annotations

import pytest

from tierd.core.errors import InvariantBroken
from tierd.core.leases import Ledger
from tierd.core.model import LayerKey


def ledger_of(budget: int, *reserves: int) -> Ledger:
    ledger = Ledger(budget, slot_limit=1000)
    for client, reserve in enumerate(reserves):
        ledger.open(client)
        ledger.set_reserve(client, reserve)
    ledger.check()
    return ledger


def test_what_lies_inside_the_reserve_is_always_admitted() -> None:
    ledger = ledger_of(10, 4, 6)
    assert ledger.available == 0
    assert ledger.admits(0, extra=4)
    assert not ledger.admits(0, extra=5)


def test_a_layer_that_two_clients_hold_is_charged_to_both() -> None:
    """Else the release by one would raise the charge of the other beyond the budget."""
    ledger = ledger_of(10, 2, 2)
    for client in (0, 1):
        ledger.hold(client, LayerKey(0, 0), 5)
    assert ledger.available == 0


def test_a_layer_is_charged_once_to_one_client() -> None:
    ledger = ledger_of(10, 0)
    for _ in range(3):
        ledger.hold(0, LayerKey(0, 0), 4)
    assert ledger[0].held == 4
    assert ledger.extra(0, LayerKey(0, 0), 4) == 0
    ledger.let_go(0, LayerKey(0, 0))
    assert ledger[0].held == 4
    ledger.let_go(0, LayerKey(0, 0))
    ledger.let_go(0, LayerKey(0, 0))
    assert ledger[0].held == 0
    ledger.check()


def test_quarantine_is_not_available() -> None:
    ledger = ledger_of(10, 4)
    ledger.quarantined = 5
    ledger.want(5)
    assert ledger.admits_plan(0, 5)
    assert not ledger.admits_plan(0, 6)


def test_a_client_that_leaves_gives_everything_back() -> None:
    ledger = ledger_of(10, 4, 3)
    ledger.hold(0, LayerKey(0, 0), 7)
    ledger.close(0)
    assert ledger.available == 7


def test_what_must_be_there_is_every_layer_once_and_what_is_left_of_the_reserves() -> None:
    ledger = ledger_of(10, 4, 3, 0)
    for client in (0, 1):
        ledger.hold(client, LayerKey(0, 0), 2)
    assert ledger.needed({}) == (2 + 2 + 1, 1)
    assert ledger.needed({LayerKey(0, 0): 2, LayerKey(0, 1): 5}) == (2 + 2 + 1 + 5, 2)


def test_a_layer_that_is_wanted_counts_once_whoever_holds_it() -> None:
    ledger = ledger_of(10, 2, 2, 2)
    ledger.want(4, LayerKey(0, 0))
    for client in (0, 1, 2):
        assert ledger.admits(client, extra=4, wanted=True)
        ledger.hold(client, LayerKey(0, 0), 4, wanted=True)
    assert ledger.available == -2
    assert ledger.fits_once
    assert ledger.admits(0, extra=2), "an unplanned layer within the reserve"
    assert not ledger.admits(0, extra=3)
    ledger.awaited = 1
    assert not ledger.admits(0, extra=1, wanted=True)
    assert ledger.admits(0), "what it has"
    ledger.check()


def test_a_reserve_that_grows_needs_room_also_for_a_client_that_holds_as_much() -> None:
    """It may give back what others hold too, and then ask for all of its reserve."""
    ledger = ledger_of(10, 2, 2, 2)
    ledger.want(4, LayerKey(0, 0))
    for client in (0, 1, 2):
        ledger.hold(client, LayerKey(0, 0), 4, wanted=True)
    assert ledger.admits_plan(0, 2, lambda: (99, 99))
    assert not ledger.admits_plan(0, 3)


def test_what_is_held_when_nobody_wants_it_any_more_counts_until_the_last_lets_go() -> None:
    ledger = ledger_of(20, 2, 2)
    ledger.want(4, LayerKey(0, 0))
    for client in (0, 1):
        ledger.hold(client, LayerKey(0, 0), 4, wanted=True)
    ledger.unwant(4, LayerKey(0, 0), held=True)
    assert ledger.wanted == 4
    ledger.let_go(0, LayerKey(0, 0))
    assert ledger.wanted == 4
    ledger.close(1)
    assert (ledger.wanted, ledger.apart) == (0, 2)
    ledger.check()


def test_books_that_contradict_themselves_are_noticed() -> None:
    ledger = ledger_of(10, 4, 6)
    ledger.committed += 1
    with pytest.raises(InvariantBroken, match="booked and found differ"):
        ledger.check()
