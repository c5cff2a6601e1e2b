"""The feeds of all GPUs: they turn what a GPU's machine wants into requests in DRAM, and copies.

Holds the machines and the order in which what one decides reaches the other: `todo` is worked off
before an event is over, so between two events no machine owes another anything.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    ClientGone,
    ClientJoined,
    Event,
    Evict,
    Grant,
    Hint,
    Later,
    Plan,
    Read,
    ReadFailed,
    Refuse,
    Release,
)
from tierd.core.residency import SlotState
from tierd.core.stack_feed import Feed
from tierd.core.stack_model import Copy, StackAction, Unload

if TYPE_CHECKING:
    from tierd.core.model import LayerKey, PlanOver
    from tierd.core.stack_feed import Copying
    from tierd.core.stack_model import StackConfig

ANSWERS = Grant | Later | Admit | Refuse


class Feeds:
    """The machines and what runs between them."""

    def __init__(self, config: StackConfig) -> None:
        self.dram = TierMachine(config.dram)
        self.gpus = tuple(TierMachine(gpu) for gpu in config.gpus)
        self.feeds: dict[tuple[int, int], Feed] = {}  #: by GPU and model
        self.waiting: dict[int, Feed] = {}  #: by client: its plan waits until that feed is open
        self.offered: dict[int, Feed] = {}  #: by client: its plan is with the GPU's machine
        self.using: dict[int, Feed] = {}  #: by client: its plan was admitted
        self.now = 0
        self.todo: deque[tuple[int | None, Event]] = deque()  #: GPU, or None for DRAM; event
        self.actions: list[StackAction] = []
        self._feed_of: dict[int, Feed] = {}  #: by pseudo-client
        self._unheard: set[tuple[int, int]] = set()  #: slots of GPUs without a copy, to be emptied
        self._unsettled: dict[int, Feed] = {}  #: that perhaps nobody needs any more
        self._pressed = [gpu.pressed for gpu in self.gpus]
        self._last_feed = 0
        self._requests = 0

    # ---------------------------------------------------------------------------- between machines

    def deliver(self, gpu: int | None, event: Event) -> None:
        """Gives the event to the machine of the tier, and takes what that decides."""
        if gpu is not None:
            machine = self.gpus[gpu]
            for action in machine.handle(event):
                self._act_on_gpu(gpu, action)
            if machine.pressed is not self._pressed[gpu]:
                self._pressed[gpu] = machine.pressed
                for one in self.feeds.values():
                    if one.gpu == gpu:
                        self._declare_if_all_stays(one)
            return
        for action in self.dram.handle(event):
            if isinstance(action, ANSWERS) and action.client < 0:
                feed = self._feed_of.get(action.client)
                if feed is not None:  # else it was closed in the meantime
                    self._answer(feed, action)
            else:
                self.actions.append(action)

    def work_off(self) -> None:
        """Until no machine owes another anything."""
        while self.todo or self._unsettled:
            while self.todo:
                self.deliver(*self.todo.popleft())
            while self._unsettled:
                self._settle(self._unsettled.popitem()[1])

    def _act_on_gpu(self, gpu: int, action: Action) -> None:
        match action:
            case Read():
                self._read(gpu, action)
            case Evict():
                if (gpu, action.slot) in self._unheard:
                    self._unheard.remove((gpu, action.slot))
                else:
                    unload = Unload(gpu, action.slot, action.generation, action.key)
                    self.actions.append(unload)
                feed = None if action.key is None else self.feeds.get((gpu, action.key.model))
                if feed is not None and action.key is not None:
                    feed.on_gpu.pop(action.key.layer, None)
            case Admit():
                self.actions.append(action)
                self._plan_admitted(action.client)
            case Refuse():
                self.actions.append(action)
                self._plan_refused(action.client, action.request)
                self._settle_all(gpu)
            case _:
                self.actions.append(action)

    def _answer(self, feed: Feed, action: Grant | Later | Admit | Refuse) -> None:
        """DRAM answered a pseudo-client."""
        match action:
            case Admit():
                if not feed.open:
                    feed.open = True
                    self._offer_plans(feed)
                    self._pump(feed)
            case Grant():
                read = feed.granted(action)
                self.actions.append(
                    Copy(
                        feed.gpu, read.slot, read.generation, read.key, read.arena, read.offset,
                        read.nbytes, action.slot, action.arena, action.offset, read.reason,
                    )
                )  # fmt: skip
            case Later():
                heapq.heappush(feed.parked, feed.asking.pop(action.request))
                feed.full = True
            case Refuse():
                if action.request in feed.asking:
                    _, read = feed.asking.pop(action.request)
                    feed.full = False
                    self._fail(feed, read, action)
                    self._pump(feed)
                    self.settle(feed)
                elif not feed.open:
                    self._not_opened(feed, action)

    # --------------------------------------------------------------------------------------- plans

    def plan(self, gpu: int, event: Plan) -> None:
        """Offers the plan to the GPU's machine, once DRAM has the reserve of its feed."""
        earlier = self.waiting.pop(event.client, None)
        if earlier is not None:
            plan = earlier.waiting.pop(event.client)
            self._refuse(plan, "bad_request", "a later plan replaces this one")
        feed = self._feed(gpu, event.model)
        feed.waiting[event.client] = event
        self.waiting[event.client] = feed
        if feed.open:
            self._offer_plans(feed)
        if earlier is not None:
            self.settle(earlier)

    def _offer_plans(self, feed: Feed) -> None:
        for client, plan in feed.waiting.items():
            del self.waiting[client]
            before = self.offered.pop(client, None)
            if before is not None:
                del before.offered[client]
            self.offered[client] = feed
            feed.offered[client] = plan
            self.todo.append((feed.gpu, plan))
            if before is not None and before is not feed:
                self.settle(before)
        feed.waiting.clear()

    def _plan_admitted(self, client: int) -> None:
        feed = self.offered.pop(client)
        plan = feed.offered.pop(client)
        if self.using.get(client) is not feed:
            self._leave(client)
            self.using[client] = feed
        feed.users[client] = plan
        self._declare(feed)
        self._declare_if_all_stays(feed)

    def _plan_refused(self, client: int, request: int) -> None:
        feed = self.offered.get(client)
        if feed is not None and feed.offered[client].request == request:
            del self.offered[client], feed.offered[client]
            self.settle(feed)

    def drop(self, model: int) -> None:
        """The model was removed from every machine, and so were all plans over it."""
        for feed in [feed for feed in self.feeds.values() if feed.model == model]:
            for client in feed.users:
                del self.using[client]
            feed.users.clear()
            self.settle(feed)

    def forget(self, client: int, gpu: int) -> None:
        """The client is gone, and with it its plans and requests."""
        for where, plans in ((self.waiting, "waiting"), (self.offered, "offered")):
            feed = where.pop(client, None)
            if feed is not None:
                del getattr(feed, plans)[client]
                self.settle(feed)
        self._leave(client)
        self._settle_all(gpu)

    def _leave(self, client: int) -> None:
        """The client's plan is no longer one of its feed's."""
        feed = self.using.pop(client, None)
        if feed is not None:
            led = feed.leader == client
            del feed.users[client]
            if led and feed.users:
                self._declare(feed)
            self.settle(feed)

    def over(self, event: PlanOver) -> None:
        """The client's plan over the model is, also one that waits for its feed."""
        feed = self.waiting.get(event.client)
        if feed is not None and feed.model == event.model:
            del self.waiting[event.client]
            plan = feed.waiting.pop(event.client)
            self._refuse(plan, "bad_request", "the client took its plan back")
            self.settle(feed)
        if (feed := self.using.get(event.client)) is not None and feed.model == event.model:
            self._leave(event.client)

    def asked(self, client: int, gpu: int, key: LayerKey) -> None:
        """The client asked its GPU for the layer."""
        feed = self.using.get(client)
        if (
            feed is not None
            and (feed.gpu, feed.model) == (gpu, key.model)
            and feed.asked(client, key.layer)
        ):
            self._declare(feed)

    def hinted(self, event: Hint) -> None:
        """DRAM hears the leader's hints, of what is not on the GPU already."""
        feed = self.using.get(event.client)
        if feed is None or feed.leader != event.client or feed.model != event.model:
            return
        missing = [i for i, layer in enumerate(event.layers) if layer not in feed.on_gpu]
        layers = tuple(event.layers[i] for i in missing)
        chances = tuple(event.probabilities_ppm[i] for i in missing)
        hint = Hint(self.now, feed.id, event.model, layers, chances, event.steps)
        self.todo.append((None, hint))

    # --------------------------------------------------------------------------------------- feeds

    def _feed(self, gpu: int, model: int) -> Feed:
        feed = self.feeds.get((gpu, model))
        if feed is None:
            self._last_feed -= 1
            placed = self.gpus[gpu].books.models[model]
            feed = Feed(self._last_feed, gpu, model, placed.layer_bytes)
            for layer, slot in enumerate(placed.slots):
                if slot is not None and slot.state is SlotState.RESIDENT:
                    feed.on_gpu[layer] = -1  # before the first pass
            self.feeds[gpu, model] = self._feed_of[feed.id] = feed
            self.todo.append((None, ClientJoined(self.now, feed.id)))
            self._declare(feed)
        return feed

    def _declare(self, feed: Feed) -> None:
        """Tells DRAM the feed's plan, where it differs from what it knows."""
        self._requests += 1
        plan = feed.plan(self.now, self._requests)
        if feed.declares(plan):
            self.todo.append((None, plan))

    def _declare_if_all_stays(self, feed: Feed) -> None:
        """Where everything fits on the GPU, nobody needs in DRAM what is there."""
        if feed.users and not (self._pressed[feed.gpu] or feed.parked or feed.holds):
            feed.all_stays()
            self._declare(feed)

    def settle(self, feed: Feed) -> None:
        """Looks at the end of the event whether the feed is still needed."""
        if not feed.users:
            self._unsettled[feed.id] = feed

    def _settle_all(self, gpu: int) -> None:
        """A request on the GPU ended without its layer: perhaps a feed was open only for it."""
        for feed in self.feeds.values():
            if feed.gpu == gpu:
                self.settle(feed)

    def _settle(self, feed: Feed) -> None:
        """Closes the feed when nobody needs it; takes its plan back when only requests do."""
        if feed.users or feed.id not in self._feed_of:
            return
        if feed.idle and not self.wanted(feed):
            self._close(feed)
        elif feed.open and feed.model not in self.dram.books.removed:
            self._declare(feed)

    def wanted(self, feed: Feed) -> bool:
        """Whether a request on its GPU waits for a layer of its model."""
        return any(key.model == feed.model for key in self.gpus[feed.gpu].books.waiting)

    def _close(self, feed: Feed) -> None:
        del self.feeds[feed.gpu, feed.model], self._feed_of[feed.id]
        self.todo.append((None, ClientGone(self.now, feed.id)))

    def _not_opened(self, feed: Feed, refusal: Refuse) -> None:
        """DRAM has no reserve for it: nobody on this GPU can have the model now."""
        for client, plan in feed.waiting.items():
            del self.waiting[client]
            self._refuse(plan, refusal.code, refusal.text)
        feed.waiting.clear()
        for _, read in sorted(feed.parked, key=lambda parked: parked[0]):
            self._fail(feed, read, refusal)
        feed.parked.clear()
        self._close(feed)

    # -------------------------------------------------------------------------------------- copies

    def _read(self, gpu: int, read: Read) -> None:
        feed = self._feed(gpu, read.key.model)
        feed.reading(read)
        self._requests += 1
        heapq.heappush(feed.parked, (self._requests, read))
        self._pump(feed)

    def _pump(self, feed: Feed) -> None:
        """Asks DRAM for what the GPU wants to read.

        Only beside others of its own is a layer asked for as one ahead, which DRAM may put off:
        alone it is within the feed's reserve, and never is.
        """
        while feed.open and feed.parked and not feed.full:
            number, read = heapq.heappop(feed.parked)
            self._requests += 1
            acquire = Acquire(self.now, feed.id, self._requests, read.key, ahead=feed.holds)
            feed.asking[self._requests] = (number, read)
            self.todo.append((None, acquire))

    def copying(self, gpu: int, slot: int) -> tuple[Feed, Copying] | None:
        """The copy to this slot that is under way, and its feed."""
        found = self.gpus[gpu].books.slots.get(slot)
        feed = None
        if found is not None and found.key is not None:
            feed = self.feeds.get((gpu, found.key.model))
        if feed is None or slot not in feed.copying:
            return None
        return feed, feed.copying[slot]

    def copied(self, feed: Feed, copying: Copying) -> None:
        """The copy is over: its lease in DRAM ends, and what that kept out comes in."""
        del feed.copying[copying.read.slot]
        self.todo.append((None, Release(self.now, feed.id, copying.lease)))
        feed.full = False
        self._pump(feed)
        self.settle(feed)
        self._declare_if_all_stays(feed)

    def _fail(self, feed: Feed, read: Read, refusal: Refuse) -> None:
        """DRAM cannot give the layer; the shell never heard of the slot that waits for it."""
        self._unheard.add((feed.gpu, read.slot))
        failed = ReadFailed(self.now, read.slot, refusal.code, refusal.text)
        self.todo.append((feed.gpu, failed))

    def _refuse(self, plan: Plan, code: str, text: str) -> None:
        self.actions.append(Refuse(plan.client, plan.request, code, text))
