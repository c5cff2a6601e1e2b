"""Slots of an earlier daemon: adopted, kept while somebody reads them, or refused."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.core import by_hand
from tests.core.by_hand import G, key, tell
from tierd.core.errors import IllegalEvent
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    Adopted,
    AdoptedSlot,
    ClientJoined,
    Discard,
    Evict,
    Grant,
    HolderGone,
    Plan,
    Read,
    ReadDone,
    Refuse,
    Release,
    Tick,
)

if TYPE_CHECKING:
    from tierd.core.machine import TierMachine

machine_of = partial(by_hand.machine_of, reads_in_flight=1, clients=2)


def adopted_machine(*slots: AdoptedSlot, budget: int = 4) -> tuple[TierMachine, list[Action]]:
    machine = machine_of(budget, (1, 1, 1), warm=0, clients=0)
    actions = tell(machine, Adopted(0, slots))
    tell(machine, ClientJoined(1, 1))
    return machine, actions


def test_what_was_resident_is_granted_without_a_read() -> None:
    machine, actions = adopted_machine(AdoptedSlot(5, 0, G, G, 40, key(2), ()))
    assert actions == []
    assert tell(machine, Acquire(2, 1, 1, key(2))) == [
        Grant(1, 1, 1, key(2), 5, 40, 0, G, G, waited_ns=0),
    ]


def test_a_read_that_was_half_done_is_only_warm_memory() -> None:
    machine, actions = adopted_machine(AdoptedSlot(3, 0, 2 * G, G, 40, None, ()))
    assert actions == [Evict(3, 40, None)]
    assert machine.snapshot().memory.used_bytes == G
    [read] = tell(machine, Acquire(2, 1, 1, key(0)))
    assert isinstance(read, Read)
    assert (read.offset, read.generation) == (2 * G, 41)


def test_a_quarantined_slot_is_not_overwritten_before_its_last_holder_is_gone() -> None:
    slot = AdoptedSlot(0, 0, 0, 3 * G, 9, None, (77, 78))
    machine, actions = adopted_machine(slot)
    assert actions == []
    assert machine.snapshot().memory.quarantined_bytes == 3 * G
    tell(machine, Plan(2, 1, 1, 0, (0, 1, 2)), ReadDone(3, 1))
    assert machine.snapshot().counters.reads == 1
    assert tell(machine, HolderGone(4, 77)) == []
    actions = tell(machine, HolderGone(5, 78))
    assert actions[0] == Evict(0, 9, None)
    assert isinstance(actions[1], Read)


def test_a_quarantined_layer_can_be_granted_meanwhile_and_stays_afterwards() -> None:
    machine, _ = adopted_machine(AdoptedSlot(0, 0, 0, G, 9, key(0), (77,)))
    [grant] = tell(machine, Acquire(2, 1, 1, key(0)))
    assert isinstance(grant, Grant)
    assert tell(machine, HolderGone(3, 77), Release(4, 1, 1)) == []
    assert machine.snapshot().models[0][0].state == "resident"


def test_quarantine_counts_against_admission() -> None:
    machine, _ = adopted_machine(AdoptedSlot(0, 0, 0, 4 * G, 9, None, (77,)))
    assert tell(machine, Plan(1, 1, 1, 0, (0,))) == []
    [refusal] = tell(machine, Tick(1 + machine.config.admission_patience_ns))
    assert isinstance(refusal, Refuse)
    assert f"{4 * G} bytes in quarantine" in refusal.text
    tell(machine, Plan(3_000_000_000, 1, 2, 0, (0,)))
    assert Admit(1, 2, G) in tell(machine, HolderGone(3_000_000_001, 77))


def test_a_smaller_budget_after_a_restart_sheds_what_nobody_holds() -> None:
    slots = [AdoptedSlot(i, 0, i * G, G, i + 1, key(i), ()) for i in range(3)]
    _, actions = adopted_machine(*slots, budget=1)
    assert [type(action) for action in actions] == [Evict, Evict, Discard]


def test_a_holder_that_nobody_knows_changes_nothing() -> None:
    machine, _ = adopted_machine()
    assert tell(machine, HolderGone(1, 12345)) == []


@pytest.mark.parametrize(
    "slots",
    [
        (AdoptedSlot(0, 7, 0, G, 1, None, ()),),
        (AdoptedSlot(0, 0, 0, G, 1, None, ()), AdoptedSlot(0, 0, G, G, 2, None, ())),
        (AdoptedSlot(0, 0, 0, 2 * G, 1, None, ()), AdoptedSlot(1, 0, G, G, 2, None, ())),
        (AdoptedSlot(0, 0, 0, 4096, 1, None, ()), AdoptedSlot(1, 0, 4096, G, 2, None, ())),
        (AdoptedSlot(0, 0, 5000 * G, G, 1, None, ()),),
    ],
    ids=["arena", "number", "overlap", "granule", "span"],
)
def test_slots_that_contradict_each_other_are_not_adopted(slots: tuple[AdoptedSlot, ...]) -> None:
    machine = machine_of(3, (1,), warm=0, clients=0)
    with pytest.raises(IllegalEvent):
        machine.handle(Adopted(0, slots))
    machine.check()
    assert machine.snapshot().memory.used_bytes == 0
