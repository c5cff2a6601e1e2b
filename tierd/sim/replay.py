"""A recorded day against another budget, bandwidth or policy: hits, bytes, stall.

The clients ask for the same layers in the same order, compute as long and pause as long as they
did; what they wait for is what this run makes of it. `next-use` is the core itself, `lru`, `lfu`,
`mru` and `pin-first-n` are `replay_policies`, `min` is the bound: MIN with bypass over the order in
which the layers were used in the run of the core, and the least stall that reading so many bytes
can mean. Memory is empty at the begin.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Adopted,
    ArenaAdded,
    BudgetChanged,
    ClientGone,
    ClientJoined,
    Discard,
    DiscardDone,
    Grant,
    Hint,
    HolderGone,
    ModelRemoved,
    Plan,
    PlanOver,
    Read,
    ReadDone,
    ReadFailed,
    Release,
    Tick,
    WeightChanged,
)
from tierd.sim.agenda import Agenda
from tierd.sim.errors import BadRecording
from tierd.sim.reference import min_with_bypass
from tierd.sim.replay_client import ReplayClient
from tierd.sim.replay_policies import DEMAND_POLICIES, DemandMachine
from tierd.sim.workload import clients_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tierd.core.model import Action, Event, LayerKey
    from tierd.sim.recording import Recording

POLICIES = ("next-use", *DEMAND_POLICIES, "min")
SPAN_BUDGETS = 64  #: address space of every arena, in budgets
TICK_NS = 1_000_000_000
DISCARD_NS = 200_000
#: Made again by the run, or left out: what an earlier daemon left behind is not there, and a run
#: has one budget.
_REMADE = (
    *(Acquire, Release, Plan, PlanOver, Hint, ClientJoined, ClientGone),
    *(ReadDone, ReadFailed, DiscardDone, Adopted, HolderGone, Tick, BudgetChanged, WeightChanged),
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a policy made of the day. Times in nanoseconds, of all clients together."""

    policy: str
    budget_bytes: int
    bandwidth: int  #: bytes a second
    uses: int
    in_time: int | None  #: uses for which nobody waited; None where time is not simulated
    asked_bytes: int
    read_bytes: int
    stall_ns: int  #: of "min": at least
    compute_ns: int
    elapsed_ns: int
    refused: tuple[str, ...] = ()  #: clients that this budget does not admit, and why

    @property
    def hit_ratio(self) -> float:
        """The share of the bytes asked for that did not have to be read."""
        return 1 - self.read_bytes / self.asked_bytes if self.asked_bytes else 0.0


class Machine(Protocol):
    """What a replay drives."""

    @property
    def waits_for_time(self) -> bool: ...

    @property
    def wakes_at_ns(self) -> int | None: ...

    def handle(self, event: Event) -> list[Action]: ...


def replay(
    recording: Recording,
    policies: Sequence[str],
    *,
    budget_bytes: int | None = None,
    bandwidth: int | None = None,
) -> list[Figures]:
    """A row for each policy. Defaults: the last recorded budget, the bandwidth of the recorded
    reads.

    Raises BadRecording without a use of a layer, or without reads and no bandwidth given.
    """
    budget = recording.budget_bytes if budget_bytes is None else budget_bytes
    rate = recording.bandwidth() if bandwidth is None else bandwidth
    if rate is None:
        raise BadRecording("the recording has no finished read: its bandwidth must be given")
    runs: dict[str, Replay] = {}

    def run(policy: str) -> Replay:
        if policy not in runs:
            runs[policy] = Replay(recording, policy, budget, rate)
            runs[policy].run()
        return runs[policy]

    return [
        _bound(run("next-use")) if policy == "min" else run(policy).figures() for policy in policies
    ]


class Replay:
    """One run. The device transfers one byte after the other."""

    def __init__(self, recording: Recording, policy: str, budget: int, bandwidth: int) -> None:
        config = dataclasses.replace(recording.config, budget_bytes=budget)
        self.policy = policy
        self.budget = budget
        self.bandwidth = bandwidth
        self.order: list[LayerKey] = []  #: as used
        self.nbytes: dict[LayerKey, int] = {}
        self.read_bytes = 0
        self._machine: Machine = (
            TierMachine(dataclasses.replace(config, story_length=1_000))
            if policy == "next-use"
            else DemandMachine(config, policy)
        )
        self._recording = recording
        self._agenda = Agenda()
        self._device_free_ns = 0
        self._ticking = False
        self._wakes_at_ns: int | None = None
        self.clients: dict[int, ReplayClient] = {}

    @property
    def now(self) -> int:
        return self._agenda.now

    def run(self) -> None:
        """Everything to the end. Raises BadRecording when it does not come to one."""
        recording = self._recording
        begin_ns = recording.begin_ns
        for event in recording.opening:
            self._outside(event)
        for moment in recording.moments:
            if not isinstance(moment.event, _REMADE):
                self._agenda.at(moment.at_ns - begin_ns, self._sender(moment.event))
        recorded = clients_of(recording)
        if not recorded:
            raise BadRecording("the recording has no client that used a layer: nothing to replay")
        for number, client in enumerate(recorded, start=1):
            live = self.clients[number] = ReplayClient(
                number, client, self.send, self._agenda.at, self._agenda.time, self._used
            )
            self._agenda.at(max(client.joined_ns - begin_ns, 0), live.join)
        while self._agenda:
            self._agenda.step()
        stuck = [client.number for client in self.clients.values() if not client.over]
        if stuck:
            raise BadRecording(f"{self.policy}: clients {stuck} wait for layers for ever")

    def figures(self) -> Figures:
        clients = self.clients.values()
        return Figures(
            self.policy,
            self.budget,
            self.bandwidth,
            len(self.order),
            sum(client.in_time for client in clients),
            sum(self.nbytes[key] for key in self.order),
            self.read_bytes,
            sum(client.stall_ns for client in clients),
            sum(client.compute_ns for client in clients),
            max(client.ended_ns for client in clients),
            tuple(f"client {c.recorded.client}: {c.refused}" for c in clients if c.refused),
        )

    def send(self, event: Event) -> None:
        """The event reaches the machine; what follows from it happens."""
        for action in self._machine.handle(event):
            self._act(action)
        wakes_at_ns = self._machine.wakes_at_ns
        if wakes_at_ns is not None and wakes_at_ns != self._wakes_at_ns:
            self._agenda.at(max(wakes_at_ns, self.now), lambda: self.send(Tick(self.now)))
        self._wakes_at_ns = wakes_at_ns
        if self._machine.waits_for_time and not self._ticking:
            self._ticking = True
            self._agenda.at(self.now + TICK_NS, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        self.send(Tick(self.now))

    def _outside(self, event: Event) -> None:
        if not isinstance(event, _REMADE):
            self._sender(event)()

    def _sender(self, event: Event) -> Callable[[], None]:
        """Sends an operator's or a pack's event, at the time of this run."""

        def send() -> None:
            moved = dataclasses.replace(event, at_ns=self.now)
            if isinstance(moved, ArenaAdded):
                span = max(moved.span_bytes, SPAN_BUDGETS * self.budget)
                moved = dataclasses.replace(moved, span_bytes=span, warm_bytes=0)
            if isinstance(moved, ModelRemoved) and any(
                client.needs(moved.model) for client in self.clients.values()
            ):
                # It went when its clients were through; these are slower.
                self._agenda.at(self.now + TICK_NS, send)
            else:
                self.send(moved)

        return send

    def _used(self, key: LayerKey) -> None:
        self.order.append(key)

    def _act(self, action: Action) -> None:
        match action:
            case Read():
                self.read_bytes += action.nbytes
                begin_ns = max(self.now, self._device_free_ns)
                self._device_free_ns = begin_ns + action.nbytes * 1_000_000_000 // self.bandwidth
                slot = action.slot
                self._agenda.at(self._device_free_ns, lambda: self.send(ReadDone(self.now, slot)))
            case Discard():
                where = (action.arena, action.offset, action.nbytes)
                self._agenda.at(
                    self.now + DISCARD_NS, lambda: self.send(DiscardDone(self.now, *where))
                )
            case Grant():
                self.nbytes[action.key] = action.nbytes
                self.clients[action.client].granted(action)
            case _:
                client = self.clients.get(getattr(action, "client", 0))
                if client is not None:
                    client.answered(action)


def _bound(run: Replay) -> Figures:
    """The least that this order of uses can cost.

    Whoever gets the last byte has waited for the device at least as long as reading takes longer
    than it had to begin, pause and compute.
    """
    least = min_with_bypass(run.order, run.nbytes, run.budget)
    reading_ns = least.read_bytes * 1_000_000_000 // run.bandwidth
    own_ns = [client.own_ns() for client in run.clients.values()]
    return dataclasses.replace(
        run.figures(),
        policy="min",
        in_time=None,
        read_bytes=least.read_bytes,
        stall_ns=max(reading_ns - max(own_ns), 0),
        elapsed_ns=max(reading_ns, *own_ns),
    )
