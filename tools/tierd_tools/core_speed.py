"""How many events a second the core decides: `python -m tierd_tools.core_speed`.

A crowd of clients on cyclic plans of different speeds runs once under virtual time with one virtual
device; its events are kept and then fed to fresh machines, so that the time taken is that of
`TierMachine.handle` and nothing else. Recording is on, invariants are off.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import heapq
import pstats
import random
import time
from dataclasses import dataclass
from statistics import median

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    ArenaAdded,
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Event,
    Grant,
    Later,
    LayerKey,
    ModelAdded,
    Plan,
    Read,
    ReadDone,
    Refuse,
    Release,
)

GRANULE = 2 << 20


@dataclass(frozen=True, slots=True)
class Crowd:
    """`clients` on `models` of `layers` each, in turn."""

    clients: int = 200
    models: int = 50
    layers: tuple[int, int] = (40, 80)  #: fewest and most of a model
    budget_share: float = 0.375  #: of all models' bytes
    events: int = 100_000
    reads_in_flight: int = 8
    bandwidth: int = 50_000_000_000  #: bytes a second
    seed: int = 0


@dataclass(slots=True)
class _Walker:
    """One client: computes with a layer while it holds the next."""

    model: int
    layers: int
    compute_ns: int
    asked: int = 0  #: layers asked for
    computed: int = 0
    busy: bool = False
    requests: int = 1


class _Recording:
    """The crowd under virtual time; `events` is what it did."""

    def __init__(self, crowd: Crowd) -> None:
        self.events: list[Event] = []
        self._crowd = crowd
        self._rng = rng = random.Random(crowd.seed)
        self._sizes = [
            (rng.randint(10, 40) * GRANULE,) * rng.randint(*crowd.layers)
            for _ in range(crowd.models)
        ]
        budget = int(sum(map(sum, self._sizes)) * crowd.budget_share) // GRANULE * GRANULE
        self.config = CoreConfig(budget, reads_in_flight=crowd.reads_in_flight)
        self._machine = TierMachine(self.config)
        self._heap: list[tuple[int, int, Event | int]] = []
        self._sequence = 0
        self._now = 0
        self._device_ns = 0
        self._walkers: dict[int, _Walker] = {}
        self._leases: dict[tuple[int, int], int] = {}  #: (client, layer) -> lease

    def run(self) -> list[Event]:
        self._feed(ArenaAdded(0, 0, 16 * self.config.budget_bytes, self.config.budget_bytes))
        for model, sizes in enumerate(self._sizes):
            self._feed(ModelAdded(0, model, f"m{model}", 0, sizes))
        for client in range(self._crowd.clients):
            model = client % self._crowd.models
            layers = len(self._sizes[model])
            self._walkers[client] = _Walker(model, layers, int(200_000 * 50 ** self._rng.random()))
            at_ns = self._rng.randrange(10_000_000)
            self._at(at_ns, ClientJoined(at_ns, client))
            self._at(at_ns, Plan(at_ns, client, 1, model, tuple(range(layers))))
        while self._heap and len(self.events) < self._crowd.events:
            self._now, _, what = heapq.heappop(self._heap)
            if isinstance(what, int):
                self._done_computing(what)
            else:
                self._feed(what)
        return self.events

    def _at(self, at_ns: int, what: Event | int) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at_ns, self._sequence, what))

    def _feed(self, event: Event) -> None:
        self.events.append(event)
        for action in self._machine.handle(event):
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, Read):
            self._device_ns = max(self._now, self._device_ns)
            self._device_ns += action.nbytes * 1_000_000_000 // self._crowd.bandwidth
            done = self._device_ns + 80_000
            self._at(done, ReadDone(done, action.slot))
        elif isinstance(action, Discard):
            done = self._now + 200_000
            self._at(done, DiscardDone(done, action.arena, action.offset, action.nbytes))
        elif isinstance(action, Admit):
            self._ask(action.client, ahead=False)
        elif isinstance(action, Grant):
            self._leases[action.client, action.key.layer] = action.lease
            self._compute(action.client)
        elif isinstance(action, (Later, Refuse)):
            raise RuntimeError(f"the crowd is too large for its budget: {action}")

    def _ask(self, client: int, *, ahead: bool) -> None:
        walker = self._walkers[client]
        walker.requests += 1
        key = LayerKey(walker.model, walker.asked % walker.layers)
        walker.asked += 1
        self._at(self._now, Acquire(self._now, client, walker.requests, key, ahead))

    def _compute(self, client: int) -> None:
        walker = self._walkers[client]
        if walker.busy or (client, walker.computed % walker.layers) not in self._leases:
            return
        walker.busy = True
        self._at(self._now + walker.compute_ns, client)
        self._ask(client, ahead=True)

    def _done_computing(self, client: int) -> None:
        walker = self._walkers[client]
        walker.busy = False
        layer = walker.computed % walker.layers
        walker.computed += 1
        self._feed(Release(self._now, client, self._leases.pop((client, layer))))
        self._compute(client)


def recorded(crowd: Crowd) -> tuple[CoreConfig, list[Event]]:
    """What a machine with this configuration saw from this crowd."""
    recording = _Recording(crowd)
    return recording.config, recording.run()


def events_per_second(config: CoreConfig, events: list[Event]) -> float:
    """Of the second half of the events, when the memory is full and all clients run."""
    machine = TierMachine(config)
    half = len(events) // 2
    for event in events[:half]:
        machine.handle(event)
    rest = events[half:]
    handle = machine.handle
    gc.collect()
    began = time.perf_counter()
    for event in rest:
        handle(event)
    return len(rest) / (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tierd_tools.core_speed", description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[200])
    parser.add_argument("--models", type=int, nargs="+", default=[50])
    parser.add_argument("--layers", type=int, nargs="+", default=[60], help="mean of a model")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--budget", type=float, default=0.375, help="share of all models' bytes")
    parser.add_argument("--bandwidth", type=float, default=50.0, help="GB/s of the virtual device")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    args = parser.parse_args()
    for clients in args.clients:
        for models in args.models:
            for layers in args.layers:
                crowd = Crowd(
                    clients, models, (layers * 2 // 3, layers * 4 // 3), args.budget, args.events,
                    bandwidth=int(args.bandwidth * 1e9),
                )  # fmt: skip
                _report(crowd, args.runs, profile=args.profile)
    return 0


def _report(crowd: Crowd, runs: int, *, profile: bool) -> None:
    config, events = recorded(crowd)
    kinds = [type(event).__name__ for event in events]
    mix = ", ".join(f"{kinds.count(k) / len(kinds):.0%} {k}" for k in ("Acquire", "ReadDone"))
    speed = median(events_per_second(config, events) for _ in range(runs))
    print(
        f"{crowd.clients} clients, {crowd.models} models of {crowd.layers[0]}-{crowd.layers[1]} "
        f"layers, {len(events)} events ({mix}): {speed:,.0f} events/s, {1e6 / speed:.1f} us each"
    )
    if profile:
        profiler = cProfile.Profile()
        profiler.runcall(events_per_second, config, events)
        pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    raise SystemExit(main())
