"""Three tiers at scale. After every event what changed is checked, at a cost of what changed:

- each tier's memory as an outsider sees it (`world`): budget, overwrites, evictions, grants, copies
- the sums that admission and placement rest on, of the machines that the event can have reached
- progress: no answer is later than the requests before it and the devices allow (`owed`)
- kept leases: whoever waits for room presses those who keep some, and nothing that was announced is
  put off while nobody is pressed
- above a budget that was lowered there is nothing but what somebody uses

and the full check of every machine and of the stack after every `full_every` events.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tierd.core.model import (
    OPERATOR,
    Acquire,
    Admit,
    ArenaAdded,
    ClientGone,
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Done,
    Evict,
    Grant,
    Hint,
    Later,
    ModelRemoved,
    Plan,
    Read,
    Refuse,
    Release,
    Tick,
)
from tierd.core.plans import LONGEST_STEP_NS
from tierd.core.stack import TierStack
from tierd.core.stack_check import check_sums
from tierd.core.stack_model import (
    Copy,
    CopyDone,
    CopyFailed,
    DirectRead,
    Fenced,
    GpuArenaAdded,
    JoinedGpu,
    ModelPlaced,
    StackAction,
    StackConfig,
    StackEvent,
    StopCopy,
    TierBudgetChanged,
    Unload,
)
from tierd.sim.agenda import Agenda
from tierd.sim.crowd import Crowd
from tierd.sim.devices import Devices
from tierd.sim.errors import BrokenPromise
from tierd.sim.operator import Operator
from tierd.sim.sessions import FromClient, Sessions
from tierd.sim.summaries import FleetSummary
from tierd.sim.world import World

if TYPE_CHECKING:
    from tierd.core.machine import TierMachine
    from tierd.core.model import Event
    from tierd.sim.fleet import Fleet

TICK_NS = 100_000_000
CONVOY_WAIT_NS = 100_000_000
SPAN = 16  #: address space of an arena, in budgets
REST = 100_000  #: events after the last client left: more, and the machines never rest


class FleetSimulation:
    """Runs a fleet. `full_every`: events between two full checks."""

    def __init__(self, fleet: Fleet, *, full_every: int = 1_000) -> None:
        self.fleet = fleet
        self.stack = TierStack(
            StackConfig(
                self._limits(None, fleet.dram_bytes, fleet.reads_in_flight),
                tuple(
                    self._limits(gpu, nbytes, fleet.copies_in_flight)
                    for gpu, nbytes in enumerate(fleet.gpu_bytes)
                ),
                early=fleet.early,
                direct=fleet.direct,
            )
        )
        budgets: dict[int | None, int] = {
            None: fleet.dram_bytes,
            **dict(enumerate(fleet.gpu_bytes)),
        }
        self.worlds: dict[int | None, World] = {
            tier: World(nbytes, fleet.granule_bytes(tier), gpu=tier is not None)
            for tier, nbytes in budgets.items()
        }
        self.events = 0
        self.agenda = Agenda()
        self.sessions = Sessions(self.agenda, self.worlds, lambda tier: self._machine(tier).pressed)
        rng = random.Random(f"run {fleet.seed}")
        self._rng = rng
        self._full_every = full_every
        self._count = dict.fromkeys(("grants", "reads", "read", "copies", "copy", "refusals"), 0)
        self._devices = Devices(
            fleet, rng, self.worlds, self.agenda.time, self.agenda.after, self._feed
        )
        self._operator = Operator(rng, budgets)
        self._crowd = Crowd(
            fleet, rng, self.agenda, self.sessions, self._operator, self._send, self._feed
        )
        self._tick_ns: int | None = None  #: when the next tick comes
        largest = max(nbytes for model in fleet.models for nbytes in model.layer_bytes)
        direct_reads = sum(fleet.direct) * (fleet.copies_in_flight + 1)  # they share the disk
        self._worst_ns = (
            fleet.disk.worst_read_ns(largest) * (1 + direct_reads)
            + fleet.link.worst_read_ns(largest)
            + 2 * fleet.disk.discard_ns
            + 2
        )

    def _limits(self, tier: int | None, budget_bytes: int, in_flight: int) -> CoreConfig:
        granule = self.fleet.granule_bytes(tier)
        return CoreConfig(
            budget_bytes,
            granule_bytes=granule,
            small_layer_bytes=granule,
            reads_in_flight=in_flight,
            convoy_wait_ns=CONVOY_WAIT_NS,
        )

    @property
    def now(self) -> int:
        return self.agenda.now

    # ---------------------------------------------------------------------------------------- run

    def run(self) -> FleetSummary:
        """Everything up to the end, with the promises about the end."""
        self._set_up()
        while self.events < self.fleet.size.events:
            self._step("clients are there, but nothing happens")
        self._crowd.leave()
        self._rest()
        for tier in self.worlds:
            memory = self._machine(tier).snapshot().memory
            if (
                memory.leased_bytes
                or memory.reserved_bytes
                or memory.in_flight_bytes
                or memory.quarantined_bytes
            ):
                raise BrokenPromise(f"all clients are gone, but tier {tier} has {memory}")
            if self.worlds[tier].warm > self.worlds[tier].budget:
                raise BrokenPromise(f"tier {tier} is above its budget, though nobody is there")
        for model in self._crowd.served:
            self._feed(ModelRemoved(self.now, model))
        self._rest()
        for tier, world in self.worlds.items():
            snapshot = self._machine(tier).snapshot()
            if snapshot.memory.resident_bytes or snapshot.models or world.slots:
                raise BrokenPromise(f"all models are gone, but tier {tier}: {snapshot.memory}")
        return self.summary()

    def summary(self) -> FleetSummary:
        count, crowd, devices = self._count, self._crowd, self._devices
        present = self.sessions.clients.values()
        return FleetSummary(
            seed=self.fleet.seed,
            events=self.events,
            virtual_seconds=self.now / 1e9,
            clients=crowd.came,
            layers=crowd.layers + sum(client.done for client in present),
            grants=count["grants"],
            reads=count["reads"],
            read_bytes=count["read"],
            copies=count["copies"],
            copy_bytes=count["copy"],
            early=devices.early,
            stopped=devices.stopped,
            direct=devices.direct,
            refusals=count["refusals"],
            failures=devices.failures,
            models=crowd.models,
            budgets=self._operator.changed,
            kept=crowd.given_back + sum(client.given_back for client in present),
            stall_seconds=(crowd.stall_ns + sum(client.stall_ns for client in present)) / 1e9,
        )

    def _set_up(self) -> None:
        fleet = self.fleet
        self._feed(ArenaAdded(0, 0, SPAN * fleet.dram_bytes, fleet.dram_bytes))
        for gpu, nbytes in enumerate(fleet.gpu_bytes):
            self._feed(GpuArenaAdded(0, gpu, 1 + gpu, SPAN * nbytes, nbytes))
        self._crowd.begin()

    def _step(self, otherwise: str) -> None:
        if not self.agenda:
            requests = self.sessions.owed.requests
            raise BrokenPromise(f"{otherwise}; {requests} requests are open")
        self.agenda.step()

    def _rest(self) -> None:
        limit = self.events + REST
        while self.agenda:
            self.agenda.step()
            if self.events > limit:
                raise BrokenPromise(f"{REST} events after the last client left: it never rests")
        self.stack.check()
        owed = self.sessions.owed
        if owed or self._devices:
            raise BrokenPromise(f"nothing happens any more, but requests are open: {owed}")

    # ----------------------------------------------------------------------------- events, actions

    def _send(self, event: Event) -> None:
        """From a client: it arrives at the same time, but not inside an answer."""
        self.agenda.after(0, lambda: self._arrive(event))

    def _arrive(self, event: Event) -> None:
        assert isinstance(event, FromClient)
        if not self.sessions.takes(event, self._bound):
            return
        if isinstance(event, ClientJoined):
            gpu = self._crowd.tier[event.client]
            if gpu is not None:
                self._feed(JoinedGpu(event.at_ns, event.client, gpu, event.weight))
                return
        self._feed(event)

    def _feed(self, event: StackEvent) -> None:
        tiers = {None, self._tier_reached(event)}
        self._note(event)
        self.events += 1
        for action in self.stack.handle(event):
            self._act(action)
        for tier in tiers:
            self._check_tier(tier)
        if self.events % self._full_every == 0:
            self.stack.check()
        self.sessions.owed.check(self.now)
        self.sessions.press()
        if self.stack.waits_for_time:
            wakes_at_ns = self.stack.wakes_at_ns or self.now + TICK_NS
            at_ns = max(min(wakes_at_ns, self.now + TICK_NS), self.now)
            if self._tick_ns is None or at_ns < self._tick_ns:
                self._tick_ns = at_ns
                self.agenda.at(at_ns, lambda: self._tick(at_ns))

    def _tier_reached(self, event: StackEvent) -> int | None:
        match event:
            case Acquire() | Release() | Plan() | Hint() | ClientJoined() | ClientGone():
                return self._crowd.tier.get(event.client)
            case CopyDone() | CopyFailed() | JoinedGpu() | GpuArenaAdded() | ModelPlaced():
                return event.gpu
            case TierBudgetChanged():
                return event.gpu
            case _:
                return None

    def _note(self, event: StackEvent) -> None:
        """What the event means for the tiers' memory."""
        match event:
            case Release():
                self.worlds[self._crowd.tier[event.client]].release(event.lease)
            case ClientGone():
                leases = self.sessions.gone(event.client)
                tier = self._crowd.gone(event.client)
                for lease in leases:
                    if tier is None:
                        self.worlds[None].release(lease)
                    else:
                        self.worlds[tier].fence(lease, event.client)
            case Fenced():
                self.worlds[self._crowd.fencing.pop(event.client)].holder_gone(event.client)
            case ArenaAdded():
                self.worlds[None].arena_added(event)
            case GpuArenaAdded():
                self.worlds[event.gpu].arena_added(event)
            case _:
                pass

    def _act(self, action: StackAction) -> None:
        match action:
            case Read():
                self.worlds[None].read(action)
                self._count["reads"] += 1
                self._count["read"] += action.nbytes
                self._devices.read(action)
            case Copy():
                self.worlds[action.gpu].read(action)
                self._count["copies"] += 1
                self._count["copy"] += action.nbytes
                self._devices.copy(action)
            case DirectRead():
                self.worlds[action.gpu].read(action)
                self._devices.direct_read(action)
            case StopCopy():
                self._devices.stop(action)
            case Evict():
                self.worlds[None].evict(action)
            case Unload():
                self.worlds[action.gpu].evict(action)
            case Discard():
                tier = None if action.arena == 0 else action.arena - 1
                self.worlds[tier].discard(action)
                delay = self._rng.randint(0, self.fleet.disk.discard_ns)
                self.agenda.after(delay, lambda: self._discarded(tier, action))
            case Grant():
                self.worlds[self._crowd.tier[action.client]].grant(action)
                self._count["grants"] += 1
                self.sessions.answer(action)
            case Later() | Admit():
                self.sessions.answer(action)
            case Done():
                command = self._operator.answered(action)
                if isinstance(command, TierBudgetChanged):
                    self.worlds[command.gpu].set_budget(command.budget_bytes)
            case Refuse() if action.client == OPERATOR:
                self._operator.answered(action)
            case Refuse():
                self._count["refusals"] += 1
                self.sessions.answer(action)

    # -------------------------------------------------------------------------------------- devices

    def _discarded(self, tier: int | None, action: Discard) -> None:
        self.worlds[tier].discard_done(action.arena, action.offset, action.nbytes)
        self._feed(DiscardDone(self.now, action.arena, action.offset, action.nbytes))

    def _tick(self, at_ns: int) -> None:
        if at_ns == self._tick_ns:  # else an earlier one took its place
            self._tick_ns = None
            self._feed(Tick(self.now))

    # ------------------------------------------------------------------------------------- progress

    def _bound(self, event: Plan | Acquire) -> int:
        """When this request must have its answer: after all that may go before it, on both ways."""
        patience_ns = self.stack.dram.config.admission_patience_ns + TICK_NS
        if isinstance(event, Plan):
            return self.now + 2 * patience_ns + self._worst_ns
        waits = 2 * self.sessions.owed.requests + 2 * len(self.sessions.leases)
        waits += len(self.stack.exchange.feeds) + self.fleet.reads_in_flight + 2
        waits += 2 * LONGEST_STEP_NS // self._worst_ns
        put_off = 2 * LONGEST_STEP_NS + 2 * CONVOY_WAIT_NS + patience_ns
        return self.now + put_off + waits * self._worst_ns

    def _check_tier(self, tier: int | None) -> None:
        books = self._machine(tier).books
        check_sums(books)
        memory = books.memory
        coming = promised = 0
        if memory.shrinking:
            coming = sum(slot.place.range.granules for slot in books.in_flight.values())
            ledger = books.ledger
            promised = ledger.committed + ledger.quarantined + ledger.pinned
        pinned = self._operator.pinned if tier is None else ()
        self.worlds[tier].settled(coming, promised, pinned, shrinking=memory.shrinking)

    def _machine(self, tier: int | None) -> TierMachine:
        return self.stack.dram if tier is None else self.stack.gpus[tier]
