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
    ledger.check(over_budget=False)
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
    ledger.check(over_budget=False)


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


def test_books_that_exceed_the_budget_are_noticed() -> None:
    ledger = ledger_of(10, 4, 6)
    ledger.quarantined = 1
    ledger.want(1)
    with pytest.raises(InvariantBroken, match="exceed the budget of 10"):
        ledger.check(over_budget=False)
