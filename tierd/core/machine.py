"""The state machine that decides everything: events in, actions out.

    actions = machine.handle(ReadDone(at_ns=now, slot=3))

State changes on completions: a `Read` that was returned has filled nothing until its `ReadDone`
came. An illegal event raises IllegalEvent and leaves the machine as it was. Where to start reading
and why no accepted request waits for ever: README.md beside this file.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.errors import IllegalEvent, InvariantBroken
from tierd.core.leases import Ledger
from tierd.core.memory import Memory
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    Adopted,
    AdoptedSlot,
    ArenaAdded,
    ClientGone,
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Event,
    Evict,
    Grant,
    HolderGone,
    Later,
    LayerKey,
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
from tierd.core.placement import Range
from tierd.core.plans import NEVER, PlanState
from tierd.core.policy import Policy
from tierd.core.residency import ModelState, Slot, SlotNumbers, SlotState
from tierd.core.snapshot import ClientSnapshot, Counters, LayerSnapshot, MemorySnapshot, Snapshot
from tierd.core.story import Decision, Story

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.core.memory import Claim
    from tierd.core.policy import Victim


@dataclass(slots=True, eq=False)
class Request:
    """An accepted acquire that waits for its layer."""

    client: int
    request: int
    key: LayerKey
    since_ns: int | None  #: when the client began to stall for it; None while it has other work
    deadline_ns: int  #: when it is needed: requests are served in this order
    number: int  #: by arrival
    open: bool = True


@dataclass(slots=True, eq=False)
class Client:
    id: int
    plan: PlanState | None = None
    leases: dict[int, Slot] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)  #: by order of arrival
    stall_ns: int = 0
    granted: int = 0


class TierMachine:
    """One budget of DRAM, its arenas, the models that it serves and the clients that use them."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        budget = config.budget_bytes // config.granule_bytes
        self._memory = Memory(budget, config.granule_bytes, config.small_layer_bytes)
        self._ledger = Ledger(budget)
        self._models: dict[int, ModelState] = {}
        self._removed: set[int] = set()
        self._clients: dict[int, Client] = {}
        self._policy = Policy(self._memory, self._ledger, self._models)
        self._story = Story(config.story_length)
        self._slots: dict[int, Slot] = {}
        self._numbers = SlotNumbers()
        self._holders: dict[int, list[Slot]] = {}
        self._next_generation = config.first_generation
        self._next_lease = config.first_lease
        self._in_flight: dict[int, Slot] = {}  #: claimed or reading, in order of their claim
        self._waiting: dict[LayerKey, list[Request]] = {}
        self._queue: list[tuple[int, int, Request]] = []  #: heap by deadline, then arrival
        self._arrivals = 0
        self._plans: dict[int, Plan] = {}  #: by client: plans that wait until others hold less
        self._now = 0
        self._actions: list[Action] = []
        self._count = Counter[str]()

    # ------------------------------------------------------------------------------ the only door

    def handle(self, event: Event) -> list[Action]:
        """Takes one event, returns what is to be done, in this order."""
        before_ns = self._now
        self._now = max(before_ns, event.at_ns)
        actions: list[Action] = []
        self._actions = actions
        try:
            self._decide(event)
        except IllegalEvent:
            self._now = before_ns
            raise
        self._advance()
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
                self._plan(event)
            case ClientJoined():
                self._client_joined(event)
            case ClientGone():
                self._client_gone(event)
            case ArenaAdded():
                self._arena_added(event)
            case ModelAdded():
                self._model_added(event)
            case ModelRemoved():
                self._model_removed(event)
            case Adopted():
                self._adopted(event)
            case HolderGone():
                self._holder_gone(event)
            case Tick():
                pass

    def story(self, key: LayerKey | None = None) -> list[Decision]:
        """The recorded decisions about a layer, or all; `str()` of each is a sentence."""
        return self._story.about(key)

    # ---------------------------------------------------------------------------- arenas, models

    def _arena_added(self, event: ArenaAdded) -> None:
        granule = self.config.granule_bytes
        span, warm = event.span_bytes // granule, -(-event.warm_bytes // granule)
        if self._memory.has_arena(event.arena):
            raise self._illegal(f"arena {event.arena} exists")
        if not 0 <= warm <= span:
            raise self._illegal(
                f"arena {event.arena}: {event.warm_bytes} warm bytes in {event.span_bytes}"
            )
        if self._memory.warm + self._memory.promised + warm > self._memory.budget:
            raise self._illegal(
                f"arena {event.arena}: {event.warm_bytes} warm bytes, the budget of "
                f"{self.config.budget_bytes} has {self._memory.warm * granule} in use"
            )
        self._memory.add_arena(event.arena, span, warm)

    def _model_added(self, event: ModelAdded) -> None:
        if event.model in self._models or event.model in self._removed:
            raise self._illegal(f"model {event.model} exists or existed")
        if not self._memory.has_arena(event.arena):
            raise self._illegal(f"model {event.model}: no arena {event.arena}")
        if any(nbytes <= 0 or nbytes % 4096 for nbytes in event.layer_bytes):
            raise self._illegal(f"model {event.model}: a layer is empty or no multiple of 4 KiB")
        charges = [self._memory.charge(nbytes) for nbytes in event.layer_bytes]
        self._models[event.model] = ModelState(
            event.model, event.name, event.arena, event.layer_bytes, charges
        )

    def _model_removed(self, event: ModelRemoved) -> None:
        model = self._models.get(event.model)
        if model is None or model.removed:
            raise self._illegal(f"model {event.model} is not served")
        model.removed = True
        self._removed.add(model.id)
        for client in self._clients.values():
            if client.plan is not None and client.plan.model == model.id:
                self._drop_plan(client)
                self._ledger.set_reserve(client.id, 0)
        for plan in [plan for plan in self._plans.values() if plan.model == model.id]:
            self._withdraw(plan, "model_removed", f"model '{model.name}' was removed")
        for key in model.keys:
            for request in self._waiting.pop(key, ()):
                self._close(request)
                self._refuse(request, "model_removed", f"model '{model.name}' was removed")
        for slot in list(model.slots):
            if slot is None:
                continue
            if slot.state is SlotState.CLAIMED:
                self._abandon(slot)
            elif slot.evictable:
                self._evict(slot, "model '{}' was removed", model.name)
        self._forget_if_empty(model)

    def _forget_if_empty(self, model: ModelState) -> None:
        if model.removed and model.missing == len(model.slots):
            del self._models[model.id]

    # ------------------------------------------------------------------------------------ clients

    def _client_joined(self, event: ClientJoined) -> None:
        if event.client in self._clients:
            raise self._illegal(f"client {event.client} is connected")
        self._clients[event.client] = Client(event.client)
        self._ledger.open(event.client)

    def _client_gone(self, event: ClientGone) -> None:
        client = self._client(event.client)
        if client.id in self._plans:
            self._stop_waiting(client.id)
        for request in list(client.requests.values()):
            waiting = self._waiting[request.key]
            waiting.remove(request)
            if not waiting:
                del self._waiting[request.key]
            self._close(request)
        leases = list(client.leases.values())
        client.leases.clear()
        for slot in leases:
            slot.leases -= 1
        self._drop_plan(client)
        del self._clients[client.id]
        self._ledger.close(client.id)
        for slot in {slot.id: slot for slot in leases}.values():
            self._policy.resident(slot)
            self._no_longer_used(slot)
        self._story.tell(
            self._now, "gone", None, "client {} left {} leases behind", client.id, len(leases)
        )

    def _plan(self, event: Plan) -> None:
        client = self._client(event.client)
        model = self._served(event.model)
        if isinstance(model, str):
            self._refuse(event, model, f"model {event.model} is not served")
            return
        layers = len(model.slots)
        wrong = next((layer for layer in event.order if not 0 <= layer < layers), None)
        if not event.order or event.lookahead < 0 or wrong is not None:
            what = f"layer {wrong}" if wrong is not None else f"lookahead {event.lookahead}"
            self._refuse(
                event,
                "bad_request",
                f"a plan over model '{model.name}' needs layers 0 to {layers - 1} and a lookahead "
                f">= 0; this one has {what if event.order else 'no layers'}",
            )
            return
        if client.id in self._plans:
            self._withdraw(self._plans[client.id], "bad_request", "a later plan replaces this one")
        largest = max(event.order, key=lambda layer: model.charges[layer])
        reserve = model.charges[largest]
        if self._ledger.admits(client.id, reserve=reserve):
            self._admit(event, client, model, reserve)
        elif self._ledger.admits_once_released(client.id, reserve):
            self._plans[client.id] = event
            self._ledger.awaited += reserve
            self._story.tell(
                self._now, "wait", None, "the plan of client {} waits until others hold no more "
                "than their reserves", client.id,
            )  # fmt: skip
        else:
            self._refuse_too_small(event, model, largest, client)

    def _admit_waiting(self) -> None:
        """Admits the plans that fit now, refuses those that have waited long enough."""
        for plan in list(self._plans.values()):
            model = self._models[plan.model]
            reserve = max(model.charges[layer] for layer in plan.order)
            if self._ledger.admits(plan.client, reserve=reserve):
                self._stop_waiting(plan.client)
                self._admit(plan, self._clients[plan.client], model, reserve)
            elif self._now - plan.at_ns >= self.config.admission_patience_ns:
                self._stop_waiting(plan.client)
                largest = max(plan.order, key=lambda layer: model.charges[layer])
                self._refuse_too_small(plan, model, largest, self._clients[plan.client])

    def _withdraw(self, plan: Plan, code: str, text: str) -> None:
        self._stop_waiting(plan.client)
        self._refuse(plan, code, text)

    def _stop_waiting(self, client: int) -> None:
        plan = self._plans.pop(client)
        charges = self._models[plan.model].charges
        self._ledger.awaited -= max(charges[layer] for layer in plan.order)

    def _admit(self, event: Plan, client: Client, model: ModelState, reserve: int) -> None:
        self._ledger.set_reserve(client.id, reserve)
        self._drop_plan(client)
        client.plan = PlanState(
            model.id, event.order, cyclic=event.cyclic, lookahead=event.lookahead, at_ns=self._now
        )
        model.plans[client.id] = client.plan
        for layer in client.plan.layers():
            model.users[layer] += 1
        self._policy.plans_changed(model)
        nbytes = reserve * self.config.granule_bytes
        self._actions.append(Admit(client.id, event.request, nbytes))
        self._story.tell(
            self._now, "admit", None, "client {} on model '{}', {} bytes reserved", client.id,
            model.name, nbytes,
        )  # fmt: skip

    def _drop_plan(self, client: Client) -> None:
        if client.plan is None:
            return
        model = self._models[client.plan.model]
        del model.plans[client.id]
        for layer in client.plan.layers():
            model.users[layer] -= 1
        client.plan = None
        self._policy.plans_changed(model)

    # ----------------------------------------------------------------------------------- requests

    def _acquire(self, event: Acquire) -> None:
        client = self._client(event.client)
        key = event.key
        model = self._served(key.model)
        if isinstance(model, str):
            self._refuse(event, model, f"model {key.model} is not served")
            return
        if not 0 <= key.layer < len(model.slots):
            self._refuse(
                event, "not_found", f"model '{model.name}' has layers 0 to {len(model.slots) - 1}, "
                f"not {key.layer}",
            )  # fmt: skip
            return
        if not self._admitted(event, client, model):
            return
        idle = not client.leases and not client.requests
        self._ledger.hold(client.id, key, model.charges[key.layer])
        step_ns = 0
        if client.plan is not None:
            step_ns = client.plan.step_ns
            client.plan.last_ns = self._now
            if client.plan.model == key.model and not self._asked_already(client, key):
                client.plan.advance(key.layer, self._now)
        stalled = idle or not event.ahead
        self._arrivals += 1
        request = Request(
            client.id, event.request, key, self._now if stalled else None,
            self._now if stalled else self._now + step_ns, self._arrivals,
        )  # fmt: skip
        slot = model.slots[key.layer]
        if slot is not None and slot.state is SlotState.RESIDENT:
            self._count["hits"] += 1
            self._grant(request, client, slot)
            return
        self._count["misses"] += 1
        model.failed.discard(key.layer)
        client.requests[request.number] = request
        self._waiting.setdefault(key, []).append(request)
        self._enqueue(request)
        if slot is not None:
            slot.demanded = True
        self._story.tell(
            self._now, "wait", key, "client {} {}", client.id,
            "stalls for it" if stalled else "wants it ahead",
        )  # fmt: skip

    def _asked_already(self, client: Client, key: LayerKey) -> bool:
        """Asking again for what it just asked for does not move a client along its plan."""
        plan = client.plan
        return (
            plan is not None
            and plan.position >= 0
            and plan.order[plan.position] == key.layer
            and self._ledger[client.id].layers[key] > 1
        )

    def _admitted(self, event: Acquire, client: Client, model: ModelState) -> bool:
        """Whether the admission rule allows the request; answers it where not."""
        key = event.key
        charge = model.charges[key.layer]
        account = self._ledger[client.id]
        extra = self._ledger.extra(client.id, key, charge)
        if self._ledger.admits(client.id, extra=extra):
            if client.plan is None and charge > account.reserve and not account.held:
                self._ledger.set_reserve(client.id, charge)
            return True
        if event.ahead:
            self._count["later"] += 1
            self._actions.append(Later(client.id, event.request))
            self._story.tell(
                self._now, "later", key, "client {} holds {} granules, {} more are not free of "
                "other clients' reserves", client.id, account.held, extra,
            )  # fmt: skip
        elif not account.held:
            self._refuse_too_small(event, model, key.layer, client)
        else:
            granule = self.config.granule_bytes
            self._refuse(
                event,
                "lease_limit",
                f"client {client.id} holds {account.held * granule} bytes in "
                f"{len(client.leases)} leases and {len(client.requests)} requests, asks for "
                f"{extra * granule} more, its reserve is {account.reserve * granule} and "
                f"{max(self._ledger.available, 0) * granule} are available: release first",
            )
        return False

    def _release(self, event: Release) -> None:
        client = self._client(event.client)
        slot = client.leases.get(event.lease)
        if slot is None:
            raise self._illegal(f"client {event.client} has no lease {event.lease}")
        del client.leases[event.lease]
        slot.leases -= 1
        assert slot.key is not None
        self._ledger.let_go(client.id, slot.key)
        if client.plan is not None:
            client.plan.last_ns = self._now
        if not client.leases and client.requests:
            self._promote(client)
        self._policy.resident(slot)
        self._no_longer_used(slot)

    def _promote(self, client: Client) -> None:
        """The client has nothing left to compute with: it stalls for its oldest request."""
        requests = client.requests.values()
        if any(request.since_ns is not None for request in requests):
            return
        request = next(iter(requests))
        request.since_ns = self._now
        if request.deadline_ns > self._now:
            request.deadline_ns = self._now
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        heapq.heappush(self._queue, (request.deadline_ns, request.number, request))

    def _close(self, request: Request) -> None:
        """The request has its answer, or nobody wants one any more."""
        request.open = False
        client = self._clients[request.client]
        del client.requests[request.number]
        self._ledger.let_go(client.id, request.key)

    def _grant(self, request: Request, client: Client, slot: Slot) -> None:
        lease = self._next_lease
        self._next_lease += 1
        client.leases[lease] = slot
        slot.leases += 1
        waited_ns = 0 if request.since_ns is None else self._now - request.since_ns
        client.stall_ns += waited_ns
        client.granted += 1
        self._count["grants"] += 1
        self._count["stall_ns"] += waited_ns
        place = slot.place
        self._actions.append(
            Grant(
                client.id, request.request, lease, request.key, slot.id, slot.generation,
                slot.arena, place.offset, place.nbytes, waited_ns,
            )
        )  # fmt: skip
        self._story.tell(
            self._now, "grant", request.key, "client {} after {} ns", client.id, waited_ns
        )

    def _refuse(self, request: Plan | Acquire | Request, code: str, text: str) -> None:
        self._count["refusals"] += 1
        self._actions.append(Refuse(request.client, request.request, code, text))
        key = None if isinstance(request, Plan) else request.key
        self._story.tell(self._now, "refuse", key, "client {}: {}: {}", request.client, code, text)

    def _refuse_too_small(
        self, event: Plan | Acquire, model: ModelState, layer: int, client: Client
    ) -> None:
        granule = self.config.granule_bytes
        free = self._ledger.available + self._ledger[client.id].committed
        self._refuse(
            event,
            "budget_too_small",
            f"layer {layer} of model '{model.name}' needs {model.charges[layer] * granule} bytes; "
            f"{max(free, 0) * granule} of the budget of {self._memory.budget * granule} are "
            f"available ({len(self._clients) - 1} other clients, "
            f"{self._ledger.quarantined * granule} bytes in quarantine)",
        )

    # -------------------------------------------------------------------------------- completions

    def _read_done(self, event: ReadDone) -> None:
        slot = self._read_slot(event.slot)
        assert slot.key is not None
        del self._in_flight[slot.id]
        slot.state = SlotState.RESIDENT
        self._count["read_bytes"] += slot.place.nbytes
        self._policy.resident(slot)
        self._story.tell(self._now, "resident", slot.key, "in slot {}", slot.id)
        for request in self._waiting.pop(slot.key, ()):
            client = self._clients[request.client]
            request.open = False
            del client.requests[request.number]
            self._grant(request, client, slot)
        self._no_longer_used(slot)

    def _read_failed(self, event: ReadFailed) -> None:
        slot = self._read_slot(event.slot)
        key = slot.key
        assert key is not None
        del self._in_flight[slot.id]
        self._count["reads_failed"] += 1
        model = self._models[key.model]
        model.failed.add(key.layer)
        self._story.tell(self._now, "failed", key, "{}: {}", event.code, event.text)
        for request in self._waiting.pop(key, ()):
            self._close(request)
            self._refuse(request, event.code, event.text)
        self._evict(slot, "its read failed")
        self._forget_if_empty(model)

    def _discard_done(self, event: DiscardDone) -> None:
        granule = self.config.granule_bytes
        discard = Range(
            event.arena, event.offset // granule, (event.offset + event.nbytes) // granule
        )
        if not self._memory.is_discarding(discard):
            raise self._illegal(
                f"no discard of {event.nbytes} bytes at {event.offset} is under way"
            )
        self._memory.discarded(discard)

    # ------------------------------------------------------------------------------- warm restart

    def _adopted(self, event: Adopted) -> None:
        if self._slots or self._clients:
            raise self._illegal("slots can be adopted only before anything else happens")
        unknown = next((s for s in event.slots if not self._memory.has_arena(s.arena)), None)
        if unknown is not None:
            raise self._illegal(f"slot {unknown.slot} lies in arena {unknown.arena}: no such arena")
        places = [(s.arena, s.offset, s.nbytes) for s in event.slots]
        clash = self._memory.clash(places)
        if clash is not None or len({s.slot for s in event.slots}) < len(event.slots):
            raise self._illegal(f"slots cannot be adopted: {clash or 'one is there twice'}")
        for found in event.slots:
            self._adopt(found)
        self._numbers = SlotNumbers(tuple(self._slots))
        generations = [found.generation + 1 for found in event.slots]
        self._next_generation = max([self._next_generation, *generations])
        while self._memory.free < 0:
            victims = self._policy.victims(1, None, self._now)
            if victims is None:
                break
            for victim in victims:
                self._evict(victim.slot, "the budget is smaller than before the restart")

    def _adopt(self, found: AdoptedSlot) -> None:
        place = self._memory.adopt(found.arena, found.offset, found.nbytes)
        model = None if found.key is None else self._models.get(found.key.model)
        key = found.key
        if (
            key is None
            or model is None
            or model.arena != found.arena
            or not 0 <= key.layer < len(model.slots)
            or model.layer_bytes[key.layer] != found.nbytes
            or model.slots[key.layer] is not None
        ):
            key = model = None
        slot = Slot(found.slot, found.generation, key, found.arena, place, SlotState.RESIDENT)
        self._slots[slot.id] = slot
        if model is not None:
            model.put(slot)
            self._policy.resident(slot)
        for holder in found.holders:
            slot.holders[holder] = None
            self._holders.setdefault(holder, []).append(slot)
        if slot.holders:
            self._ledger.quarantined += place.range.granules
        what = "resident" if key is not None else "not served"
        self._story.tell(
            self._now, "adopt", key, "slot {}: {}, held by {} processes", slot.id, what,
            len(slot.holders),
        )  # fmt: skip
        self._no_longer_used(slot)

    def _holder_gone(self, event: HolderGone) -> None:
        for slot in self._holders.pop(event.holder, ()):
            del slot.holders[event.holder]
            if not slot.holders:
                self._ledger.quarantined -= slot.place.range.granules
                self._policy.resident(slot)
                self._no_longer_used(slot)

    # ------------------------------------------------------------------------------------ fetching

    def _advance(self) -> None:
        """Starts what can be started now: promised memory first, then requests, then plans."""
        if self._plans:
            self._admit_waiting()
        if self._memory.over_budget:
            self._discard(self._memory.shed())
        for slot in self._in_flight.values():
            if slot.claim is not None:
                if not self._memory.can_warm_up(slot.claim):
                    break
                self._memory.warm_up(slot.claim)
                self._read(slot)
        limit = self.config.reads_in_flight
        while len(self._in_flight) < limit and (request := self._next_request()) is not None:
            if not self._serve(request):
                return
        while len(self._in_flight) < limit and self._fetch_ahead():
            pass

    def _next_request(self) -> Request | None:
        """The accepted request with the earliest deadline whose layer is not on its way."""
        while self._queue:
            request = self._queue[0][2]
            key = request.key
            if request.open and self._models[key.model].slots[key.layer] is None:
                return request
            heapq.heappop(self._queue)
        return None

    def _serve(self, request: Request) -> bool:
        """Starts a read for the request; False if memory on its way must arrive first."""
        key = request.key
        model = self._models[key.model]
        claim = self._claim(model, key.layer, None)
        while claim is None:
            victims = self._policy.victims(1, None, self._now)
            if victims is None:
                break
            # Enough is free, but in pieces that are too short: clear more of the address space.
            self._evict_all(victims, key)
            claim = self._memory.claim(model.arena, model.layer_bytes[key.layer])
        if claim is not None:
            self._start(model, key, claim, demanded=True)
            return True
        if self._in_flight or self._memory.discarding:
            return False
        granule = self.config.granule_bytes
        text = (
            f"arena {model.arena} of {self._memory.span(model.arena) * granule} bytes has no "
            f"{model.charges[key.layer] * granule} contiguous bytes left for layer {key.layer} of "
            f"model '{model.name}': the longest free range is "
            f"{self._memory.longest_free_run(model.arena) * granule}"
        )
        for waiting in self._waiting.pop(key):
            self._close(waiting)
            self._refuse(waiting, "internal", text)
        return True

    def _fetch_ahead(self) -> bool:
        """Starts the read of the next missing layer of all plans, if that does no harm."""
        for candidate in self._policy.candidates():
            key = candidate.key
            model = self._models[key.model]
            due = candidate.due if candidate.may_evict else -NEVER
            if not candidate.may_evict and model.charges[key.layer] > self._memory.free:
                continue
            claim = self._claim(model, key.layer, due)
            if claim is not None:
                self._start(model, key, claim, demanded=False)
                return True
        return False

    def _claim(self, model: ModelState, layer: int, due: int | None) -> Claim | None:
        """Room for a layer, evicting what is due later than `due` (None: whatever must go)."""
        nbytes = model.layer_bytes[layer]
        claim = self._memory.claim(model.arena, nbytes)
        shortfall = model.charges[layer] - self._memory.free
        if claim is None and shortfall > 0:
            victims = self._policy.victims(shortfall, due, self._now)
            if victims is not None and due is not None:
                # Evicting for what then finds no address would turn the memory over for nothing.
                places = [victim.slot.place for victim in victims]
                run = self._memory.longest_free_run(model.arena, places)
                if run < model.charges[layer]:
                    return None
            if victims is not None:
                self._evict_all(victims, model.keys[layer])
                claim = self._memory.claim(model.arena, nbytes)
        return claim

    def _evict_all(self, victims: list[Victim], wanted: LayerKey) -> None:
        for victim in victims:
            due = "no plan uses it" if victim.due == NEVER else "its next use is further away"
            self._evict(victim.slot, "for {}: {}", f"{wanted.model}/{wanted.layer}", due)

    def _start(self, model: ModelState, key: LayerKey, claim: Claim, *, demanded: bool) -> None:
        slot = Slot(
            self._numbers.take(), self._next_generation, key, model.arena, claim.place,
            SlotState.CLAIMED, demanded, claim,
        )  # fmt: skip
        self._next_generation += 1
        self._slots[slot.id] = slot
        self._in_flight[slot.id] = slot
        model.put(slot)
        self._discard(claim.discards)
        if not claim.promised:
            self._read(slot)

    def _read(self, slot: Slot) -> None:
        assert slot.key is not None
        slot.state = SlotState.READING
        slot.claim = None
        self._count["reads"] += 1
        reason = "demand" if slot.demanded else "ahead"
        self._count["reads_ahead"] += not slot.demanded
        place = slot.place
        self._actions.append(
            Read(slot.id, slot.generation, slot.key, slot.arena, place.offset, place.nbytes, reason)
        )
        self._story.tell(self._now, "read", slot.key, "into slot {}: {}", slot.id, reason)

    def _discard(self, discards: Iterable[Range]) -> None:
        granule = self.config.granule_bytes
        for discard in discards:
            self._count["discards"] += 1
            offset, nbytes = discard.start * granule, discard.granules * granule
            self._actions.append(Discard(discard.arena, offset, nbytes))
            self._story.tell(
                self._now, "discard", None, "{} bytes at {} of arena {}", nbytes, offset,
                discard.arena,
            )  # fmt: skip

    # ------------------------------------------------------------------------------------ evicting

    def _no_longer_used(self, slot: Slot) -> None:
        """A lease or holder is gone: drop what is served no more."""
        if not slot.evictable:
            return
        if slot.key is None:
            self._evict(slot, "nothing that is served")
        elif (model := self._models[slot.key.model]).removed:
            self._evict(slot, "model '{}' was removed", model.name)
            self._forget_if_empty(model)

    def _evict(self, slot: Slot, reason: str, *values: object) -> None:
        """Empties a slot that nobody reads; its memory stays warm."""
        self._memory.release(slot.place)
        self._forget(slot)
        self._count["evictions"] += 1
        self._actions.append(Evict(slot.id, slot.generation, slot.key))
        self._story.tell(self._now, "evict", slot.key, reason, *values)

    def _abandon(self, slot: Slot) -> None:
        """Gives up a slot that still waits for its memory: no read was started."""
        assert slot.claim is not None
        self._memory.abandon(slot.claim)
        del self._in_flight[slot.id]
        self._forget(slot)

    def _forget(self, slot: Slot) -> None:
        del self._slots[slot.id]
        self._numbers.give_back(slot.id)
        self._policy.evicted(slot)
        if slot.key is not None:
            self._models[slot.key.model].drop(slot)

    # --------------------------------------------------------------------------------- small steps

    def _served(self, model: int) -> ModelState | str:
        """The model, or the code of the refusal."""
        if model in self._removed:
            return "model_removed"
        return self._models.get(model, "not_found")

    def _client(self, client: int) -> Client:
        found = self._clients.get(client)
        if found is None:
            raise self._illegal(f"client {client} is not connected")
        return found

    def _read_slot(self, number: int) -> Slot:
        slot = self._slots.get(number)
        if slot is None or slot.state is not SlotState.READING:
            key = None if slot is None else slot.key
            raise self._illegal(f"slot {number} is not being read", key)
        return slot

    def _illegal(self, text: str, key: LayerKey | None = None) -> IllegalEvent:
        return IllegalEvent(text, self._story.about(key)[-20:])

    # ------------------------------------------------------------------------------------- reports

    def snapshot(self) -> Snapshot:
        """The state between two events, in bytes and steps."""
        granule = self.config.granule_bytes
        memory = self._memory
        resident = leased = in_flight = 0
        for slot in self._slots.values():
            nbytes = slot.place.nbytes
            resident += nbytes * (slot.state is SlotState.RESIDENT and slot.key is not None)
            leased += nbytes * (slot.leases > 0)
            in_flight += nbytes * (slot.state is not SlotState.RESIDENT)
        return Snapshot(
            MemorySnapshot(
                memory.budget * granule, memory.warm * granule, memory.peak * granule,
                resident, leased, in_flight, self._ledger.quarantined * granule,
                self._ledger.committed * granule, memory.discarding * granule,
            ),
            Counters(**self._count),
            tuple(self._client_snapshot(client) for client in self._clients.values()),
            {
                model.id: tuple(self._layer_snapshot(model, i) for i in range(len(model.slots)))
                for model in self._models.values()
            },
        )  # fmt: skip

    def _client_snapshot(self, client: Client) -> ClientSnapshot:
        granule = self.config.granule_bytes
        account = self._ledger[client.id]
        plan = client.plan
        return ClientSnapshot(
            client.id,
            None if plan is None else plan.model,
            None if plan is None else max(plan.position, 0),
            len(client.leases),
            account.held * granule,
            len(client.requests),
            account.reserve * granule,
            client.stall_ns,
            client.granted,
        )

    def _layer_snapshot(self, model: ModelState, layer: int) -> LayerSnapshot:
        slot = model.slots[layer]
        distances = [plan.distance(layer) for plan in model.plans.values()]
        next_use = min((steps for steps in distances if steps is not None), default=None)
        nbytes = model.layer_bytes[layer]
        if slot is None:
            return LayerSnapshot(layer, nbytes, "absent", 0, None, None, next_use)
        state = "resident" if slot.state is SlotState.RESIDENT else "reading"
        return LayerSnapshot(layer, nbytes, state, slot.leases, slot.id, slot.generation, next_use)

    # --------------------------------------------------------------------------------------- check

    def check(self) -> None:
        """Raises InvariantBroken where the books contradict each other; costs O(everything)."""
        memory = self._memory
        over = memory.over_budget or self._ledger.quarantined > memory.budget
        if memory.warm > memory.budget and not (over or memory.discarding):
            raise InvariantBroken(f"{memory.warm} warm granules, the budget is {memory.budget}")
        memory.check([(slot.place, slot.claim is None) for slot in self._slots.values()])
        self._ledger.check(over_budget=over)
        self._check_slots()
        self._check_clients()

    def _check_slots(self) -> None:
        leases = Counter(id(s) for client in self._clients.values() for s in client.leases.values())
        for slot in self._slots.values():
            if slot.leases != leases[id(slot)]:
                raise InvariantBroken(f"slot {slot.id} counts {slot.leases} leases")
            in_flight = slot.state is not SlotState.RESIDENT
            if in_flight != (slot.id in self._in_flight) or (in_flight and slot.leases):
                raise InvariantBroken(f"slot {slot.id} is {slot.state.value}, but is not")
            if (slot.claim is not None) != (slot.state is SlotState.CLAIMED):
                raise InvariantBroken(f"slot {slot.id} is {slot.state.value} with a claim")
            if slot.key is None and not slot.holders:
                raise InvariantBroken(f"slot {slot.id} holds nothing for nobody")
            if slot.key is not None:
                model = self._models[slot.key.model]
                if model.slots[slot.key.layer] is not slot:
                    raise InvariantBroken(f"slot {slot.id} is not where its layer is")
                if slot.evictable and model.removed:
                    raise InvariantBroken(f"slot {slot.id} holds a layer that nobody can ask for")
        if len(self._in_flight) > self.config.reads_in_flight:
            raise InvariantBroken(f"{len(self._in_flight)} reads in flight")
        quarantined = sum(s.place.range.granules for s in self._slots.values() if s.holders)
        if quarantined != self._ledger.quarantined:
            raise InvariantBroken(f"{quarantined} granules in quarantine")
        for model in self._models.values():
            if model.missing != model.slots.count(None):
                raise InvariantBroken(f"model {model.id} misses {model.missing} layers")

    def _check_clients(self) -> None:
        awaited = sum(
            max(self._models[plan.model].charges[layer] for layer in plan.order)
            for plan in self._plans.values()
        )
        if awaited != self._ledger.awaited:
            raise InvariantBroken(f"{awaited} granules awaited, booked {self._ledger.awaited}")
        waiting = [request for requests in self._waiting.values() for request in requests]
        mine = [request for c in self._clients.values() for request in c.requests.values()]
        if {id(r) for r in waiting} != {id(r) for r in mine} or not all(r.open for r in waiting):
            raise InvariantBroken("a request waits for a layer without its client, or not at all")
        for client in self._clients.values():
            held = Counter(s.key for s in client.leases.values())
            held.update(request.key for request in client.requests.values())
            if held != self._ledger[client.id].layers:
                raise InvariantBroken(f"client {client.id} is charged for other layers than it has")
        queued = {id(request) for _, _, request in self._queue}
        for request in waiting:
            slot = self._models[request.key.model].slots[request.key.layer]
            if slot is None and id(request) not in queued:
                raise InvariantBroken(f"client {request.client} waits and is not queued")
            if slot is not None and slot.state is SlotState.RESIDENT:
                raise InvariantBroken(f"client {request.client} waits for a resident layer")
