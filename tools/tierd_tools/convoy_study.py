"""Convoys under study: the real core, a virtual device, clients that only wait and compute.

    Study(Case("two", (Process(0.2), Process(0.2, start=7)))).run().reads_per_pass()

Deterministic, in virtual time. All layers have one size; a read of one alone takes `READ_NS`.
`convoy_figures` runs the cases of docs/convoys.md and draws them.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    ArenaAdded,
    ClientGone,
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
    Tick,
)

if TYPE_CHECKING:
    from collections.abc import Callable

LAYER = 2 << 20
READ_NS = 10_000_000


@dataclass(frozen=True, slots=True)
class Process:
    """One client. `compute`: of a layer, as a share of a read."""

    compute: float
    model: int = 0
    layers: int = 24  #: of its plan, a cycle over the model's first layers
    start: float = 0.0  #: in read times
    lookahead: int = 1
    jitter: float = 0.1  #: compute varies by this share
    holds: int = 0  #: layers that it keeps leased behind the one it computes with
    pause_at: int | None = None  #: after this many layers
    pause: float = 0.0  #: for so many read times
    leaves_at: float | None = None  #: dies at this time, in read times
    first: int = 0  #: layer that its cycle begins with


def crowd(count: int, compute: tuple[float, float], seed: int) -> tuple[Process, ...]:
    """Clients of one model with random speeds and phases."""
    rng = random.Random(seed)
    return tuple(Process(rng.uniform(*compute), start=rng.uniform(0, 40)) for _ in range(count))


@dataclass(frozen=True, slots=True)
class Case:
    """One situation."""

    name: str
    processes: tuple[Process, ...]
    cache: int = 12  #: layers that the budget holds
    models: int = 1
    layers: int = 24
    reads: int = 1  #: reads_in_flight
    shared: bool = False  #: concurrent reads share the bandwidth; else they queue at the device
    warm: float = 400.0  #: read times before measuring
    measured: float = 600.0  #: read times
    seed: int = 1
    config: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Runner:
    """One process while it runs."""

    process: Process
    number: int
    rng: random.Random
    step: int = 0  #: layers computed
    computing: bool = False
    gone: bool = False
    requests: int = 0
    asked: dict[int, tuple[int, bool]] = field(default_factory=dict)  #: request: (step, ahead)
    leases: dict[int, int] = field(default_factory=dict)  #: step: lease
    at: list[int] = field(default_factory=list)  #: when each layer was done
    stall: list[int] = field(default_factory=list)  #: waited before each layer
    ready_ns: int = 0  #: when it began to wait for the layer that it is at


class Study:
    """Runs one case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.machine = TierMachine(
            CoreConfig(
                case.cache * LAYER,
                granule_bytes=LAYER,
                small_layer_bytes=LAYER,
                reads_in_flight=case.reads,
                **case.config,
            )
        )
        self.now = 0
        self.reads: list[tuple[int, LayerKey]] = []
        rng = random.Random(case.seed)
        self.runners = [
            Runner(process, number, random.Random(rng.random()))
            for number, process in enumerate(case.processes)
        ]
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._reading: dict[int, float] = {}  # slot: work left, in ns of a read alone
        self._worked_ns = 0
        self._wakes_at_ns: int | None = None
        self._device_turn = 0
        self.busy_ns = 0
        self.check = False  #: the core's books after every event

    def run(self) -> Study:
        self._feed(ArenaAdded(0, 0, 16 * self.case.cache * LAYER, self.case.cache * LAYER))
        for model in range(self.case.models):
            self._feed(ModelAdded(0, model, f"m{model}", 0, (LAYER,) * self.case.layers))
        for runner in self.runners:
            start = int(runner.process.start * READ_NS)
            self._at(start, partial(self._start, runner))
            if (leaves := runner.process.leaves_at) is not None:
                self._at(int(leaves * READ_NS), partial(self._leave, runner))
        end = int((self.case.warm + self.case.measured) * READ_NS)
        while self._heap and self._heap[0][0] <= end:
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self.now = end
        return self

    # ------------------------------------------------------------------------------------ figures

    def layers_per_read_time(self, number: int | None = None) -> float:
        """Layers computed by one or all processes in the time of one read."""
        begin = int(self.case.warm * READ_NS)
        runners = self.runners if number is None else [self.runners[number]]
        done = sum(1 for runner in runners for at in runner.at if at > begin)
        return done / self.case.measured

    def reads_per_pass(self) -> float:
        """Reads in the time in which each process makes one pass of its plan, on average."""
        begin = int(self.case.warm * READ_NS)
        reads = sum(1 for at, _ in self.reads if at > begin)
        passes = sum(
            sum(1 for at in runner.at if at > begin) / runner.process.layers
            for runner in self.runners
        ) / len(self.runners)
        return reads / passes if passes else float("inf")

    def stall_per_layer(self, number: int) -> float:
        """In read times."""
        runner = self.runners[number]
        begin = int(self.case.warm * READ_NS)
        stalls = [s for s, at in zip(runner.stall, runner.at, strict=False) if at > begin]
        return sum(stalls) / max(len(stalls), 1) / READ_NS

    # -------------------------------------------------------------------------------------- world

    def _at(self, at_ns: int, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (at_ns, self._sequence, act))

    def _tick(self) -> None:
        self._feed(Tick(self.now))

    def _feed(self, event: Event) -> None:
        actions = self.machine.handle(event)
        if self.check:
            self.machine.check()
        wakes_at_ns = self.machine.wakes_at_ns
        if wakes_at_ns is not None and wakes_at_ns != self._wakes_at_ns:
            self._at(max(wakes_at_ns, self.now), self._tick)
        self._wakes_at_ns = wakes_at_ns
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Read():
                self._work()
                self.reads.append((self.now, action.key))
                self._reading[action.slot] = float(READ_NS)
                self._next_completion()
            case Discard():
                done = DiscardDone(self.now, action.arena, action.offset, action.nbytes)
                self._at(self.now, lambda: self._feed(replace(done, at_ns=self.now)))
            case Grant():
                self._granted(self.runners[action.client], action)
            case Later():
                runner = self.runners[action.client]
                step, _ = runner.asked.pop(action.request)
                if step == runner.step and not runner.computing:
                    self._acquire(runner, step, ahead=False)
            case Admit():
                self._at(self.now, lambda: self._turn(self.runners[action.client]))
            case Refuse():
                runner = self.runners[action.client]
                if action.request not in runner.asked:
                    raise RuntimeError(action.text)
                runner.asked.pop(action.request)
                for step in [step for step in runner.leases if step < runner.step]:
                    self._feed(Release(self.now, runner.number, runner.leases.pop(step)))
                self._at(self.now + READ_NS // 10, lambda: self._turn(runner))
            case _:
                pass

    def _work(self) -> None:
        """Brings the work left of all reads up to now."""
        passed = self.now - self._worked_ns
        self._worked_ns = self.now
        if not self._reading:
            return
        self.busy_ns += passed
        if self.case.shared:
            for slot in self._reading:
                self._reading[slot] -= passed / len(self._reading)
        else:
            self._reading[next(iter(self._reading))] -= passed

    def _next_completion(self) -> None:
        self._device_turn += 1
        if not self._reading:
            return
        turn = self._device_turn
        if self.case.shared:
            left = min(self._reading.values()) * len(self._reading)
        else:
            left = next(iter(self._reading.values()))
        self._at(self.now + max(int(left + 0.999), 0), lambda: self._complete(turn))

    def _complete(self, turn: int) -> None:
        if turn != self._device_turn:
            return
        self._work()
        done = [slot for slot, left in self._reading.items() if left < 1]
        for slot in done:
            del self._reading[slot]
        self._next_completion()
        for slot in done:
            self._feed(ReadDone(self.now, slot))

    # ------------------------------------------------------------------------------------ clients

    def _start(self, runner: Runner) -> None:
        process = runner.process
        self._feed(ClientJoined(self.now, runner.number))
        order = tuple((process.first + i) % process.layers for i in range(process.layers))
        self._feed(
            Plan(self.now, runner.number, 0, process.model, order, lookahead=process.lookahead)
        )

    def _leave(self, runner: Runner) -> None:
        runner.gone = True
        self._feed(ClientGone(self.now, runner.number))

    def _key(self, runner: Runner, step: int) -> LayerKey:
        process = runner.process
        return LayerKey(process.model, (process.first + step) % process.layers)

    def _acquire(self, runner: Runner, step: int, *, ahead: bool) -> None:
        runner.requests += 1
        runner.asked[runner.requests] = (step, ahead)
        self._feed(
            Acquire(self.now, runner.number, runner.requests, self._key(runner, step), ahead)
        )

    def _turn(self, runner: Runner) -> None:
        """The process turns to its next layer."""
        if runner.gone or runner.computing:
            return
        if runner.step in runner.leases:
            self._compute(runner)
        elif not any(step == runner.step for step, _ in runner.asked.values()):
            self._acquire(runner, runner.step, ahead=False)

    def _granted(self, runner: Runner, grant: Grant) -> None:
        step, _ = runner.asked.pop(grant.request)
        runner.leases[step] = grant.lease
        if step == runner.step and not runner.computing:
            self._at(self.now, lambda: self._turn(runner))

    def _compute(self, runner: Runner) -> None:
        process = runner.process
        runner.computing = True
        runner.stall.append(self.now - runner.ready_ns)
        for ahead in range(1, process.lookahead + 1):
            step = runner.step + ahead
            if step not in runner.leases and all(s != step for s, _ in runner.asked.values()):
                self._acquire(runner, step, ahead=True)
        factor = 1 + process.jitter * (2 * runner.rng.random() - 1)
        compute_ns = int(process.compute * READ_NS * factor)
        if runner.step == process.pause_at:
            compute_ns += int(process.pause * READ_NS)
        self._at(self.now + compute_ns, lambda: self._computed(runner))

    def _computed(self, runner: Runner) -> None:
        if runner.gone:
            return
        runner.computing = False
        runner.at.append(self.now)
        runner.ready_ns = self.now
        lease = runner.leases.pop(runner.step - runner.process.holds, None)
        runner.step += 1
        if lease is not None:
            self._feed(Release(self.now, runner.number, lease))
        self._turn(runner)
