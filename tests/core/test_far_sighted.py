"""How close to the best that anybody could read: MIN with bypass, which knows the whole future."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
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
    Plan,
    Read,
    ReadDone,
    Release,
)
from tierd.sim.reference import min_with_bypass
from tierd.sim.replay_policies import whole_layers
from tierd.sim.scenario import Device, Model, Scenario, cycle
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile

if TYPE_CHECKING:
    from tierd.core.model import Action, Event

G = 2 << 20
MIB = 1 << 20
MS = 1_000_000
DISK = Device(bandwidth=2_000_000_000)


@dataclass(slots=True)
class Outcome:
    """What clients asked for, in order, and what was read for it."""

    references: list[LayerKey]
    read_bytes: int
    granted: dict[int, int]  #: by client
    stall_ns: dict[int, int]  #: by client


def outcome(scenario: Scenario) -> Outcome:
    simulation = Simulation(scenario, check=False)
    handle = simulation.machine.handle
    found = Outcome([], 0, {}, {})

    def watched(event: Event) -> list[Action]:
        actions = handle(event)
        for action in actions:
            if isinstance(action, Grant):
                found.references.append(action.key)
                found.granted[action.client] = found.granted.get(action.client, 0) + 1
                stalled = found.stall_ns.get(action.client, 0) + action.waited_ns
                found.stall_ns[action.client] = stalled
            elif isinstance(action, Read):
                found.read_bytes += action.nbytes
        return actions

    simulation.machine.handle = watched  # type: ignore[method-assign]
    simulation.run()
    return found


def sizes(scenario: Scenario) -> dict[LayerKey, int]:
    return {
        LayerKey(model.number, layer): nbytes
        for model in scenario.models
        for layer, nbytes in enumerate(model.layer_bytes)
    }


@pytest.mark.parametrize("compute_ns", [1 * MS, 20 * MS], ids=["disk-bound", "compute-bound"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_one_client_on_a_cycle_reads_two_layers_a_pass_more_than_the_least(
    share: float, compute_ns: int
) -> None:
    """One layer is in use and the next one is on its way: MIN needs no room for either."""
    layers, passes = 48, 20
    scenario = cycle(
        layers, int(layers * share), layer_bytes=20 * MIB, compute_ns=compute_ns,
        steps=layers * passes,
    )  # fmt: skip
    scenario = replace(scenario, device=DISK)
    found = outcome(scenario)
    least = min_with_bypass(found.references, sizes(scenario), scenario.budget_bytes)
    assert found.read_bytes <= least.read_bytes + 2.5 * passes * 20 * MIB
    lru = whole_layers("lru", found.references, sizes(scenario), scenario.budget_bytes)
    assert lru.hits <= layers


@pytest.mark.parametrize("compute_ms", [(2, 5, 11), (12, 30, 25), (40, 100, 60)])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_two_models_and_three_clients_of_different_speeds_read_little_more_than_the_least(
    share: float, compute_ms: tuple[int, int, int]
) -> None:
    first = Model(0, 0, (20 * MIB,) * 80)
    second = Model(1, 0, (14 * MIB,) * 64)
    profiles = tuple(
        Profile(
            model.number, tuple(range(len(model.layer_bytes))), compute_ns=compute * MS,
            start_ns=start * MS, steps=1200,
        )
        for model, compute, start in zip(
            (first, first, second), compute_ms, (0, 37, 71), strict=True
        )
    )  # fmt: skip
    budget = int((80 * 20 + 64 * 14) * share) * MIB
    scenario = Scenario(budget, (first, second), profiles, device=DISK)
    found = outcome(scenario)
    least = min_with_bypass(
        found.references, sizes(scenario), scenario.budget_bytes, in_use_counts=True
    )
    assert found.read_bytes <= 1.12 * least.read_bytes


def test_a_client_that_departs_from_its_plan_costs_itself_and_nobody_else() -> None:
    """It jumps about; another client on another model reads and stalls as beside an honest one."""
    model = Model(0, 0, (20 * MIB,) * 24)
    honest = Profile(0, tuple(range(24)), compute_ns=12 * MS, steps=720)
    other = Profile(1, tuple(range(24)), compute_ns=12 * MS, steps=720, start_ns=5 * MS)
    both = Scenario(24 * 20 * MIB, (model, replace(model, number=1)), (honest, other), device=DISK)
    fair = outcome(both)
    beside = outcome(replace(both, clients=(honest, replace(other, stray_share=1.0))))
    assert beside.stall_ns[1] > 1.5 * fair.stall_ns[1]
    assert beside.stall_ns[0] <= fair.stall_ns[0] + 0.03 * 720 * 12 * MS


# ------------------------------------------------------------------------------------- open plans


class Router:
    """One client of an open plan, fed by hand; reads are done before the next layer is used."""

    def __init__(self, layers: int, room: int) -> None:
        self.machine = TierMachine(CoreConfig(room * G))
        self.machine.handle(ArenaAdded(0, 0, 16 * room * G, room * G))
        self.machine.handle(ModelAdded(0, 0, "moe", 0, (G,) * layers))
        self.machine.handle(ClientJoined(0, 1))
        self.now = 0
        self.reads = 0
        self.stalls = 0
        self.requests = 1
        self.feed(Plan(0, 1, 1, 0, tuple(range(layers)), "open"))

    def feed(self, event: Event) -> list[Action]:
        actions = self.machine.handle(event)
        for action in list(actions):
            if isinstance(action, Read):
                self.reads += 1
                actions = actions + self.feed(ReadDone(self.now, action.slot))
        return actions

    def use(self, layer: int) -> None:
        self.requests += 1
        self.now += MS
        actions = self.feed(Acquire(self.now, 1, self.requests, LayerKey(0, layer)))
        self.stalls += any(isinstance(action, Read) for action in actions)
        lease = next(action.lease for action in actions if isinstance(action, Grant))
        self.feed(Release(self.now, 1, lease))


def routed(seed: int, experts: int = 64, uses: int = 6000, drift: int = 1500) -> list[int]:
    """Experts by a Zipf-like router whose favourites change now and then."""
    rng = random.Random(seed)
    weights = [1 / (rank + 1) ** 0.9 for rank in range(experts)]
    order = list(range(experts))
    result = []
    for use in range(uses):
        if use % drift == 0:
            rng.shuffle(order)
        result.append(order[rng.choices(range(experts), weights)[0]])
    return result


@pytest.mark.parametrize("room", [12, 24, 40])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_open_plan_reads_less_than_lru_and_lfu(seed: int, room: int) -> None:
    uses = routed(seed)
    router = Router(64, room)
    for layer in uses:
        router.use(layer)
    references = [LayerKey(0, layer) for layer in uses]
    nbytes = {LayerKey(0, layer): G for layer in range(64)}
    for policy in ("lru", "lfu"):
        other = whole_layers(policy, references, nbytes, room * G)
        assert router.reads * G < other.read_bytes, policy


@pytest.mark.parametrize("room", [12, 24, 40])
def test_an_open_plan_reads_about_as_much_as_lfu_where_favourites_never_change(room: int) -> None:
    uses = routed(7, drift=6000)
    router = Router(64, room)
    for layer in uses:
        router.use(layer)
    references = [LayerKey(0, layer) for layer in uses]
    best = whole_layers("lfu", references, {LayerKey(0, n): G for n in range(64)}, room * G)
    assert router.reads * G <= 1.02 * best.read_bytes


def test_what_a_hint_announces_is_there_when_it_is_asked_for() -> None:
    uses = routed(5, uses=1500)
    told, silent = Router(64, 16), Router(64, 16)
    for layer, following in pairwise(uses):
        silent.use(layer)
        told.use(layer)
        told.feed(Hint(told.now, 1, 0, (following,), (1_000_000,), 1))
    assert told.stalls == 1
    assert silent.stalls > 300
    assert told.reads <= 1.02 * silent.reads


def test_a_hint_that_is_hardly_ever_true_evicts_nothing_that_is_used() -> None:
    router = Router(8, 4)
    for _ in range(20):
        for layer in range(4):
            router.use(layer)
    before = router.reads
    for layer in range(4, 8):
        router.feed(Hint(router.now, 1, 0, (layer,), (10_000,), 1))
    assert router.reads == before


def test_layers_behind_a_client_that_comes_only_once_give_way_first() -> None:
    router = Router(6, 4)
    router.feed(Plan(1, 1, 99, 0, tuple(range(6)), "once"))
    for layer in range(3):
        router.use(layer)
    states = router.machine.snapshot().models[0]
    assert {3, 4, 5} <= {layer.layer for layer in states if layer.state == "resident"}
    assert router.stalls == 0
