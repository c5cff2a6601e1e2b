"""Where slots run out, before memory does."""

from __future__ import annotations

from functools import partial

import pytest

from tests.core import by_hand
from tests.core.by_hand import G, key, tell
from tierd.core.errors import IllegalEvent
from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Adopted,
    AdoptedSlot,
    ArenaAdded,
    ClientGone,
    ClientJoined,
    CoreConfig,
    Evict,
    HolderGone,
    Later,
    ModelAdded,
    Plan,
    Read,
    ReadDone,
    Refuse,
    Release,
)

machine_of = partial(by_hand.machine_of, reads_in_flight=1, clients=2)


def test_slots_run_out_before_memory_does_and_what_nobody_reads_makes_room() -> None:
    machine = machine_of(8, (1, 1, 1), slot_limit=2)
    for layer in (0, 1):
        tell(machine, Acquire(0, 1, layer, key(layer)), ReadDone(1, layer))
    tell(machine, Release(2, 1, 1))
    assert tell(machine, Acquire(3, 1, 3, key(2))) == [
        Evict(0, 1, key(0)),
        Read(0, 3, key(2), 0, 2 * G, G, "demand"),
    ]


def test_a_lease_beyond_the_slots_is_refused_and_taken_ahead_comes_later() -> None:
    machine = machine_of(8, (1, 1, 1), slot_limit=2)
    tell(machine, Plan(0, 2, 1, 0, (2,)), ReadDone(0, 0))  # reserves a slot
    tell(machine, Acquire(1, 1, 1, key(0)), ReadDone(2, 1))
    assert tell(machine, Acquire(3, 1, 2, key(1), ahead=True)) == [Later(1, 2)]
    (refusal,) = tell(machine, Acquire(4, 1, 3, key(1)))
    assert isinstance(refusal, Refuse)
    assert refusal.code == "lease_limit"
    assert "of 2 slots" in refusal.text
    assert tell(machine, Acquire(5, 2, 2, key(2)))  # within its reserve


def test_a_plan_for_which_no_slot_is_left_is_refused() -> None:
    machine = machine_of(8, (1, 1, 1), slot_limit=1)
    tell(machine, Plan(0, 1, 1, 0, (0,)))
    (refusal,) = tell(machine, Plan(1, 2, 1, 0, (1,)))
    assert isinstance(refusal, Refuse)
    assert refusal.code == "lease_limit"


def test_nothing_is_fetched_ahead_into_a_slot_that_does_not_exist() -> None:
    machine = machine_of(8, (1, 1, 1, 1), slot_limit=2, reads_in_flight=4)
    actions = tell(machine, Plan(0, 1, 1, 0, (0, 1, 2, 3)))
    assert [action.key.layer for action in actions if isinstance(action, Read)] == [0, 1]
    tell(machine, ReadDone(1, 0), ReadDone(1, 1))


def test_small_layers_that_share_granules_with_leases_still_give_up_their_slots() -> None:
    """One slot number is needed, not a whole granule."""
    machine = TierMachine(CoreConfig(8 * G, reads_in_flight=1, slot_limit=2))
    tell(machine, ArenaAdded(0, 0, 64 * G), ModelAdded(0, 0, "m", 0, (4096,) * 3))
    tell(machine, ClientJoined(0, 1))
    for layer in (0, 1):
        tell(machine, Acquire(0, 1, layer, key(layer)), ReadDone(1, layer))
    tell(machine, Release(2, 1, 2))
    actions = tell(machine, Acquire(3, 1, 3, key(2)))
    assert [type(action) for action in actions] == [Evict, Read]


def test_slots_beyond_the_limit_cannot_be_adopted() -> None:
    machine = TierMachine(CoreConfig(8 * G, slot_limit=2))
    machine.handle(ArenaAdded(0, 0, 64 * G))
    with pytest.raises(IllegalEvent, match="the limit is 2 slots"):
        machine.handle(Adopted(0, (AdoptedSlot(2, 0, 0, G, 1, None, (7,)),)))


def test_slots_of_a_dead_client_stay_in_quarantine_until_its_holder_is_gone() -> None:
    machine = machine_of(2, (1, 1, 1), clients=1)
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(0, 0), ClientGone(1, 1, holder=77))
    assert machine.snapshot().memory.quarantined_bytes == G
    assert machine.snapshot().memory.reserved_bytes == 0
    tell(machine, ClientJoined(2, 2), Acquire(2, 2, 1, key(1)), ReadDone(2, 1))
    actions = tell(machine, Acquire(3, 2, 2, key(2)))
    assert [action.code for action in actions if isinstance(action, Refuse)] == ["lease_limit"]
    tell(machine, HolderGone(4, 77))
    actions = tell(machine, Acquire(5, 2, 3, key(2)))
    assert [action.slot for action in actions if isinstance(action, Evict)] == [0]
