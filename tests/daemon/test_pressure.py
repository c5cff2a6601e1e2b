"""What clients hear of others' wants, and how long they did not heed it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from tierd.pressure import Pressure


def pressure() -> tuple[Pressure, SimpleNamespace]:
    table = SimpleNamespace(pressed=False)
    return Pressure(cast("Any", table), 100), table


def test_clients_hear_it_from_the_table_and_first_of_all_that_nothing_is_known() -> None:
    found, table = pressure()
    assert table.pressed
    found.tell(False, 150)
    assert not table.pressed
    found.tell(True, 200)
    assert table.pressed


def test_it_counts_from_when_it_began_or_the_client_last_gave_something_back() -> None:
    found, _ = pressure()
    found.tell(False, 150)
    found.tell(True, 200)
    found.tell(True, 230)  # it is said often
    assert found.unheeded_ns(since_ns=0, now_ns=260) == 60
    assert found.unheeded_ns(since_ns=250, now_ns=260) == 10


def test_the_last_time_counts_after_its_end_until_the_client_gives_something_back() -> None:
    found, _ = pressure()
    found.tell(False, 150)
    found.tell(True, 200)
    found.tell(False, 240)
    assert found.unheeded_ns(since_ns=0, now_ns=1000) == 40
    assert found.unheeded_ns(since_ns=300, now_ns=1000) == 0
