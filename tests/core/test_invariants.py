"""The checks that simulations run after every event find books in which something was changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.core.by_hand import feed, key, machine_of, tell
from tierd.core.errors import InvariantBroken
from tierd.core.invariants import check_books
from tierd.core.model import Acquire, Pin, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.books import Books
    from tierd.core.residency import Slot


def books_of_a_busy_machine() -> Books:
    """Layer 3 is pinned, client 1 holds layer 0 and waits for layer 5, which is being read."""
    machine = machine_of(3, (1, 1, 1, 1, 1, 1), clients=2)
    feed(machine, Pin(0, 1, (key(3),)), Plan(0, 1, 1, 0, tuple(range(6))))
    feed(machine, Acquire(1, 1, 2, key(0)))
    tell(machine, Acquire(2, 1, 3, key(5), ahead=True))
    return machine.books


def slot_of(books: Books, layer: int) -> Slot:
    slot = books.models[0].slots[layer]
    assert slot is not None
    return slot


def leave_a_lease(books: Books) -> None:
    """Of a slot that is empty."""
    del books.slots[slot_of(books, 0).id]


def lose_a_lease(books: Books) -> None:
    books.clients[1].leases.clear()


def put_two_in_one_place(books: Books) -> None:
    slot_of(books, 0).place = slot_of(books, 3).place


def forget_a_pin(books: Books) -> None:
    slot_of(books, 3).pinned = False


def invent_a_reason(books: Books) -> None:
    books.models[0].reasons[4] += 1


def forget_a_plan(books: Books) -> None:
    del books.models[0].plans[1]


def forget_the_largest_read(books: Books) -> None:
    books.devices[0].largest_in_flight = 0


def count_a_read_twice(books: Books) -> None:
    books.devices[0].in_flight += 1


def hold_more_than_is_charged(books: Books) -> None:
    books.clients[1].leases[77] = slot_of(books, 3)
    slot_of(books, 3).leases += 1


def occupy_what_nobody_has(books: Books) -> None:
    books.memory.occupied += 1


BREAKS: dict[Callable[[Books], None], str] = {
    leave_a_lease: "granules occupied",
    lose_a_lease: "counts 1 leases",
    put_two_in_one_place: "is in two slots",
    forget_a_pin: "is pinned: False",
    invent_a_reason: "is wanted for 2 reasons",
    forget_a_plan: "is wanted for",
    forget_the_largest_read: "no read of 0 bytes is the largest",
    count_a_read_twice: "1 reads of device 0 in flight",
    hold_more_than_is_charged: "charged for other layers",
    occupy_what_nobody_has: "granules occupied",
}


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_a_change_in_the_books_is_found(change: Callable[[Books], None]) -> None:
    books = books_of_a_busy_machine()
    check_books(books)
    change(books)
    with pytest.raises(InvariantBroken, match=BREAKS[change]):
        check_books(books)
