"""What one client on a cycle costs per pass, once the first passes are over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tierd.sim.scenario import Device, Model, Scenario, cycle
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20
LAYER = 8 * MIB
PASSES = 14


def bytes_per_pass(scenario: Scenario) -> float:
    """Bytes read in each of the last passes of the only client."""
    [client] = scenario.clients
    length = len(client.order)
    simulation = Simulation(scenario, check=False)
    simulation.run()
    grants = simulation.read_bytes_at_grant
    assert len(grants) >= length * PASSES
    last, first = grants[length * PASSES - 1], grants[length * (PASSES - 4) - 1]
    return (last - first) / 4


@pytest.mark.parametrize("late", [False, True], ids=["released-at-once", "released-late"])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("reads_in_flight", [1, 2])
def test_a_pass_reads_at_most_three_layers_more_than_do_not_fit(
    lookahead: int, reads_in_flight: int, late: bool
) -> None:
    for layers in (5, 10, 24):
        for capacity in sorted({2, 3, layers // 4, layers // 2, 3 * layers // 4, layers - 1}):
            for compute_ns in (100_000, 4_000_000, 12_000_000):  # a read takes 4 ms
                if capacity < 2:
                    continue
                scenario = cycle(
                    layers,
                    capacity,
                    layer_bytes=LAYER,
                    lookahead=lookahead,
                    compute_ns=compute_ns,
                    releases_late=late,
                    steps=layers * PASSES,
                )
                scenario = replace(scenario, reads_in_flight=reads_in_flight)
                reads = bytes_per_pass(scenario) / LAYER
                assert reads <= layers - capacity + 3, (layers, capacity, compute_ns)


def test_a_model_that_fits_is_read_once() -> None:
    for spare in (0, 1):
        scenario = cycle(6, 6 + spare, layer_bytes=LAYER, steps=6 * PASSES)
        assert bytes_per_pass(scenario) == 0


def model_bytes(decoders: int, decoder: int, embedding: int) -> list[int]:
    """An embedding, decoder layers, a norm of 4 KiB and a head as large as the embedding."""
    return [embedding, *[decoder] * decoders, 4096, embedding]


@pytest.mark.parametrize("compute_ns", [1_000_000, 40_000_000])
@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize(
    ("decoders", "decoder", "embedding"),
    [(16, 50, 130), (22, 48, 64), (12, 40, 40), (8, 24, 6)],
)
def test_embedding_and_head_stay_and_three_decoder_layers_are_the_price(
    decoders: int, decoder: int, embedding: int, share: float, compute_ns: int
) -> None:
    """Wherever it can hold: a layer that passes through needs its own size in moving room."""
    sizes = model_bytes(decoders, decoder * MIB, embedding * MIB)
    budget = int(sum(sizes) * share)
    if budget < 2 * embedding * MIB + 3 * decoder * MIB:
        pytest.skip("embedding and head do not fit beside three decoder layers")
    scenario = one_client(sizes, budget, compute_ns)
    assert bytes_per_pass(scenario) <= sum(sizes) - budget + 3 * decoder * MIB


def test_a_tied_embedding_is_used_twice_and_read_at_most_once_a_pass() -> None:
    sizes = [130 * MIB, *[40 * MIB] * 10]
    budget = sum(sizes) // 2
    scenario = one_client(sizes, budget, 10_000_000, order=[*range(11), 0])
    assert bytes_per_pass(scenario) <= sum(sizes) - budget + 3 * 40 * MIB


def one_client(
    sizes: Sequence[int], budget: int, compute_ns: int, order: Sequence[int] | None = None
) -> Scenario:
    order = order or range(len(sizes))
    client = Profile(0, tuple(order), steps=len(order) * PASSES, compute_ns=compute_ns)
    return Scenario(budget, (Model(0, 0, tuple(sizes)),), (client,))


def test_layers_that_stay_are_spread_so_that_reading_and_computing_overlap() -> None:
    """Reading the missing half takes as long as computing the whole: neither may wait long."""
    layers, capacity = 24, 14
    device = Device(bandwidth=LAYER * 1000, latency_ns=0)  # 1 ms a layer
    scenario = cycle(
        layers,
        capacity,
        layer_bytes=LAYER,
        compute_ns=500_000,
        steps=layers * 40,
    )
    scenario = replace(scenario, device=device)
    summary = Simulation(scenario, check=False).run()
    ideal_seconds = 40 * max(layers * 0.0005, (layers - capacity + 2) * 0.001)
    assert summary.virtual_seconds <= 1.15 * ideal_seconds


@pytest.mark.parametrize("clients", [2, 4])
def test_clients_of_one_model_converge_to_one_pass_over_the_disk(clients: int) -> None:
    layers = 24
    profiles = tuple(
        Profile(
            0, tuple(range(layers)), steps=layers * 12, compute_ns=400_000, start_ns=i * 17_000_000
        )
        for i in range(clients)
    )
    model = Model(0, 0, (LAYER,) * layers)
    one = Scenario(12 * LAYER, (model,), profiles[:1])
    several = replace(one, clients=profiles)
    alone = Simulation(one, check=False).run().reads
    together = Simulation(several, check=False).run().reads
    assert together <= 1.5 * alone


def test_a_silent_client_does_not_take_memory_from_a_busy_one() -> None:
    """Another model's client sleeps: after a while the busy client has the memory to itself."""
    layers, capacity = 10, 8
    model = Model(0, 0, (LAYER,) * layers)
    busy = Profile(0, tuple(range(layers)), steps=layers * PASSES, start_ns=500_000_000)
    sleeper = Profile(1, tuple(range(layers)), sleeps_after=3)
    both = Scenario(capacity * LAYER, (model, replace(model, number=1)), (busy, sleeper))
    simulation = Simulation(both, check=False)
    simulation.run()
    reads = [read for read in simulation.reads if read.key.model == 0]
    sleeping = [read for read in simulation.reads if read.key.model == 1]
    assert len(sleeping) <= capacity + 5
    assert len(reads) <= layers + (PASSES - 1) * (layers - capacity + 4)
