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

import heapq
import random
from dataclasses import dataclass, replace
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
    ModelAdded,
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
from tierd.sim.clients import VirtualClient
from tierd.sim.errors import BrokenPromise
from tierd.sim.operator import Operator
from tierd.sim.owed import Owed
from tierd.sim.transfers import Transfers
from tierd.sim.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.machine import TierMachine
    from tierd.core.model import Event
    from tierd.sim.clients import Profile
    from tierd.sim.fleet import Fleet

TICK_NS = 100_000_000
OPERATOR_NS = 60_000_000  #: on average, between two commands of the operator
CONVOY_WAIT_NS = 100_000_000
SPAN = 16  #: address space of an arena, in budgets
REST = 100_000  #: events after the last client left: more, and the machines never rest


@dataclass(frozen=True, slots=True)
class FleetSummary:
    """What a run came to."""

    seed: int
    events: int
    virtual_seconds: float
    clients: int  #: that ever came
    layers: int  #: computed by all
    grants: int
    reads: int
    read_bytes: int
    copies: int
    copy_bytes: int
    early: int  #: copies that began before their layer was whole
    stopped: int  #: of these: that were stopped, or whose read failed
    direct: int  #: reads past DRAM
    refusals: int
    failures: int  #: of reads and copies
    models: int  #: that were ever served
    budgets: int  #: changes of one
    kept: int  #: leases that were given back because somebody else needed room
    stall_seconds: float

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.events} events, {self.virtual_seconds:.3f} s virtual, "
            f"{self.clients} clients, {self.models} models, {self.layers} layers computed, "
            f"{self.grants} grants, {self.reads} reads of {self.read_bytes / 2**30:.1f} GiB, "
            f"{self.copies} copies of {self.copy_bytes / 2**30:.1f} GiB, {self.early} of them "
            f"early, {self.stopped} of these ended early, {self.direct} direct reads, "
            f"{self.failures} failures, "
            f"{self.refusals} refusals, {self.budgets} budgets, {self.kept} kept leases given "
            f"back, stall {self.stall_seconds:.1f} s"
        )


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
        self.now = 0
        self.events = 0
        self.clients: dict[int, VirtualClient] = {}
        self._full_every = full_every
        self._rng = random.Random(f"run {fleet.seed}")
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0
        self._came = OPERATOR + 1  #: the number of the next client
        self._layers = 0  #: of clients that left
        self._kept = 0
        self._stall_ns = 0
        self._count = dict.fromkeys(("grants", "reads", "read", "copies", "copy", "refusals"), 0)
        self._served = [model.number for model in fleet.models]  #: by place: the id at present
        self._next_model = len(fleet.models)
        self._transfers = Transfers(
            fleet, self._rng, self.worlds, lambda: self.now, self._after, self._feed
        )
        self._leases: dict[int, dict[int, None]] = {}  #: by connected client
        self._tier: dict[int, int | None] = {}  #: of connected clients
        self._owed = Owed()
        self._admitted: set[int] = set()  #: clients that have a plan
        self._fencing: dict[int, int] = {}  #: clients that are gone -> their GPU
        self._operator = Operator(self._rng, budgets)
        self._pressed = dict.fromkeys(self.worlds, False)
        self._tick_ns: int | None = None  #: when the next tick comes
        self._leaving = False
        largest = max(nbytes for model in fleet.models for nbytes in model.layer_bytes)
        self._worst_ns = (
            fleet.disk.worst_read_ns(largest)
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

    # ---------------------------------------------------------------------------------------- run

    def run(self) -> FleetSummary:
        """Everything up to the end, with the promises about the end."""
        self._set_up()
        while self.events < self.fleet.size.events:
            self._step("clients are there, but nothing happens")
        self._leaving = True
        self._feed(self._operator.unpin_all(self.now))
        self._operator.check_answered()
        for client in list(self.clients.values()):
            client.leave()
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
        for model in self._served:
            self._feed(ModelRemoved(self.now, model))
        self._rest()
        for tier, world in self.worlds.items():
            snapshot = self._machine(tier).snapshot()
            if snapshot.memory.resident_bytes or snapshot.models or world.slots:
                raise BrokenPromise(f"all models are gone, but tier {tier}: {snapshot.memory}")
        return self.summary()

    def summary(self) -> FleetSummary:
        count = self._count
        present = self.clients.values()
        return FleetSummary(
            self.fleet.seed,
            self.events,
            self.now / 1e9,
            self._came - OPERATOR - 1,
            self._layers + sum(client.done for client in present),
            count["grants"],
            count["reads"],
            count["read"],
            count["copies"],
            count["copy"],
            self._transfers.early,
            self._transfers.stopped,
            self._transfers.direct,
            count["refusals"],
            self._transfers.failures,
            self._next_model,
            self._operator.changed,
            self._kept + sum(client.given_back for client in present),
            (self._stall_ns + sum(client.stall_ns for client in present)) / 1e9,
        )

    def _set_up(self) -> None:
        fleet = self.fleet
        self._feed(ArenaAdded(0, 0, SPAN * fleet.dram_bytes, fleet.dram_bytes))
        for gpu, nbytes in enumerate(fleet.gpu_bytes):
            self._feed(GpuArenaAdded(0, gpu, 1 + gpu, SPAN * nbytes, nbytes))
        for place in range(len(fleet.models)):
            self._serve(place)
        for _ in range(fleet.size.clients):
            self._after(self._rng.randint(0, 500_000_000), self._come)
        self._after(self._pause_ns(), self._replace_a_model)
        self._after(OPERATOR_NS, self._operate)

    def _step(self, otherwise: str) -> None:
        if not self._heap:
            raise BrokenPromise(f"{otherwise}; {self._owed.requests} requests are open")
        self.now, _, act = heapq.heappop(self._heap)
        act()

    def _rest(self) -> None:
        limit = self.events + REST
        while self._heap:
            self._step("")
            if self.events > limit:
                raise BrokenPromise(f"{REST} events after the last client left: it never rests")
        self.stack.check()
        if self._owed or self._transfers:
            raise BrokenPromise(f"nothing happens any more, but requests are open: {self._owed}")

    def _after(self, delay_ns: int, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay_ns, self._sequence, act))

    # ------------------------------------------------------------------------- who comes and goes

    def _come(self) -> None:
        if self._leaving:
            return
        number = self._came
        self._came += 1
        profile = self.fleet.profile(self._rng, self.now)
        rng = random.Random(f"{self.fleet.seed}/{number}")
        placed = self._profile_of(profile)
        tier = profile.gpu
        client = VirtualClient(
            number, placed, rng, self._send, self._after, lambda: self.now,
            lambda: self._pressed[tier],
        )  # fmt: skip
        self.clients[number] = client
        self._tier[number] = profile.gpu
        client.start()

    def _profile_of(self, profile: Profile) -> Profile:
        """With the id that the model has at present."""
        return replace(profile, model=self._served[profile.model])

    def _serve(self, place: int) -> None:
        sizes = self.fleet.models[place].layer_bytes
        model = self._served[place]
        self._feed(ModelAdded(self.now, model, f"m{place}", 0, sizes))
        for gpu, places in enumerate(self.fleet.placed):
            if place in places:
                self._feed(ModelPlaced(self.now, gpu, model, 1 + gpu))

    def _replace_a_model(self) -> None:
        if self._leaving:
            return
        place = self._rng.randrange(len(self._served))
        self._feed(ModelRemoved(self.now, self._served[place]))
        self._served[place] = self._next_model
        self._next_model += 1
        self._serve(place)
        self._after(self._pause_ns(), self._replace_a_model)

    def _operate(self) -> None:
        """An operator pins, unpins and evicts layers in DRAM, some of them of models long gone, and
        changes budgets."""
        if self._leaving:
            return
        self._feed(self._operator.command(self.now, self._served, self._next_model))
        self._operator.check_answered()
        self._after(self._rng.randint(1, 2 * OPERATOR_NS), self._operate)

    def _pause_ns(self) -> int:
        return self._rng.randint(1, 2 * self.fleet.replace_ns)

    def _gone(self, client: int) -> None:
        tier = self._tier.pop(client)
        for lease in self._leases.pop(client):
            if tier is None:
                self.worlds[None].release(lease)
            else:
                self.worlds[tier].fence(lease, client)
        self._owed.forget(client)
        self._admitted.discard(client)
        left = self.clients.pop(client)
        self._layers += left.done
        self._kept += left.given_back
        self._stall_ns += left.stall_ns
        if tier is not None:
            delay = self._rng.choice([0, self._rng.randint(0, self.fleet.fence_ns)])
            self._after(delay, lambda: self._feed(Fenced(self.now, client)))
            self._fencing[client] = tier
        self._after(self._rng.randint(0, 20_000_000), self._come)

    # ----------------------------------------------------------------------------- events, actions

    def _send(self, event: Event) -> None:
        """From a client: it arrives at the same time, but not inside an answer."""
        self._after(0, lambda: self._arrive(event))

    def _arrive(self, event: Event) -> None:
        """What a server does: drop what comes too late, note what is owed, pass the rest on."""
        assert isinstance(event, ClientJoined | Plan | Acquire | Release | Hint | ClientGone)
        client = event.client
        if isinstance(event, ClientJoined):
            self._leases[client] = {}
            gpu = self._tier[client]
            if gpu is not None:
                self._feed(JoinedGpu(event.at_ns, client, gpu, event.weight))
                return
        elif client not in self._leases:
            return
        match event:
            case Plan() | Acquire():
                self._owed.asked(event, self._bound(event))
            case Release():
                if event.lease not in self._leases[client]:
                    return
                del self._leases[client][event.lease]
                self.worlds[self._tier[client]].release(event.lease)
            case _:
                pass
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
        self._owed.check(self.now)
        self._press()
        if self.stack.waits_for_time:
            wakes_at_ns = self.stack.wakes_at_ns or self.now + TICK_NS
            at_ns = max(min(wakes_at_ns, self.now + TICK_NS), self.now)
            if self._tick_ns is None or at_ns < self._tick_ns:
                self._tick_ns = at_ns
                self._after(at_ns - self.now, lambda: self._tick(at_ns))

    def _tier_reached(self, event: StackEvent) -> int | None:
        match event:
            case Acquire() | Release() | Plan() | Hint() | ClientJoined() | ClientGone():
                return self._tier.get(event.client)
            case CopyDone() | CopyFailed() | JoinedGpu() | GpuArenaAdded() | ModelPlaced():
                return event.gpu
            case TierBudgetChanged():
                return event.gpu
            case _:
                return None

    def _note(self, event: StackEvent) -> None:
        """What the event means for the tiers' memory."""
        match event:
            case ClientGone():
                self._gone(event.client)
            case Fenced():
                self.worlds[self._fencing.pop(event.client)].holder_gone(event.client)
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
                self._transfers.read(action)
            case Copy():
                self.worlds[action.gpu].read(action)
                self._count["copies"] += 1
                self._count["copy"] += action.nbytes
                self._transfers.copy(action)
            case DirectRead():
                self.worlds[action.gpu].read(action)
                self._transfers.direct_read(action)
            case StopCopy():
                self._transfers.stop(action)
            case Evict():
                self.worlds[None].evict(action)
            case Unload():
                self.worlds[action.gpu].evict(action)
            case Discard():
                tier = None if action.arena == 0 else action.arena - 1
                self.worlds[tier].discard(action)
                delay = self._rng.randint(0, self.fleet.disk.discard_ns)
                self._after(delay, lambda: self._discarded(tier, action))
            case Grant():
                self.worlds[self._tier[action.client]].grant(action)
                self._count["grants"] += 1
                self._leases[action.client][action.lease] = None
                self._owed.answered(action)
                self.clients[action.client].granted(action)
            case Later():
                owed = self._owed.answered(action)
                if not isinstance(owed, Acquire) or not owed.ahead:
                    raise BrokenPromise(f"{owed} was answered with {action}")
                self._check_room(action, owed)
                self.clients[action.client].told_later(action)
            case Admit():
                self._owed.answered(action)
                self._admitted.add(action.client)
                self.clients[action.client].admitted(action)
            case Done():
                command = self._operator.answered(action)
                if isinstance(command, TierBudgetChanged):
                    self.worlds[command.gpu].set_budget(command.budget_bytes)
            case Refuse() if action.client == OPERATOR:
                self._operator.answered(action)
            case Refuse():
                self._count["refusals"] += 1
                self._check_refusal(action, self._owed.answered(action))
                self.clients[action.client].refused(action)

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
        waits = 2 * self._owed.requests + 2 * len(self._leases)
        waits += len(self.stack.feeds.feeds) + self.fleet.reads_in_flight + 2
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

    def _press(self) -> None:
        """Clients that keep leases give them back within their time after they are pressed to."""
        for tier, before in self._pressed.items():
            pressed = self._pressed[tier] = self._machine(tier).pressed
            if pressed and not before:
                for client in self.clients.values():
                    if client.profile.keeps and client.profile.gpu == tier:
                        self._after(client.profile.answer_ns, client.give_back)
        for waits in self._owed.plans:
            if not (self._pressed[self._tier[waits]] or self._pressed[None]):
                raise BrokenPromise(f"the plan of client {waits} waits, and nobody is pressed")

    def _check_room(self, action: Later | Refuse, owed: Event) -> None:
        """What was announced is not put off while everything fits."""
        if isinstance(owed, Acquire) and owed.client in self._admitted:
            client = self.clients[owed.client]
            planned = owed.key.layer in client.profile.order
            if planned and not self._machine(client.profile.gpu).pressed:
                raise BrokenPromise(f"{action} for {owed}, though everything fits")

    def _check_refusal(self, action: Refuse, owed: Event) -> None:
        """Refusals that a promise forbids: of a layer within a reserve, for want of memory."""
        if action.code == "internal":
            raise BrokenPromise(f"{action}, though the arena is large enough")
        client = self.clients[action.client]
        if action.code == "lease_limit":
            self._check_room(action, owed)
        if isinstance(owed, Acquire) and not client.profile.planless and not client.leases:
            held = [key for key, _ in client.asked.values()]
            if action.code in ("lease_limit", "budget_too_small") and held == [owed.key]:
                raise BrokenPromise(f"{action}, though the client holds nothing else: {owed}")

    def _machine(self, tier: int | None) -> TierMachine:
        return self.stack.dram if tier is None else self.stack.gpus[tier]
