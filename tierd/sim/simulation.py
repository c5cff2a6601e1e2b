"""The heap of events. After every event the machine's invariants, the world's and *progress* hold:
every request is answered within a time that follows from the requests before it and the device."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
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
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Done,
    Event,
    Evict,
    Grant,
    Hint,
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
from tierd.sim.clients import VirtualClient
from tierd.sim.errors import BrokenPromise
from tierd.sim.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.model import LayerKey
    from tierd.sim.scenario import Scenario

CONVOY_WAIT_NS = 100_000_000
COMMANDS = 1_000_000  #: numbers of an operator's requests start here, apart from those of client 0
EVENTS_A_STEP = 200  #: more events than this per layer computed: the machine never becomes quiet


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to."""

    seed: int
    events: int
    virtual_seconds: float
    layers: int  #: computed by all clients
    grants: int
    hits: int
    reads: int
    read_bytes: int
    discards: int
    evictions: int
    later: int
    refusals: int
    stall_seconds: float
    peak_bytes: int
    budget_bytes: int

    def __str__(self) -> str:
        ratio = self.hits / self.grants if self.grants else 0.0
        return (
            f"seed {self.seed}: {self.layers} layers in {self.virtual_seconds:.3f} s virtual, "
            f"{self.events} events, {self.grants} grants ({ratio:.0%} hits), "
            f"{self.reads} reads of {self.read_bytes / 2**20:.1f} MiB, stall "
            f"{self.stall_seconds:.3f} s, {self.evictions} evictions, {self.discards} discards, "
            f"{self.later} later, {self.refusals} refusals, peak "
            f"{self.peak_bytes / 2**20:.1f} of {self.budget_bytes / 2**20:.1f} MiB"
        )


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
        self.now = 0
        self.events = 0
        self.reads: list[Read] = []  #: every read, for tests that look closer
        self.granted: list[LayerKey] = []  #: the layer of every grant, in their order
        self.read_bytes_at_grant: list[int] = []  #: bytes of all reads begun before each grant
        self.clients: dict[int, VirtualClient] = {}
        self._check = check
        self._read_bytes = 0
        self._rng = random.Random(scenario.seed)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._device_free_ns = 0
        self._wakes_at_ns: int | None = None
        self._connected: dict[int, dict[int, None]] = {}  #: client -> its leases
        self._open: dict[tuple[int, int], tuple[Event, int]] = {}  #: request -> latest answer
        self._reading: dict[int, Read] = {}
        self._known: set[int] = set()
        self._commands: dict[int, BudgetChanged] = {}  #: of the operator, not yet answered
        self._plans: set[tuple[int, int]] = set()  #: the plans among the open requests
        self._admitted: set[int] = set()  #: clients that have a plan
        self._pressed = False
        largest = max(max(model.layer_bytes) for model in scenario.models)
        device = scenario.device
        self._worst_ns = device.worst_read_ns(largest) + device.discard_ns + 1
        self._limit = 50_000 + EVENTS_A_STEP * sum(profile.steps for profile in scenario.clients)
        self._whole_spans = min(scenario.arena_spans) >= 16 * scenario.budget_bytes

    # ---------------------------------------------------------------------------------------- run

    def run(self) -> Summary:
        """Everything up to the end, with the promises about the end."""
        self._set_up()
        self._drain()
        if self._open or self._commands:
            owed = [*self._open.values(), *self._commands.values()]
            raise BrokenPromise(f"nothing happens any more, but requests are open: {owed}")
        for client in list(self._connected):
            self.after(0, self._feeder(ClientGone(self.now, client)))
        self._drain()
        memory = self.machine.snapshot().memory
        if memory.leased_bytes or memory.reserved_bytes or memory.in_flight_bytes:
            raise BrokenPromise(f"all clients are gone, but {memory}")
        if self.world.warm > self.world.budget:
            raise BrokenPromise(f"all clients are gone, but {memory} is above the budget")
        for model in self.machine.snapshot().models:
            self.after(0, self._feeder(ModelRemoved(self.now, model)))
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

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        """Calls `act` so much later."""
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay_ns, self._sequence, act))

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
                self.after(model.added_ns, self._feeder(added))
            else:
                self._feed(added)
            if model.removed_ns is not None:
                removed = ModelRemoved(model.removed_ns, model.number)
                self.after(model.removed_ns, self._feeder(removed))
        if scenario.adopted:
            self._feed(Adopted(0, scenario.adopted))
            holders = sorted({holder for slot in scenario.adopted for holder in slot.holders})
            for wait, holder in enumerate(holders):
                gone = HolderGone(scenario.holders_ns, holder)
                self.after(scenario.holders_ns + wait, self._feeder(gone))
        for number, profile in enumerate(scenario.clients):
            client = VirtualClient(
                number,
                profile,
                random.Random(f"{scenario.seed}/{number}"),
                self._send,
                self.after,
                lambda: self.now,
                lambda: self.machine.pressed,
            )
            self.clients[number] = client
            self.after(profile.start_ns, client.start)
        for request, (at_ns, budget_bytes) in enumerate(scenario.budgets, start=COMMANDS):
            self.after(at_ns, self._feeder(BudgetChanged(at_ns, request, budget_bytes)))

    def _drain(self) -> None:
        while self._heap:
            self.now, _, act = heapq.heappop(self._heap)
            act()
            if self.events > self._limit:
                raise BrokenPromise(f"{self.events} events and no end: the machine never rests")

    # ----------------------------------------------------------------------------- events, actions

    def _send(self, event: Event) -> None:
        self.after(0, self._feeder(event))

    def _feeder(self, event: Event) -> Callable[[], None]:
        return lambda: self._feed(event)

    def _feed(self, event: Event) -> None:
        """What a server does: drop what comes too late, note what is owed, pass the rest on."""
        world = self.world
        match event:
            case Plan() | Acquire():
                if event.client not in self._connected:
                    return
                if isinstance(event, Plan):
                    self._plans.add((event.client, event.request))
                self._open[event.client, event.request] = (event, self._bound(event))
            case Release():
                leases = self._connected.get(event.client)
                if leases is None or event.lease not in leases:
                    return
                del leases[event.lease]
                world.release(event.lease)
            case Hint():
                if event.client not in self._connected:
                    return
            case ClientJoined():
                self._connected[event.client] = {}
            case ClientGone():
                leases = self._connected.pop(event.client, None)
                if leases is None:
                    return
                for lease in leases:
                    world.release(lease)
                for owed in [owed for owed in self._open if owed[0] == event.client]:
                    del self._open[owed]
                    self._plans.discard(owed)
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
                if event.model not in self._known:
                    return
                self._known.discard(event.model)
            case ModelAdded():
                self._known.add(event.model)
            case BudgetChanged():
                self._commands[event.request] = event
            case ReadFailed() | Tick():
                pass
        self.events += 1
        for action in self.machine.handle(event):
            self._act(action)
        wakes_at_ns = self.machine.wakes_at_ns
        if wakes_at_ns is not None and wakes_at_ns != self._wakes_at_ns:
            self.after(max(wakes_at_ns - self.now, 0), lambda: self._feed(Tick(self.now)))
        self._wakes_at_ns = wakes_at_ns
        if isinstance(event, Plan | Acquire) and event.client in self.machine.books.awaiting:
            patience_ns = self.machine.config.admission_patience_ns
            self.after(patience_ns, lambda: self._feed(Tick(self.now)))
        self._press()
        memory = self.machine.books.memory
        coming = sum(slot.place.range.granules for slot in self.machine.books.in_flight.values())
        world.settled(coming, self._promised(), (), shrinking=memory.shrinking)
        if self._check:
            self.machine.check()
            late = [event for event, latest in self._open.values() if latest < self.now]
            if late:
                raise BrokenPromise(f"at {self.now} ns {late[0]} has no answer")

    def _bound(self, event: Plan | Acquire) -> int:
        """When this request must have its answer.

        Before it are served: what is in flight, the requests before it, and what is asked for
        within the time for which a request ahead may be put off.
        """
        if isinstance(event, Plan):
            return self.now + self.machine.config.admission_patience_ns
        waits = len(self._open) + len(self._connected) + self.scenario.reads_in_flight + 2
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
                self._reading[action.slot] = action
                self._transfer(action)
            case Evict():
                world.evict(action)
            case Discard():
                world.discard(action)
                delay = self._rng.randint(0, self.scenario.device.discard_ns)
                self.after(delay, lambda: self._discarded(action))
            case Grant():
                world.grant(action)
                self.granted.append(action.key)
                self.read_bytes_at_grant.append(self._read_bytes)
                self._connected[action.client][action.lease] = None
                self._answered(action)
                self.clients[action.client].granted(action)
            case Done():
                command = self._commands.pop(action.request)
                self.world.set_budget(command.budget_bytes)
            case Refuse() if action.client == OPERATOR and action.request in self._commands:
                command = self._commands.pop(action.request)
                if command.budget_bytes >= self.machine.budget_bytes:
                    raise BrokenPromise(f"{action}, though {command} takes nothing away")
            case Later():
                owed, _ = self._answered(action)
                if not isinstance(owed, Acquire) or not owed.ahead:
                    raise BrokenPromise(f"{owed} was answered with {action}")
                self._check_room(action, owed)
                self.clients[action.client].told_later(action)
            case Admit():
                self._answered(action)
                self._admitted.add(action.client)
                self.clients[action.client].admitted(action)
            case Refuse():
                owed, _ = self._answered(action)
                self._check_refusal(action, owed)
                self.clients[action.client].refused(action)

    def _promised(self) -> int:
        """Granules of all reserves, or of leases where a client has more: from its answers."""
        books = self.machine.books
        if not books.memory.shrinking:
            return 0
        granule = self.scenario.granule_bytes
        clients = self.machine.snapshot().clients
        most = sum(max(client.reserved_bytes, client.leased_bytes) for client in clients)
        return most // granule + books.ledger.quarantined

    def _press(self) -> None:
        """Clients that keep leases give them back within their time after they are pressed to."""
        pressed = self.machine.pressed
        if self._plans and not pressed:
            raise BrokenPromise(f"plans wait, and nobody is pressed: {self._plans}")
        if pressed and not self._pressed:
            for client in self.clients.values():
                if client.profile.keeps:
                    self.after(client.profile.answer_ns, client.give_back)
        self._pressed = pressed

    def _check_room(self, action: Later | Refuse, owed: Event) -> None:
        """What was announced is not put off while everything fits."""
        if (
            isinstance(owed, Acquire)
            and not self.machine.pressed
            and owed.client in self._admitted
            and owed.key.layer in self.clients[owed.client].profile.order
        ):
            raise BrokenPromise(f"{action} for {owed}, though everything fits")

    def _answered(self, action: Grant | Later | Admit | Refuse) -> tuple[Event, int]:
        owed = self._open.pop((action.client, action.request), None)
        if owed is None:
            raise BrokenPromise(f"{action} answers nothing")
        self._plans.discard((action.client, action.request))
        return owed

    def _check_refusal(self, action: Refuse, owed: Event) -> None:
        """Refusals that a promise forbids: of a layer within a reserve, for want of memory."""
        if action.code == "internal" and self._whole_spans:
            raise BrokenPromise(f"{action}, though the arena is large enough")
        client = self.clients[action.client]
        if action.code == "lease_limit":
            self._check_room(action, owed)
        if isinstance(owed, Acquire) and not client.profile.planless and not client.leases:
            held = [key for key, _ in client.asked.values()]
            if action.code in ("lease_limit", "budget_too_small") and held == [owed.key]:
                raise BrokenPromise(f"{action}, though the client holds nothing else: {owed}")

    def _transfer(self, read: Read) -> None:
        device = self.scenario.device
        slow = device.slow_factor if self._rng.random() < device.slow_share else 1
        begin = max(self.now, self._device_free_ns)
        self._device_free_ns = begin + slow * read.nbytes * 1_000_000_000 // device.bandwidth
        delay = self._device_free_ns + slow * device.latency_ns - self.now
        failed = self._rng.random() < device.error_share
        self.after(delay, lambda: self._read_over(read, failed=failed))

    def _read_over(self, read: Read, *, failed: bool) -> None:
        del self._reading[read.slot]
        if failed:
            self._feed(ReadFailed(self.now, read.slot, "read_failed", "EIO (simulated)"))
        else:
            self._feed(ReadDone(self.now, read.slot))

    def _discarded(self, action: Discard) -> None:
        self._feed(DiscardDone(self.now, action.arena, action.offset, action.nbytes))
