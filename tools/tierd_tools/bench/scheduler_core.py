"""Does the scheduler decide fast enough, and does it read as little as knowing the future allows?

Speed is that of `TierMachine.handle` alone, replaying what a crowd did, with recording on and
checks off. Reads are those of the core under a virtual device; what they are compared with (`MIN`,
LRU, LFU: `tierd.sim.reference`, `tierd.sim.replay_policies`) sees the order in which the very same
run used its layers, so both sides serve the same references from the same memory.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from tierd.sim.reference import min_with_bypass
from tierd.sim.replay_policies import whole_layers
from tierd.sim.scenario import Device, Model, Scenario, cycle
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile
from tierd_tools.benchmark import Row
from tierd_tools.core_speed import Crowd, events_per_second, recorded

if TYPE_CHECKING:
    from tierd.core.model import LayerKey

EVENTS_A_SECOND = 50_000.0
ROUNDS = 3
LAYER = 8 << 20
LAYERS = 80
PASSES = 20
MOVING = 2  #: layers that a client computes with and that are read meanwhile


def run() -> list[Row]:
    return [*_speed(), *_growth(), *_cycles(), *_mixed(), *_open()]


# ------------------------------------------------------------------------------------------- speed


def _speed() -> list[Row]:
    crowd = Crowd(events=60_000)
    config, events = recorded(crowd)
    speed = statistics.median(events_per_second(config, events) for _ in range(ROUNDS))
    what = f"core, {crowd.clients} clients, {crowd.models} models, against the bound"
    return [Row(what, speed, EVENTS_A_SECOND, "events/s", at_least=1.0)]


def _growth() -> list[Row]:
    """The cost of an event with four times as much; the bound is the ratio of the logarithms."""
    rows = []
    for what, small, large, numbers in (
        ("layers", _crowd(200, 20), _crowd(200, 80), (20, 80)),
        ("clients", _crowd(50, 60), _crowd(200, 60), (50, 200)),
    ):
        sides = [recorded(crowd) for crowd in (small, large)]
        costs: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            for cost, (config, events) in zip(costs, sides, strict=True):
                cost.append(1e6 / events_per_second(config, events))
        few, many = (statistics.median(cost) for cost in costs)
        log = math.log(numbers[1]) / math.log(numbers[0])
        text = f"cost of an event, {numbers[1]} {what} against {numbers[0]}"
        rows.append(Row(text, many, few, "us", at_most=log))
    return rows


def _crowd(clients: int, layers: int) -> Crowd:
    return Crowd(clients, 50, (layers * 2 // 3, layers * 4 // 3), events=40_000)


# ------------------------------------------------------------------------------------------- reads


class Run:
    """One run of the core: what it read, and the references that it served."""

    def __init__(self, scenario: Scenario) -> None:
        simulation = Simulation(scenario, check=False)
        simulation.run()
        self.order = simulation.granted
        self.nbytes: dict[LayerKey, int] = {
            key: scenario.models[key.model].layer_bytes[key.layer] for key in self.order
        }
        self.asked = sum(self.nbytes[key] for key in self.order)
        self.read = sum(read.nbytes for read in simulation.reads)
        self.budget = scenario.budget_bytes

    @property
    def hit_ratio(self) -> float:
        """The share of the bytes asked for that did not have to be read."""
        return 1 - self.read / self.asked

    def least(self, less: int = 0) -> int:
        """Bytes that MIN with bypass reads, in the same memory less so many bytes."""
        return min_with_bypass(self.order, self.nbytes, self.budget - less).read_bytes

    def whole(self, policy: str) -> int:
        """Bytes that a cache of whole layers reads on demand."""
        return whole_layers(policy, self.order, self.nbytes, self.budget).read_bytes


def _cycles() -> list[Row]:
    rows = []
    for share in (25, 50, 75):
        capacity = LAYERS * share // 100
        run = Run(cycle(LAYERS, capacity, layer_bytes=LAYER, steps=LAYERS * PASSES))
        moving = 1 - run.least(MOVING * LAYER) / run.asked
        bound = 1 - run.least() / run.asked
        lru = 1 - run.whole("lru") / run.asked
        what = f"hit ratio, a cycle of {LAYERS} layers, memory {share} %"
        rows += [
            Row(
                f"{what}, against MIN with bypass beside the layer in use and the one being read",
                run.hit_ratio, moving, "", at_least=0.99,
            ),
            Row(
                f"{what}, against MIN with bypass in all of it", run.hit_ratio, bound, "",
                at_least=0.99,
            ),
            Row(f"{what}, LRU against MIN with bypass", lru, bound, ""),
        ]  # fmt: skip
    return rows


def _mixed() -> list[Row]:
    """Two models, three clients, at different speeds, none of which the disk limits."""
    models = (Model(0, 0, (LAYER,) * LAYERS), Model(1, 0, (LAYER // 2,) * LAYERS))
    rows = []
    for share in (25, 50, 75):
        clients = tuple(
            Profile(
                model, tuple(range(LAYERS)), steps=LAYERS * passes, compute_ns=compute_ns,
                start_ns=start_ns,
            )
            for model, compute_ns, passes, start_ns in (
                (0, 8_000_000, 20, 0), (0, 11_000_000, 15, 90_000_000), (1, 5_000_000, 30, 0),
            )
        )  # fmt: skip
        budget = (LAYER + LAYER // 2) * LAYERS * share // 100
        run = Run(Scenario(budget, models, clients, device=Device(bandwidth=8_000_000_000)))
        what = f"bytes read, two models, three clients, memory {share} %"
        rows += [
            Row(
                f"{what}, against MIN with bypass beside the layers in use and being read",
                run.read / 1e9, run.least(len(clients) * MOVING * LAYER) / 1e9, "GB",
                at_most=1.05,
            ),
            Row(f"{what}, against MIN with bypass", run.read / 1e9, run.least() / 1e9, "GB",
                at_most=1.05),
            Row(f"{what}, LRU against MIN", run.whole("lru") / 1e9, run.least() / 1e9, "GB"),
        ]  # fmt: skip
    return rows


def _open() -> list[Row]:
    """An open plan over 128 experts, some asked for far more often; with hints and without."""
    experts = 128
    model = Model(0, 0, (LAYER,) * experts)
    rows = []
    for hints in (0.0, 0.7):
        client = Profile(
            0, tuple(range(experts)), kind="open", steps=4_000, compute_ns=8_000_000,
            hint_share=hints, lookahead=0,
        )  # fmt: skip
        run = Run(Scenario(32 * LAYER, (model,), (client,)))
        what = f"bytes read, open plan, {'hints' if hints else 'no hints'}"
        rows += [
            Row(f"{what}, against LRU", run.read / 1e9, run.whole("lru") / 1e9, "GB", at_most=1.0),
            Row(f"{what}, against LFU", run.read / 1e9, run.whole("lfu") / 1e9, "GB", at_most=1.0),
            Row(f"{what}, against MIN with bypass", run.read / 1e9, run.least() / 1e9, "GB"),
        ]
    return rows
