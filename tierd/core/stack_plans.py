"""Plans of clients on GPUs: offered there once their feed is open, and what DRAM hears of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import Hint, WeightChanged

if TYPE_CHECKING:
    from tierd.core.model import LayerKey, Plan, PlanOver
    from tierd.core.stack_books import StackBooks
    from tierd.core.stack_feed import Feed


class FeedPlans:
    """Which feed each plan is of, and how far it has come."""

    def __init__(self, books: StackBooks) -> None:
        self.waiting: dict[int, Feed] = {}  #: by client: its plan waits until that feed is open
        self.offered: dict[int, Feed] = {}  #: by client: its plan is with the GPU's machine
        self.using: dict[int, Feed] = {}  #: by client: its plan was admitted
        self._books = books
        self._pressed = [gpu.pressed for gpu in books.gpus]

    # ------------------------------------------------------------------------- from clients to GPUs

    def plan(self, feed: Feed, event: Plan) -> None:
        """Offers the plan to the GPU's machine, once DRAM has the reserve of its feed."""
        earlier = self.waiting.pop(event.client, None)
        if earlier is not None:
            plan = earlier.waiting.pop(event.client)
            self._books.refuse(plan, "bad_request", "a later plan replaces this one")
        feed.waiting[event.client] = event
        self.waiting[event.client] = feed
        if feed.open:
            self.offer(feed)
        if earlier is not None:
            self._books.settle(earlier)

    def offer(self, feed: Feed) -> None:
        """The feed is open: the GPU's machine decides about the plans that waited for it."""
        for client, plan in feed.waiting.items():
            del self.waiting[client]
            before = self.offered.pop(client, None)
            if before is not None:
                del before.offered[client]
            self.offered[client] = feed
            feed.offered[client] = plan
            self._books.todo.append((feed.gpu, plan))
            if before is not None and before is not feed:
                self._books.settle(before)
        feed.waiting.clear()

    def not_opened(self, feed: Feed, code: str, text: str) -> None:
        """DRAM has no reserve for the feed."""
        for client, plan in feed.waiting.items():
            del self.waiting[client]
            self._books.refuse(plan, code, text)
        feed.waiting.clear()

    def admitted(self, client: int) -> None:
        """By the GPU's machine."""
        feed = self.offered.pop(client)
        plan = feed.offered.pop(client)
        if self.using.get(client) is not feed:
            self._leave(client)
            self.using[client] = feed
        feed.users[client] = plan
        feed.weights[client] = self._books.gpus[feed.gpu].books.clients[client].weight
        self._weigh(feed)
        self.declare(feed)
        self.declare_if_all_stays(feed)

    def refused(self, client: int, request: int) -> None:
        """By the GPU's machine, if it was a plan."""
        feed = self.offered.get(client)
        if feed is not None and feed.offered[client].request == request:
            del self.offered[client], feed.offered[client]
            self._books.settle(feed)

    def over(self, event: PlanOver) -> None:
        """The client's plan over the model is, also one that waits for its feed."""
        feed = self.waiting.get(event.client)
        if feed is not None and feed.model == event.model:
            del self.waiting[event.client]
            plan = feed.waiting.pop(event.client)
            self._books.refuse(plan, "bad_request", "the client took its plan back")
            self._books.settle(feed)
        if (feed := self.using.get(event.client)) is not None and feed.model == event.model:
            self._leave(event.client)

    def forget(self, client: int, gpu: int) -> None:
        """The client is gone, and with it its plans and requests."""
        for where, plans in ((self.waiting, "waiting"), (self.offered, "offered")):
            feed = where.pop(client, None)
            if feed is not None:
                del getattr(feed, plans)[client]
                self._books.settle(feed)
        self._leave(client)
        self._books.settle_all(gpu)

    def drop(self, model: int) -> None:
        """The model was removed from every machine, and so were all plans over it."""
        for feed in [feed for feed in self._books.feeds.values() if feed.model == model]:
            for client in feed.users:
                del self.using[client]
            feed.users.clear()
            feed.weights.clear()
            self._weigh(feed)
            self._books.settle(feed)

    def _leave(self, client: int) -> None:
        """The client's plan is no longer one of its feed's."""
        feed = self.using.pop(client, None)
        if feed is not None:
            led = feed.leader == client
            del feed.users[client], feed.weights[client]
            self._weigh(feed)
            if led and feed.users:
                self.declare(feed)
            self._books.settle(feed)

    def _weigh(self, feed: Feed) -> None:
        """Tells DRAM another weight; a feed that is no client there brings it along when it is."""
        if feed.weight != feed.weight_now:
            feed.weight = feed.weight_now
            if feed.joined:
                weighs = WeightChanged(self._books.now, feed.id, feed.weight)
                self._books.todo.append((None, weighs))

    # ------------------------------------------------------------------------------ what DRAM hears

    def asked(self, client: int, gpu: int, key: LayerKey) -> None:
        """The client asked its GPU for the layer."""
        feed = self.using.get(client)
        if (
            feed is not None
            and (feed.gpu, feed.model) == (gpu, key.model)
            and feed.asked(client, key.layer)
        ):
            self.declare(feed)

    def hinted(self, event: Hint) -> None:
        """DRAM hears the leader's hints, of what is not on the GPU already."""
        feed = self.using.get(event.client)
        if feed is None or feed.direct or feed.leader != event.client or feed.model != event.model:
            return
        missing = [i for i, layer in enumerate(event.layers) if layer not in feed.on_gpu]
        layers = tuple(event.layers[i] for i in missing)
        chances = tuple(event.probabilities_ppm[i] for i in missing)
        hint = Hint(self._books.now, feed.id, event.model, layers, chances, event.steps)
        self._books.todo.append((None, hint))

    def declare(self, feed: Feed) -> None:
        """Tells DRAM the feed's plan, if it differs from what it knows; a direct one has none."""
        if feed.direct:
            return
        plan = feed.plan(self._books.now, self._books.request())
        if feed.declares(plan):
            self._books.todo.append((None, plan))

    def declare_if_all_stays(self, feed: Feed) -> None:
        """Where everything fits on the GPU, nobody needs in DRAM what is there."""
        if feed.users and not (self._pressed[feed.gpu] or feed.parked or feed.busy):
            feed.all_stays()
            self.declare(feed)

    def pressed(self, gpu: int, *, pressed: bool) -> None:
        """Whether everything fits on the GPU, after each event there."""
        if pressed is not self._pressed[gpu]:
            self._pressed[gpu] = pressed
            for feed in self._books.feeds.values():
                if feed.gpu == gpu:
                    self.declare_if_all_stays(feed)
