"""What an operator decides: pin, unpin, evict. Layers are one granule (G) or as a test says."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.core import by_hand
from tests.core.by_hand import G, tell
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    ClientGone,
    Done,
    Event,
    Evict,
    EvictNow,
    Grant,
    LayerKey,
    ModelRemoved,
    Pin,
    Plan,
    Read,
    ReadDone,
    ReadFailed,
    Refuse,
    Release,
    Unpin,
)

if TYPE_CHECKING:
    from tierd.core.machine import TierMachine

machine_of = partial(by_hand.machine_of, reads_in_flight=1, clients=2)


def finish_reads(machine: TierMachine, actions: list[Action], at_ns: int = 1) -> list[Action]:
    """Answers every read, also those that follow from it; returns all actions."""
    found = list(actions)
    reads = [action for action in actions if isinstance(action, Read)]
    while reads:
        more = tell(machine, ReadDone(at_ns, reads.pop(0).slot))
        found += more
        reads += [action for action in more if isinstance(action, Read)]
    return found


def keys(*layers: int, model: int = 0) -> tuple[LayerKey, ...]:
    return tuple(LayerKey(model, layer) for layer in layers)


def states(machine: TierMachine, model: int = 0) -> str:
    """One letter a layer: absent, reading, resident; upper case: pinned."""
    letters = {"absent": "a", "reading": "i", "resident": "r"}
    return "".join(
        letters[layer.state].upper() if layer.pinned else letters[layer.state]
        for layer in machine.snapshot().models[model]
    )


def test_a_pinned_layer_is_read_and_stays_while_a_longer_cycle_passes() -> None:
    machine = machine_of(3, (1,) * 6)
    done = finish_reads(machine, tell(machine, Pin(0, 7, keys(4))))
    assert done[0] == Done(7, keys(4))
    assert states(machine) == "aaaaRa"
    actions = finish_reads(machine, tell(machine, Plan(1, 1, 1, 0, tuple(range(6)))))
    for step in range(18):
        granted = finish_reads(machine, tell(machine, Acquire(2, 1, 10 + step, keys(step % 6)[0])))
        lease = next(a.lease for a in granted if isinstance(a, Grant))
        actions += granted
        actions += finish_reads(machine, tell(machine, Release(3, 1, lease)))
        assert states(machine)[4] == "R"
    assert LayerKey(0, 4) not in [a.key for a in actions if isinstance(a, Evict | Read)]


def test_a_pin_of_a_resident_layer_reads_nothing() -> None:
    machine = machine_of(2, (1, 1))
    finish_reads(machine, tell(machine, Acquire(0, 1, 1, keys(0)[0])))
    assert tell(machine, Pin(2, 1, keys(0))) == [Done(1, keys(0))]
    assert states(machine) == "Ra"


def test_a_pin_that_breaks_the_budget_is_refused_with_both_numbers_and_pins_nothing() -> None:
    machine = machine_of(4, (1, 1, 1, 1), (2, 2))
    tell(machine, Plan(0, 1, 1, 1, (0, 1)))
    refusal = tell(machine, Pin(1, 9, keys(0, 1, 2)))[0]
    assert isinstance(refusal, Refuse)
    assert (refusal.client, refusal.request, refusal.code) == (0, 9, "budget_too_small")
    assert f"need {3 * G} bytes" in refusal.text
    assert f"{2 * G} of the budget of {4 * G}" in refusal.text
    assert "R" not in states(machine)
    assert machine.snapshot().memory.pinned_bytes == 0


def test_a_plan_that_does_not_fit_beside_pins_is_refused() -> None:
    machine = machine_of(4, (1, 1, 1), (2, 2))
    finish_reads(machine, tell(machine, Pin(0, 1, keys(0, 1, 2))))
    refusal = tell(machine, Plan(1, 1, 1, 1, (0, 1)))[0]
    assert isinstance(refusal, Refuse)
    assert refusal.code == "budget_too_small"
    assert f"{3 * G} pinned" in refusal.text
    tell(machine, Unpin(2, 2, keys(0)))
    assert isinstance(tell(machine, Plan(3, 1, 2, 1, (0, 1)))[0], Admit)


def test_pins_count_in_slots_too() -> None:
    machine = machine_of(8, (1, 1, 1), slot_limit=2)
    tell(machine, Plan(0, 1, 1, 0, (0,)))
    refusal = tell(machine, Pin(1, 2, keys(1, 2)))[0]
    assert isinstance(refusal, Refuse)
    assert refusal.code == "lease_limit"
    assert tell(machine, Pin(1, 3, keys(1)))[0] == Done(3, keys(1))


def test_an_unpinned_layer_may_go_again() -> None:
    machine = machine_of(1, (1, 1))
    finish_reads(machine, tell(machine, Pin(0, 1, keys(0))))
    refusal = tell(machine, Acquire(1, 1, 1, keys(1)[0]))[0]
    assert isinstance(refusal, Refuse)
    assert tell(machine, Unpin(2, 2, keys(0, 1))) == [Done(2, keys(0))]
    actions = tell(machine, Acquire(3, 1, 2, keys(1)[0]))
    assert [type(action) for action in actions] == [Evict, Read]


def test_a_stalled_client_is_served_before_layers_that_are_only_pinned() -> None:
    machine = machine_of(8, (1,) * 8)
    actions = tell(machine, Pin(0, 1, keys(0, 1, 2, 3)))
    reads = [action for action in actions if isinstance(action, Read)]
    assert [read.key for read in reads] == list(keys(0))
    tell(machine, Acquire(1, 1, 1, keys(7)[0]))
    following = [a for a in tell(machine, ReadDone(2, reads[0].slot)) if isinstance(a, Read)]
    assert [read.key for read in following] == list(keys(7))


def test_pinned_layers_get_a_share_of_a_device_that_clients_never_leave_idle() -> None:
    machine = machine_of(16, (1,) * 16)
    actions = tell(machine, *(Acquire(0, 1, n, k) for n, k in enumerate(keys(*range(6)), 1)))
    actions += tell(machine, Pin(0, 1, keys(14, 15)))
    order = [a.key.layer for a in finish_reads(machine, actions) if isinstance(a, Read)]
    assert order.index(14) < order.index(2)
    assert order.index(15) < order.index(4)


def test_a_pinned_layer_whose_read_fails_is_tried_again_when_somebody_asks() -> None:
    machine = machine_of(4, (1, 1))
    read = tell(machine, Pin(0, 1, keys(0)))[1]
    assert isinstance(read, Read)
    assert [type(a) for a in tell(machine, ReadFailed(1, read.slot, "read_failed", "EIO"))] == [
        Evict
    ]
    finish_reads(machine, tell(machine, Acquire(2, 1, 1, keys(0)[0])))
    assert states(machine) == "Ra"


def test_evict_empties_what_nobody_holds_and_says_why_the_rest_stays() -> None:
    machine = machine_of(8, (1,) * 5)
    finish_reads(machine, tell(machine, Acquire(0, 1, 1, keys(0)[0])))
    finish_reads(machine, tell(machine, Pin(1, 2, keys(1, 4))))
    granted = finish_reads(machine, tell(machine, Acquire(2, 2, 3, keys(2)[0])))
    lease = next(a.lease for a in granted if isinstance(a, Grant))
    tell(machine, Release(3, 2, lease))
    actions = tell(machine, EvictNow(4, 5, keys(0, 1, 2, 3)))
    done = actions[-1]
    assert isinstance(done, Done)
    assert done.keys == keys(2)
    assert dict(done.kept) == {keys(0)[0]: "a lease is on it", keys(1)[0]: "it is pinned"}
    assert states(machine) == "rRaaR"


@pytest.mark.parametrize("event", [Pin(0, 3, keys(9)), EvictNow(0, 3, keys(0, model=5))])
def test_a_layer_that_does_not_exist_is_refused(event: Event) -> None:
    refusal = tell(machine_of(4, (1, 1)), event)[0]
    assert isinstance(refusal, Refuse)
    assert (refusal.client, refusal.code) == (0, "not_found")


def test_the_pins_of_a_removed_model_are_gone() -> None:
    machine = machine_of(4, (1, 1), (1,))
    finish_reads(machine, tell(machine, Pin(0, 1, keys(0, 1))))
    tell(machine, ModelRemoved(1, 0))
    assert machine.snapshot().memory.pinned_bytes == 0
    assert machine.snapshot().memory.resident_bytes == 0


def test_a_pin_survives_its_users() -> None:
    machine = machine_of(4, (1, 1))
    finish_reads(machine, tell(machine, Acquire(0, 1, 1, keys(0)[0]), Pin(1, 2, keys(0))))
    tell(machine, ClientGone(2, 1))
    assert states(machine) == "Ra"
