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
from tierd.core.books import Books
from tierd.core.budget import Budget
from tierd.core.convoy import Convoys
from tierd.core.emptying import Emptier
from tierd.core.errors import IllegalEvent
from tierd.core.fetching import Fetcher
from tierd.core.invariants import check_books
from tierd.core.inventory import Inventory
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
from tierd.core.requests import Requests
from tierd.core.residency import Slot, SlotState
from tierd.core.restart import Restart
from tierd.core.snapshot import Snapshot, snapshot_of
from tierd.core.whereabouts import Whereabouts, whereabouts_of

if TYPE_CHECKING:
    from tierd.core.story import Decision, Story


class TierMachine:
    """One budget of DRAM, its arenas, the models that it serves and the clients that use them."""

    def __init__(self, config: CoreConfig) -> None:
        self._books = books = Books(config)
        self._answers = answers = Answers(books)
        self._convoys = convoys = Convoys(books)
        self._admission = admission = Admission(books, answers, convoys)
        self._emptier = emptier = Emptier(books)
        self._fetcher = Fetcher(books, answers, emptier)
        self._restart = restart = Restart(books, emptier)
        self._pins = pins = Pins(books, emptier)
        self._budget = Budget(books)
        self._requests = Requests(books, answers, admission, convoys, emptier)
        self._inventory = Inventory(books, answers, admission, convoys, emptier, restart, pins)

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
                self._requests.acquire(request)
        self._convoys.expire()
        self._fetcher.advance()
        books.story.keep(books.now, event, actions, books.told)
        return actions

    def _decide(self, event: Event) -> None:
        match event:
            case Acquire():
                self._requests.acquire(event)
            case Release():
                self._requests.release(event)
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
                self._inventory.client_joined(event)
            case WeightChanged():
                self._inventory.weight_changed(event)
            case ClientGone():
                self._inventory.client_gone(event)
            case ArenaAdded():
                self._inventory.arena_added(event)
            case ModelAdded():
                self._inventory.model_added(event)
            case ModelRemoved():
                self._inventory.model_removed(event)
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

    def _hint(self, event: Hint) -> None:
        plan = self._books.client(event.client).plan
        if plan is not None and plan.kind == "open" and plan.model == event.model:
            plan.hint(event)
            self._books.policy.touched(event.client, plan)

    def _read_done(self, event: ReadDone) -> None:
        slot = self._read_slot(event.slot)
        assert slot.key is not None
        self._emptier.ended(slot, arrived=True)
        slot.state = SlotState.RESIDENT
        self._books.count["read_bytes"] += slot.place.nbytes
        self._books.policy.resident(slot)
        self._books.tell("resident", slot.key, "in slot {}", slot.id)
        for request in self._books.waiting.pop(slot.key, ()):
            client = self._books.clients[request.client]
            self._answers.end(request, client)
            self._answers.grant(request, client, slot)
        self._emptier.no_longer_used(slot)

    def _read_failed(self, event: ReadFailed) -> None:
        slot = self._read_slot(event.slot)
        key = slot.key
        assert key is not None
        self._emptier.ended(slot, arrived=False)
        self._books.count["reads_failed"] += 1
        model = self._books.models[key.model]
        model.failed.add(key.layer)
        self._books.tell("failed", key, "{}: {}", event.code, event.text)
        for request in self._books.waiting.pop(key, ()):
            self._answers.close(request)
            self._answers.refuse(request, event.code, event.text)
        self._emptier.evict(slot, "its read failed")
        self._emptier.forget_if_empty(model)

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
