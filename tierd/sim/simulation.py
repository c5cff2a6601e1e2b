"""One machine under one scenario. After every event the machine's invariants, the world's and
*progress* hold: every request is answered within a time that follows from the requests before it
and the device."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tierd.core.machine import TierMachine
from tierd.core.model import (
    OPERATOR,
    Acquire,
    Action,
    Admit,
    Adopted,
    ArenaAdded,
    BudgetChanged,
    ClientGone,
    CoreConfig,
    Discard,
    DiscardDone,
    Done,
    Event,
    Evict,
    Grant,
    HolderGone,
    Later,
    ModelAdded,
    ModelRemoved,
    Plan,
    Read,
    ReadDone,
    ReadFailed,
    Refuse,
    Release,
    Tick,
)
from tierd.core.plans import LONGEST_STEP_NS
from tierd.sim.agenda import Agenda
from tierd.sim.errors import BrokenPromise
from tierd.sim.sessions import FromClient, Sessions
from tierd.sim.summaries import Summary
from tierd.sim.virtual_client import VirtualClient
from tierd.sim.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.model import LayerKey
    from tierd.sim.scenario import Scenario

CONVOY_WAIT_NS = 100_000_000
COMMANDS = 1_000_000  #: numbers of an operator's requests start here, apart from those of client 0
EVENTS_A_STEP = 200  #: more events than this per layer computed: the machine never becomes quiet


class Simulation:
    """Runs one scenario. `check`: the machine's full check after every event."""

    def __init__(self, scenario: Scenario, *, check: bool = True) -> None:
        self.scenario = scenario
        generations = [slot.generation for slot in scenario.adopted]
        self.machine = TierMachine(
            CoreConfig(
                budget_bytes=scenario.budget_bytes,
                granule_bytes=scenario.granule_bytes,
                small_layer_bytes=scenario.granule_bytes,
                reads_in_flight=scenario.reads_in_flight,
                slot_limit=scenario.slot_limit,
                convoy_wait_ns=CONVOY_WAIT_NS,
                story_length=2_000,
                first_generation=max(generations, default=0) + 1,
            )
        )
        self.world = World(scenario.budget_bytes, scenario.granule_bytes)
        self.agenda = Agenda()
        self.sessions = Sessions(
            self.agenda,
            (None,),
            lambda _: self.machine.pressed,
            whole_spans=min(scenario.arena_spans) >= 16 * scenario.budget_bytes,
        )
        self.clients = self.sessions.clients
        self.events = 0
        self.reads: list[Read] = []  #: every read, for tests that look closer
        self.granted: list[LayerKey] = []  #: the layer of every grant, in their order
        self.read_bytes_at_grant: list[int] = []  #: bytes of all reads begun before each grant
        self._check = check
        self._read_bytes = 0
        self._rng = random.Random(scenario.seed)
        self._device_free_ns = 0
        self._wakes_at_ns: int | None = None
        self._known: set[int] = set()
        self._commands: dict[int, BudgetChanged] = {}  #: of the operator, not yet answered
        largest = max(max(model.layer_bytes) for model in scenario.models)
        device = scenario.device
        self._worst_ns = device.worst_read_ns(largest) + device.discard_ns + 1
        self._limit = 50_000 + EVENTS_A_STEP * sum(profile.steps for profile in scenario.clients)

    @property
    def now(self) -> int:
        return self.agenda.now

    # ---------------------------------------------------------------------------------------- run

    def run(self) -> Summary:
        """Everything up to the end, with the promises about the end."""
        self._set_up()
        self._drain()
        owed = self.sessions.owed
        if owed or self._commands:
            commands = [*self._commands.values()]
            raise BrokenPromise(
                f"nothing happens any more, but requests are open: {owed}, {commands}"
            )
        for client in list(self.sessions.leases):
            self.agenda.after(0, self._feeder(ClientGone(self.now, client)))
        self._drain()
        memory = self.machine.snapshot().memory
        if memory.leased_bytes or memory.reserved_bytes or memory.in_flight_bytes:
            raise BrokenPromise(f"all clients are gone, but {memory}")
        if self.world.warm > self.world.budget:
            raise BrokenPromise(f"all clients are gone, but {memory} is above the budget")
        for model in self.machine.snapshot().models:
            self.agenda.after(0, self._feeder(ModelRemoved(self.now, model)))
        self._drain()
        snapshot = self.machine.snapshot()
        if snapshot.memory.resident_bytes or snapshot.models or self.world.slots:
            raise BrokenPromise(f"all models are gone, but {snapshot.memory}")
        return self.summary()

    def summary(self) -> Summary:
        snapshot = self.machine.snapshot()
        counters = snapshot.counters
        return Summary(
            self.scenario.seed,
            self.events,
            self.now / 1e9,
            sum(client.done for client in self.clients.values()),
            counters.grants,
            counters.hits,
            counters.reads,
            counters.read_bytes,
            counters.discards,
            counters.evictions,
            counters.later,
            counters.refusals,
            counters.stall_ns / 1e9,
            snapshot.memory.peak_bytes,
            snapshot.memory.budget_bytes,
        )

    def _set_up(self) -> None:
        scenario = self.scenario
        granule = scenario.granule_bytes
        warm = int(scenario.warm_share * (scenario.budget_bytes // granule)) * granule
        for arena, span in enumerate(scenario.arena_spans):
            self._feed(ArenaAdded(0, arena, span, warm if arena == 0 else 0))
        later = [model for model in scenario.models if model.added_ns]
        for model in scenario.models:
            added = ModelAdded(
                model.added_ns, model.number, f"m{model.number}", model.arena, model.layer_bytes
            )
            if model in later:
                self.agenda.after(model.added_ns, self._feeder(added))
            else:
                self._feed(added)
            if model.removed_ns is not None:
                removed = ModelRemoved(model.removed_ns, model.number)
                self.agenda.after(model.removed_ns, self._feeder(removed))
        if scenario.adopted:
            self._feed(Adopted(0, scenario.adopted))
            holders = sorted({holder for slot in scenario.adopted for holder in slot.holders})
            for wait, holder in enumerate(holders):
                gone = HolderGone(scenario.holders_ns, holder)
                self.agenda.after(scenario.holders_ns + wait, self._feeder(gone))
        for number, profile in enumerate(scenario.clients):
            client = VirtualClient(
                number,
                profile,
                random.Random(f"{scenario.seed}/{number}"),
                self._send,
                self.agenda.after,
                self.agenda.time,
                lambda: self.machine.pressed,
            )
            self.clients[number] = client
            self.agenda.after(profile.start_ns, client.start)
        for request, (at_ns, budget_bytes) in enumerate(scenario.budgets, start=COMMANDS):
            self.agenda.after(at_ns, self._feeder(BudgetChanged(at_ns, request, budget_bytes)))

    def _drain(self) -> None:
        while self.agenda:
            self.agenda.step()
            if self.events > self._limit:
                raise BrokenPromise(f"{self.events} events and no end: the machine never rests")

    # ----------------------------------------------------------------------------- events, actions

    def _send(self, event: Event) -> None:
        self.agenda.after(0, self._feeder(event))

    def _feeder(self, event: Event) -> Callable[[], None]:
        return lambda: self._feed(event)

    def _feed(self, event: Event) -> None:
        """What a server does: drop what comes too late, note what is owed, pass the rest on."""
        if isinstance(event, FromClient) and not self.sessions.takes(event, self._bound):
            return
        if isinstance(event, ModelRemoved) and event.model not in self._known:
            return
        self._note(event)
        self.events += 1
        for action in self.machine.handle(event):
            self._act(action)
        wakes_at_ns = self.machine.wakes_at_ns
        if wakes_at_ns is not None and wakes_at_ns != self._wakes_at_ns:
            self.agenda.after(max(wakes_at_ns - self.now, 0), lambda: self._feed(Tick(self.now)))
        self._wakes_at_ns = wakes_at_ns
        if isinstance(event, Plan | Acquire) and event.client in self.machine.books.awaiting:
            patience_ns = self.machine.config.admission_patience_ns
            self.agenda.after(patience_ns, lambda: self._feed(Tick(self.now)))
        self.sessions.press()
        memory = self.machine.books.memory
        coming = sum(slot.place.range.granules for slot in self.machine.books.in_flight.values())
        self.world.settled(coming, self._promised(), (), shrinking=memory.shrinking)
        if self._check:
            self.machine.check()
            self.sessions.owed.check(self.now)

    def _note(self, event: Event) -> None:
        """What the event means for memory and models."""
        world = self.world
        match event:
            case Release():
                world.release(event.lease)
            case ClientGone():
                for lease in self.sessions.gone(event.client):
                    world.release(lease)
            case ReadDone():
                world.read_done(event.slot)
            case ReadFailed():
                world.read_failed(event.slot)
            case DiscardDone():
                world.discard_done(event.arena, event.offset, event.nbytes)
            case ArenaAdded():
                world.arena_added(event)
            case Adopted():
                world.adopted(event)
            case HolderGone():
                world.holder_gone(event.holder)
            case ModelRemoved():
                self._known.discard(event.model)
            case ModelAdded():
                self._known.add(event.model)
            case BudgetChanged():
                self._commands[event.request] = event
            case _:
                pass

    def _bound(self, event: Plan | Acquire) -> int:
        """When this request must have its answer.

        Before it are served: what is in flight, the requests before it, and what is asked for
        within the time for which a request ahead may be put off.
        """
        if isinstance(event, Plan):
            return self.now + self.machine.config.admission_patience_ns
        waits = (
            self.sessions.owed.requests
            + len(self.sessions.leases)
            + self.scenario.reads_in_flight
            + 2
        )
        put_off = LONGEST_STEP_NS if event.ahead else 0
        if put_off:
            waits += put_off // self._worst_ns + 1
        if self.clients[event.client].profile.planless:
            put_off += self.machine.config.admission_patience_ns
        return self.now + put_off + CONVOY_WAIT_NS + waits * self._worst_ns

    def _act(self, action: Action) -> None:
        world = self.world
        match action:
            case Read():
                world.read(action)
                self.reads.append(action)
                self._read_bytes += action.nbytes
                self._transfer(action)
            case Evict():
                world.evict(action)
            case Discard():
                world.discard(action)
                delay = self._rng.randint(0, self.scenario.device.discard_ns)
                self.agenda.after(delay, lambda: self._discarded(action))
            case Grant():
                world.grant(action)
                self.granted.append(action.key)
                self.read_bytes_at_grant.append(self._read_bytes)
                self.sessions.answer(action)
            case Done():
                command = self._commands.pop(action.request)
                self.world.set_budget(command.budget_bytes)
            case Refuse() if action.client == OPERATOR and action.request in self._commands:
                command = self._commands.pop(action.request)
                if command.budget_bytes >= self.machine.budget_bytes:
                    raise BrokenPromise(f"{action}, though {command} takes nothing away")
            case Later() | Admit() | Refuse():
                self.sessions.answer(action)

    def _promised(self) -> int:
        """Granules of all reserves, or of leases where a client has more: from its answers."""
        books = self.machine.books
        if not books.memory.shrinking:
            return 0
        granule = self.scenario.granule_bytes
        clients = self.machine.snapshot().clients
        most = sum(max(client.reserved_bytes, client.leased_bytes) for client in clients)
        return most // granule + books.ledger.quarantined

    def _transfer(self, read: Read) -> None:
        device = self.scenario.device
        slow = device.slow_factor if self._rng.random() < device.slow_share else 1
        begin = max(self.now, self._device_free_ns)
        self._device_free_ns = begin + slow * read.nbytes * 1_000_000_000 // device.bandwidth
        delay = self._device_free_ns + slow * device.latency_ns - self.now
        failed = self._rng.random() < device.error_share
        self.agenda.after(delay, lambda: self._read_over(read, failed=failed))

    def _read_over(self, read: Read, *, failed: bool) -> None:
        if failed:
            self._feed(ReadFailed(self.now, read.slot, "read_failed", "EIO (simulated)"))
        else:
            self._feed(ReadDone(self.now, read.slot))

    def _discarded(self, action: Discard) -> None:
        self._feed(DiscardDone(self.now, action.arena, action.offset, action.nbytes))
