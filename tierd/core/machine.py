"""The state machine that decides everything: events in, actions out.

    actions = machine.handle(ReadDone(at_ns=now, slot=3))

State changes on completions: a `Read` that was returned has filled nothing until its `ReadDone`
came. An illegal event raises IllegalEvent and leaves the machine as it was. Where to start reading
and why no accepted request waits for ever: README.md beside this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.admission import Admission
from tierd.core.answers import Answers
from tierd.core.books import Books, Client, Request
from tierd.core.budget import Budget
from tierd.core.convoy import Convoys
from tierd.core.errors import IllegalEvent
from tierd.core.fetching import Fetcher
from tierd.core.invariants import check_books
from tierd.core.model import (
    Acquire,
    Action,
    Adopted,
    ArenaAdded,
    BudgetChanged,
    ClientGone,
    ClientJoined,
    CoreConfig,
    DeviceMeasured,
    DiscardDone,
    Event,
    EvictNow,
    Hint,
    HolderGone,
    LayerKey,
    ModelAdded,
    ModelRemoved,
    Pin,
    Plan,
    PlanOver,
    ReadDone,
    ReadFailed,
    Release,
    Tick,
    Unpin,
    WeightChanged,
)
from tierd.core.pins import Pins
from tierd.core.placement import Range
from tierd.core.plans import LONGEST_STEP_NS
from tierd.core.residency import Slot, SlotState
from tierd.core.restart import Restart
from tierd.core.served import ModelState
from tierd.core.shares import Device
from tierd.core.snapshot import Snapshot, snapshot_of
from tierd.core.whereabouts import Whereabouts, whereabouts_of

if TYPE_CHECKING:
    from tierd.core.plans import PlanState
    from tierd.core.story import Decision, Story


class TierMachine:
    """One budget of DRAM, its arenas, the models that it serves and the clients that use them."""

    def __init__(self, config: CoreConfig) -> None:
        self._books = books = Books(config)
        self._answers = Answers(books)
        self._convoys = Convoys(books)
        self._admission = Admission(books, self._answers, self._convoys)
        self._fetcher = Fetcher(books, self._answers)
        self._restart = Restart(books, self._fetcher)
        self._pins = Pins(books, self._fetcher)
        self._budget = Budget(books)

    @property
    def books(self) -> Books:
        """What the machine knows, for its neighbours in this package; they only read it."""
        return self._books

    @property
    def config(self) -> CoreConfig:
        return self._books.config

    def handle(self, event: Event) -> list[Action]:
        """Takes one event, returns what is to be done, in this order."""
        books = self._books
        before_ns = books.now
        if event.at_ns > before_ns:
            books.now = event.at_ns
        actions: list[Action] = []
        books.actions = actions
        books.told = []
        try:
            self._decide(event)
        except IllegalEvent:
            books.now = before_ns
            raise
        if books.awaiting:
            for request in self._admission.admit_waiting():
                self._acquire(request)
        self._convoys.expire()
        self._fetcher.advance()
        books.story.keep(books.now, event, actions, books.told)
        return actions

    def _decide(self, event: Event) -> None:
        match event:
            case Acquire():
                self._acquire(event)
            case Release():
                self._release(event)
            case ReadDone():
                self._read_done(event)
            case ReadFailed():
                self._read_failed(event)
            case DiscardDone():
                self._discard_done(event)
            case Plan():
                self._admission.plan(event)
            case PlanOver():
                self._admission.plan_over(event)
            case Hint():
                self._hint(event)
            case ClientJoined():
                self._client_joined(event)
            case WeightChanged():
                self._weight_changed(event)
            case ClientGone():
                self._client_gone(event)
            case ArenaAdded():
                self._arena_added(event)
            case ModelAdded():
                self._model_added(event)
            case ModelRemoved():
                self._model_removed(event)
            case Adopted():
                self._restart.adopt_all(event)
            case HolderGone():
                self._restart.holder_gone(event)
            case DeviceMeasured():
                self._device_measured(event)
            case Pin():
                self._pins.pin(event)
            case Unpin():
                self._pins.unpin(event)
            case EvictNow():
                self._pins.evict(event)
            case BudgetChanged():
                self._budget.change(event)
            case Tick():
                pass

    @property
    def budget_bytes(self) -> int:
        """What the arenas together may hold at present, rounded down to granules."""
        return self._books.memory.budget * self._books.config.granule_bytes

    @property
    def pressed(self) -> bool:
        """Whether clients should give back the leases that they keep between uses.

        Not while all layers of all plans and every reserve fit the budget at once and nobody waits
        for memory: what is kept then keeps nobody waiting. Nor are layers of a model that was
        removed to be kept: then too.
        """
        return self._budget.pressed

    @property
    def waits_for_time(self) -> bool:
        """Whether something is decided by time alone: then send a `Tick` now and then."""
        return bool(self._books.awaiting) or self.wakes_at_ns is not None

    @property
    def wakes_at_ns(self) -> int | None:
        """When to send a `Tick` at the latest; None: nothing is decided at a certain time."""
        return self._convoys.wakes_at_ns

    def story(self, key: LayerKey | None = None) -> list[Decision]:
        """The recorded decisions about a layer, or all; `str()` of each is a sentence."""
        return self._books.story.about(key)

    @property
    def record(self) -> Story:
        """Every event, what it led to and why, as far back as the record reaches."""
        return self._books.story

    def whereabouts(self, key: LayerKey, now_ns: int) -> Whereabouts | None:
        """Where the layer is at `now_ns` and why; None if there is no such layer."""
        return whereabouts_of(self._books, key, now_ns)

    def check(self) -> None:
        """Raises InvariantBroken where the books contradict each other; costs O(everything)."""
        check_books(self._books)

    def snapshot(self) -> Snapshot:
        """The state between two events, in bytes and steps."""
        return snapshot_of(self._books)

    def _arena_added(self, event: ArenaAdded) -> None:
        granule = self._books.config.granule_bytes
        span, warm = event.span_bytes // granule, -(-event.warm_bytes // granule)
        if self._books.memory.has_arena(event.arena):
            raise self._books.illegal(f"arena {event.arena} exists")
        if not 0 <= warm <= span:
            raise self._books.illegal(
                f"arena {event.arena}: {event.warm_bytes} warm bytes in {event.span_bytes}"
            )
        if self._books.memory.warm + self._books.memory.promised + warm > self._books.memory.budget:
            raise self._books.illegal(
                f"arena {event.arena}: {event.warm_bytes} warm bytes, the budget of "
                f"{self._books.config.budget_bytes} has {self._books.memory.warm * granule} in use"
            )
        self._books.memory.add_arena(event.arena, span, warm)

    def _model_added(self, event: ModelAdded) -> None:
        if event.model in self._books.models or event.model in self._books.removed:
            raise self._books.illegal(f"model {event.model} exists or existed")
        if not self._books.memory.has_arena(event.arena):
            raise self._books.illegal(f"model {event.model}: no arena {event.arena}")
        if any(nbytes <= 0 or nbytes % 4096 for nbytes in event.layer_bytes):
            raise self._books.illegal(
                f"model {event.model}: a layer is empty or no multiple of 4 KiB"
            )
        self._books.devices.setdefault(event.device, Device(event.device))
        charges = [self._books.memory.charge(nbytes) for nbytes in event.layer_bytes]
        self._books.models[event.model] = ModelState(
            event.model, event.name, event.arena, event.layer_bytes, charges, event.device
        )

    def _model_removed(self, event: ModelRemoved) -> None:
        model = self._books.models.get(event.model)
        if model is None or model.removed:
            raise self._books.illegal(f"model {event.model} is not served")
        model.removed = True
        self._books.removed.add(model.id)
        self._convoys.model_removed(model.id)
        self._pins.forget(model)
        for client in self._books.clients.values():
            if client.plan is not None and client.plan.model == model.id:
                self._admission.drop_plan(client)
                self._books.ledger.set_reserve(client.id, 0)
        for awaiting in list(self._books.awaiting.values()):
            if self._books.awaited_layer(awaiting)[0] is model:
                text = f"model '{model.name}' was removed"
                self._admission.withdraw(awaiting, "model_removed", text)
        for key in model.keys:
            for request in self._books.waiting.pop(key, ()):
                self._answers.close(request)
                self._answers.refuse(request, "model_removed", f"model '{model.name}' was removed")
        for slot in list(model.slots):
            if slot is None:
                continue
            if slot.state is SlotState.CLAIMED:
                self._fetcher.abandon(slot)
            elif slot.evictable:
                self._fetcher.evict(slot, "model '{}' was removed", model.name)
        self._books.leaving[model.id] = model
        self._fetcher.forget_if_empty(model)

    def _client_joined(self, event: ClientJoined) -> None:
        if event.client in self._books.clients:
            raise self._books.illegal(f"client {event.client} is connected")
        self._books.clients[event.client] = Client(event.client, event.weight)
        self._books.ledger.open(event.client)

    def _weight_changed(self, event: WeightChanged) -> None:
        client = self._books.client(event.client)
        if event.weight < 1:
            raise self._books.illegal(f"client {event.client}: a weight of {event.weight}")
        client.weight = event.weight
        for device in self._books.devices.values():
            device.weigh(client.id, event.weight)

    def _hint(self, event: Hint) -> None:
        plan = self._books.client(event.client).plan
        if plan is not None and plan.kind == "open" and plan.model == event.model:
            plan.hint(event)
            self._books.policy.touched(event.client, plan)

    def _client_gone(self, event: ClientGone) -> None:
        client = self._books.client(event.client)
        if client.id in self._books.awaiting:
            self._admission.stop_waiting(client.id)
        for request in list(client.requests.values()):
            waiting = self._books.waiting[request.key]
            waiting.remove(request)
            if not waiting:
                del self._books.waiting[request.key]
            self._answers.close(request)
        leases = list(client.leases.values())
        client.leases.clear()
        for slot in leases:
            slot.leases -= 1
        self._admission.drop_plan(client)
        for device in self._books.devices.values():
            device.drop(client.id)
        del self._books.clients[client.id]
        self._books.ledger.close(client.id)
        for slot in {slot.id: slot for slot in leases}.values():
            if event.holder is not None:
                self._restart.quarantine(slot, event.holder)
            self._books.policy.resident(slot)
            self._fetcher.no_longer_used(slot)
        self._books.tell("gone", None, "client {} left {} leases behind", client.id, len(leases))

    def _acquire(self, event: Acquire) -> None:
        books = self._books
        client = books.client(event.client)
        key = event.key
        model = books.served(key.model)
        if isinstance(model, str):
            self._answers.refuse(event, model, f"model {key.model} is not served")
            return
        if not 0 <= key.layer < len(model.slots):
            self._answers.refuse(
                event, "not_found", f"model '{model.name}' has layers 0 to {len(model.slots) - 1}, "
                f"not {key.layer}",
            )  # fmt: skip
            return
        if not self._admission.admits(event, client, model):
            return
        idle = not client.leases and not client.requests
        wanted = model.reasons[key.layer] > 0
        books.ledger.hold(client.id, key, model.charges[key.layer], wanted=wanted)
        stalled = idle or not event.ahead
        deadline_ns = self._deadline_ns(client, stalled=stalled)
        plan = client.plan
        if plan is not None:
            plan.last_ns = books.now
            if plan.model == key.model and not self._asked_already(client, plan, key):
                plan.advance(key.layer, books.now)
                self._convoys.stepped(client)
            books.policy.touched(client.id, plan)
        books.arrivals += 1
        share = books.devices[model.device].share(client.id, client.weight)
        request = Request(
            client.id, event.request, key, books.now if stalled else None, deadline_ns,
            books.arrivals, share,
        )  # fmt: skip
        slot = model.slots[key.layer]
        if slot is not None and slot.state is SlotState.RESIDENT:
            books.count["hits"] += 1
            self._answers.grant(request, client, slot)
            return
        books.count["misses"] += 1
        if key.layer in model.failed:
            books.policy.worth_a_read_again(model, key.layer)
        client.requests[request.number] = request
        books.waiting.setdefault(key, []).append(request)
        client.stalled += stalled
        if slot is None:
            self._answers.enqueue(request)
        else:
            slot.demanded = True
            request.unread = False
            books.bills[slot.id].join(share)
        books.tell("wait", key, "client {} {}", client.id,
            "stalls for it" if stalled else "wants it ahead",
        )  # fmt: skip

    def _deadline_ns(self, client: Client, *, stalled: bool) -> int:
        """When the client's compute will reach a layer that it asks for now: after those that it
        stalls for, and before one ahead after all that it holds or asked for; at most 1 s."""
        before = client.stalled if stalled else len(client.leases) + len(client.requests)
        now = self._books.now
        if client.plan is None or not before:
            return now
        return now + min(before * client.plan.compute_ns, LONGEST_STEP_NS)

    def _asked_already(self, client: Client, plan: PlanState, key: LayerKey) -> bool:
        """Asking again for what it just asked for does not move a client along its plan."""
        return (
            plan.position >= 0
            and plan.order[plan.position] == key.layer
            and self._books.ledger[client.id].layers[key] > 1
        )

    def _release(self, event: Release) -> None:
        client = self._books.client(event.client)
        slot = client.leases.get(event.lease)
        if slot is None:
            raise self._books.illegal(f"client {event.client} has no lease {event.lease}")
        del client.leases[event.lease]
        slot.leases -= 1
        assert slot.key is not None
        self._books.ledger.let_go(client.id, slot.key)
        if client.plan is not None:
            client.plan.last_ns = self._books.now
            self._books.policy.touched(client.id, client.plan)
        if not client.leases and client.requests:
            self._promote(client)
        self._books.policy.resident(slot)
        self._fetcher.no_longer_used(slot)

    def _promote(self, client: Client) -> None:
        """The client has nothing left to compute with: it stalls for its oldest request."""
        requests = client.requests.values()
        if client.stalled:
            return
        request = next(iter(requests))
        request.since_ns = self._books.now
        client.stalled += 1
        if request.unread and request.deadline_ns > self._books.now:
            request.deadline_ns = self._books.now
            self._answers.enqueue(request)

    def _read_done(self, event: ReadDone) -> None:
        slot = self._read_slot(event.slot)
        assert slot.key is not None
        self._fetcher.ended(slot, arrived=True)
        slot.state = SlotState.RESIDENT
        self._books.count["read_bytes"] += slot.place.nbytes
        self._books.policy.resident(slot)
        self._books.tell("resident", slot.key, "in slot {}", slot.id)
        for request in self._books.waiting.pop(slot.key, ()):
            client = self._books.clients[request.client]
            self._answers.end(request, client)
            self._answers.grant(request, client, slot)
        self._fetcher.no_longer_used(slot)

    def _read_failed(self, event: ReadFailed) -> None:
        slot = self._read_slot(event.slot)
        key = slot.key
        assert key is not None
        self._fetcher.ended(slot, arrived=False)
        self._books.count["reads_failed"] += 1
        model = self._books.models[key.model]
        model.failed.add(key.layer)
        self._books.tell("failed", key, "{}: {}", event.code, event.text)
        for request in self._books.waiting.pop(key, ()):
            self._answers.close(request)
            self._answers.refuse(request, event.code, event.text)
        self._fetcher.evict(slot, "its read failed")
        self._fetcher.forget_if_empty(model)

    def _discard_done(self, event: DiscardDone) -> None:
        granule = self._books.config.granule_bytes
        discard = Range(
            event.arena, event.offset // granule, (event.offset + event.nbytes) // granule
        )
        if not self._books.memory.is_discarding(discard):
            raise self._books.illegal(
                f"no discard of {event.nbytes} bytes at {event.offset} is under way"
            )
        self._books.memory.discarded(discard)

    def _device_measured(self, event: DeviceMeasured) -> None:
        if min(event.bytes_per_s, event.reads_in_flight) < 1 or event.latency_ns < 0:
            raise self._books.illegal(f"no device has these figures: {event}")
        self._books.measured[event.device] = event

    def _read_slot(self, number: int) -> Slot:
        slot = self._books.slots.get(number)
        if slot is None or slot.state is not SlotState.READING:
            key = None if slot is None else slot.key
            raise self._books.illegal(f"slot {number} is not being read", key)
        return slot
