from __future__ import annotations

from typing import Any

from tierd_client.holdings import Holdings

LEASE: Any = "a lease"


def test_a_layer_that_nobody_is_in_and_nobody_wants_is_kept() -> None:
    holdings = Holdings()
    held = holdings.add(3, LEASE)
    assert holdings.take_kept() == holdings.take_idle() == []
    held.users -= 1
    assert holdings.want(3)
    assert holdings.take_kept() == []
    holdings.unwant(3)
    assert holdings.take_kept() == [LEASE]
    assert 3 not in holdings


def test_what_is_wanted_is_idle_but_not_kept() -> None:
    holdings = Holdings()
    holdings.add(3, LEASE).users -= 1
    holdings.want(3)
    assert holdings.take_idle() == [LEASE]
    assert not holdings.want(3)
    holdings.unwant(3)


def test_entering_ends_the_wish() -> None:
    holdings = Holdings()
    holdings.add(3, LEASE).users -= 1
    holdings.want(3)
    joined = holdings.join(3)
    assert joined is holdings[3]
    assert (joined.users, joined.wanted, holdings.users) == (1, False, 1)
    assert holdings.join(4) is None
    assert holdings.remove(3) is LEASE
