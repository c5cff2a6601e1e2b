"""Where a layer is, who has it and who needs it next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    ArenaAdded,
    ClientJoined,
    CoreConfig,
    Grant,
    Hint,
    LayerKey,
    ModelAdded,
    Pin,
    Plan,
    Read,
    ReadDone,
    ReadFailed,
    Unpin,
)

if TYPE_CHECKING:
    from tierd.core.whereabouts import Whereabouts

LAYER = 2 << 20


@pytest.fixture
def machine() -> TierMachine:
    machine = TierMachine(CoreConfig(4 * LAYER))
    machine.handle(ArenaAdded(0, 0, 64 * LAYER, 4 * LAYER))
    machine.handle(ModelAdded(0, 7, "m", 0, (LAYER,) * 8))
    for client in (5, 6):
        machine.handle(ClientJoined(0, client))
    return machine


def where(machine: TierMachine, layer: int, now_ns: int = 10) -> Whereabouts:
    found = machine.whereabouts(LayerKey(7, layer), now_ns)
    assert found is not None
    return found


def test_a_layer_that_nobody_asked_for_is_absent_and_has_no_story(machine: TierMachine) -> None:
    found = where(machine, 3)
    assert (found.state, found.nbytes, found.story, found.next_use) == ("absent", LAYER, (), None)
    assert machine.whereabouts(LayerKey(7, 8), 10) is None
    assert machine.whereabouts(LayerKey(8, 0), 10) is None


def test_a_demanded_read_names_who_waits_and_a_lease_who_has_it(machine: TierMachine) -> None:
    reads = machine.handle(Acquire(1, 5, 1, LayerKey(7, 0)))
    machine.handle(Acquire(2, 6, 1, LayerKey(7, 0)))
    found = where(machine, 0)
    assert (found.state, found.demanded, found.waiting) == ("reading", True, (5, 6))
    grants = machine.handle(ReadDone(3, next(r.slot for r in reads if isinstance(r, Read))))
    assert sum(isinstance(action, Grant) for action in grants) == 2
    found = where(machine, 0)
    assert (found.state, found.leased_by, found.waiting) == ("resident", (5, 6), ())
    assert [decision.what for decision in found.story] == [
        *("wait", "read", "wait", "resident", "grant", "grant")
    ]


def test_the_next_use_is_that_of_the_client_who_comes_first(machine: TierMachine) -> None:
    machine.handle(Plan(0, 5, 1, 7, (0, 1, 2, 3)))
    machine.handle(Plan(0, 6, 1, 7, (3, 2, 1, 0)))
    found = where(machine, 3, now_ns=0)
    assert found.planned_by == (5, 6)
    assert found.next_use is not None
    assert (found.next_use.client, found.next_use.steps) == (6, 1)
    assert found.next_use.in_ns > 0
    later = where(machine, 3, now_ns=found.next_use.in_ns + 1)
    assert later.next_use is not None
    assert later.next_use.in_ns == 0


def test_a_hint_of_an_open_plan_is_a_use_with_a_probability(machine: TierMachine) -> None:
    machine.handle(Plan(0, 5, 1, 7, tuple(range(8)), "open"))
    assert where(machine, 4).next_use is None
    machine.handle(Hint(1, 5, 7, (4, 5), (900_000, 100_000), 2))
    need = where(machine, 4).next_use
    assert need is not None
    assert (need.client, need.steps, need.probability_ppm) == (5, 2, 900_000)


def test_a_pin_is_known(machine: TierMachine) -> None:
    assert not where(machine, 2).pinned
    machine.handle(Pin(1, 1, (LayerKey(7, 2),)))
    assert where(machine, 2).pinned
    machine.handle(Unpin(2, 2, (LayerKey(7, 2),)))
    assert not where(machine, 2).pinned


def test_a_failed_read_is_known_until_somebody_asks_again(machine: TierMachine) -> None:
    reads = machine.handle(Acquire(1, 5, 1, LayerKey(7, 0)))
    slot = next(read.slot for read in reads if isinstance(read, Read))
    machine.handle(ReadFailed(2, slot, "read_failed", "EIO"))
    found = where(machine, 0)
    assert (found.state, found.failed) == ("absent", True)
    assert "EIO" in found.story[-2].text + found.story[-1].text + found.story[-3].text
