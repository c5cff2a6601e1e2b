"""Whose read comes next: deadlines within weighted fair shares of a device."""

from __future__ import annotations

import dataclasses

import pytest

from tierd.core.errors import IllegalEvent
from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Action,
    ArenaAdded,
    ClientJoined,
    CoreConfig,
    Grant,
    LayerKey,
    ModelAdded,
    Read,
    ReadDone,
    Release,
    WeightChanged,
)
from tierd.sim.scenario import Device, Model, Scenario
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile

G = 2 << 20
READ_NS = 1_000_000  #: of a layer of one granule, on the device of the simulations


def machine_of(*weights: int, layers: int = 64, devices: int = 1, reads: int = 1) -> TierMachine:
    """A model and a client of this weight each; models go round over the devices."""
    machine = TierMachine(CoreConfig(1024 * G, reads_in_flight=reads))
    machine.handle(ArenaAdded(0, 0, 4096 * G, 1024 * G))
    for number, weight in enumerate(weights, 1):
        sizes = (G,) * layers
        machine.handle(ModelAdded(0, number, f"m{number}", 0, sizes, number % devices))
        machine.handle(ClientJoined(0, number, weight))
    return machine


def asks_for_all(machine: TierMachine, client: int, layers: int) -> list[Action]:
    return [
        action
        for layer in range(layers)
        for action in machine.handle(Acquire(0, client, layer + 1, LayerKey(client, layer)))
    ]


def served_in_order(machine: TierMachine, actions: list[Action]) -> list[int]:
    """The clients for whom layers are read, with every read done in turn."""
    order: list[int] = []
    reads = [action for action in actions if isinstance(action, Read)]
    while reads:
        read = reads.pop(0)
        order.append(read.key.model)
        more = machine.handle(ReadDone(1, read.slot))
        machine.check()
        reads += [action for action in more if isinstance(action, Read)]
    return order


def test_two_who_ask_for_much_take_turns_whoever_came_first() -> None:
    machine = machine_of(100, 100)
    actions = asks_for_all(machine, 1, 30) + asks_for_all(machine, 2, 10)
    order = served_in_order(machine, actions)
    assert order[:20].count(2) in (9, 10)
    assert order[20:] == [1] * len(order[20:])


def test_a_weight_of_three_times_gets_three_times_the_bytes() -> None:
    machine = machine_of(300, 100)
    order = served_in_order(machine, asks_for_all(machine, 1, 60) + asks_for_all(machine, 2, 60))
    assert order[:40].count(1) in (29, 30, 31)


def test_another_weight_counts_from_then_on_also_for_what_waits() -> None:
    machine = machine_of(100, 100)
    actions = asks_for_all(machine, 1, 60) + asks_for_all(machine, 2, 60)
    machine.handle(WeightChanged(0, 1, 300))
    machine.check()
    assert [client.weight for client in machine.snapshot().clients] == [300, 100]
    assert served_in_order(machine, actions)[:40].count(1) in (29, 30, 31)


def test_a_weight_of_nothing_is_illegal() -> None:
    machine = machine_of(100)
    with pytest.raises(IllegalEvent, match="a weight of 0"):
        machine.handle(WeightChanged(0, 1, 0))
    with pytest.raises(IllegalEvent, match="client 7 is not connected"):
        machine.handle(WeightChanged(0, 7, 100))


def test_who_was_idle_has_saved_nothing_up() -> None:
    machine = machine_of(100, 100)
    alone = served_in_order(machine, asks_for_all(machine, 1, 40))
    assert alone == [1] * 40
    late = [
        action
        for layer in range(40, 60)
        for action in machine.handle(Acquire(2, 1, layer + 1, LayerKey(1, layer)))
    ]
    order = served_in_order(machine, late + asks_for_all(machine, 2, 20))
    assert order[:20].count(2) in (9, 10, 11)


def test_a_read_for_several_is_charged_to_all_of_them_in_equal_parts() -> None:
    machine = machine_of(100, 100, 100)
    for client in (1, 2, 3):
        machine.handle(Acquire(0, client, 1, LayerKey(1, 0)))
    machine.handle(ReadDone(1, 0))
    machine.check()
    read_bytes = [client.read_bytes for client in machine.snapshot().clients]
    assert sum(read_bytes) == G
    assert max(read_bytes) - min(read_bytes) <= 2


def test_reads_that_hang_on_one_device_do_not_hold_up_another() -> None:
    machine = machine_of(100, 100, devices=2)
    asks_for_all(machine, 1, 30)  # nothing of device 1 ever comes back
    order = served_in_order(machine, asks_for_all(machine, 2, 10))
    assert order == [2] * 10


def test_a_small_layer_does_not_wait_for_the_end_of_a_huge_one() -> None:
    machine = TierMachine(CoreConfig(64 * G, reads_in_flight=1))
    machine.handle(ArenaAdded(0, 0, 1024 * G, 64 * G))
    machine.handle(ModelAdded(0, 1, "huge", 0, (16 * G, 16 * G)))
    machine.handle(ModelAdded(0, 2, "small", 0, (G, G)))
    for client in (1, 2):
        machine.handle(ClientJoined(0, client))
    asks_for_all(machine, 1, 2)
    (read,) = asks_for_all(machine, 2, 1)
    assert isinstance(read, Read)
    assert read.key.model == 2
    machine.check()


def _stall_per_layer(scenario: Scenario) -> float:
    """Of the first client."""
    simulation = Simulation(scenario, check=False)
    simulation.run()
    found = simulation.clients[0]
    return found.stall_ns / found.done


@pytest.mark.parametrize(
    ("compute", "reads_in_flight"), [(0.25, 1), (0.25, 2), (0.25, 4), (1.0, 1), (1.0, 2)]
)
def test_a_greedy_client_costs_a_small_one_at_most_half_more_than_half_the_device(
    compute: float, reads_in_flight: int
) -> None:
    small = Profile(0, tuple(range(24)), steps=240, compute_ns=int(compute * READ_NS))
    greedy = Profile(1, tuple(range(48)), steps=4_000, compute_ns=1_000, lookahead=8)
    models = (Model(0, 0, (G,) * 24), Model(1, 0, (G,) * 48))
    device = Device(bandwidth=G * 1_000, latency_ns=0)
    scenario = Scenario(
        12 * G, models, (small, greedy), granule_bytes=G, reads_in_flight=reads_in_flight,
        device=device,
    )  # fmt: skip
    half = dataclasses.replace(device, bandwidth=device.bandwidth // 2)
    alone = dataclasses.replace(scenario, clients=(small,), budget_bytes=6 * G, device=half)
    together_ns = _stall_per_layer(scenario)
    alone_ns = _stall_per_layer(alone)
    assert together_ns <= 1.5 * alone_ns


def test_a_grant_of_a_resident_layer_is_charged_to_nobody() -> None:
    machine = machine_of(100, 100)
    machine.handle(Acquire(0, 1, 1, LayerKey(1, 0)))
    grants = [a for a in machine.handle(ReadDone(1, 0)) if isinstance(a, Grant)]
    machine.handle(Release(2, 1, grants[0].lease))
    machine.handle(Acquire(3, 2, 1, LayerKey(1, 0)))
    assert [client.read_bytes for client in machine.snapshot().clients] == [G, 0]
