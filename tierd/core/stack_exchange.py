"""What runs between the machines: what a GPU's wants becomes requests in DRAM, and copies.

Opens and closes the feeds for it, and hands what one machine decides to the others: plans by
`stack_plans`, layers by `stack_copies`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    Evict,
    Grant,
    Later,
    Read,
    ReadFailed,
    Refuse,
)
from tierd.core.residency import SlotState
from tierd.core.stack_books import StackBooks
from tierd.core.stack_copies import FeedCopies
from tierd.core.stack_feed import Feed
from tierd.core.stack_plans import FeedPlans

if TYPE_CHECKING:
    from tierd.core.model import Event, Plan
    from tierd.core.stack_model import StackConfig

ANSWERS = Grant | Later | Admit | Refuse


class Exchange:
    """Opens and closes them, and carries actions from each machine to the others."""

    def __init__(self, config: StackConfig) -> None:
        self.books = StackBooks(config)
        self.plans = FeedPlans(self.books)
        self.copies = FeedCopies(self.books, self.plans)
        self._last_feed = 0

    @property
    def feeds(self) -> dict[tuple[int, int], Feed]:
        """By GPU and model."""
        return self.books.feeds

    # ---------------------------------------------------------------------------- between machines

    def deliver(self, gpu: int | None, event: Event) -> None:
        """Gives the event to the machine of the tier, and takes what that decides."""
        books = self.books
        if gpu is not None:
            machine = books.gpus[gpu]
            for action in machine.handle(event):
                self._act_on_gpu(gpu, action)
            self.plans.pressed(gpu, pressed=machine.pressed)
            return
        feed = None
        if isinstance(event, Acquire) and event.client < 0:
            feed = books.feed_of[event.client]
            if self.copies.is_gone(feed, event):
                return
        broken = books.dram.books.slots.get(event.slot) if isinstance(event, ReadFailed) else None
        actions = books.dram.handle(event)
        if broken is not None:
            self.copies.source_failed(broken)
        for action in actions:
            if isinstance(action, ANSWERS) and action.client < 0:
                asker = books.feed_of.get(action.client)
                if asker is not None:  # else it was closed in the meantime
                    self._answer(asker, action)
                continue
            books.actions.append(action)
            if isinstance(action, Read):
                self.copies.dram_reads(action.key)
        if feed is not None and isinstance(event, Acquire):
            self.copies.start_early(feed, event.request)

    def work_off(self) -> None:
        """Until no machine owes another anything."""
        books = self.books
        while books.todo or books.unsettled:
            while books.todo:
                self.deliver(*books.todo.popleft())
            while books.unsettled:
                self._settle(books.unsettled.popitem()[1])

    def _act_on_gpu(self, gpu: int, action: Action) -> None:
        match action:
            case Read():
                self.copies.read(self._feed(gpu, action.key.model), action)
            case Evict():
                self.copies.evicted(gpu, action)
            case Admit():
                self.books.actions.append(action)
                self.plans.admitted(action.client)
            case Refuse():
                self.books.actions.append(action)
                self.plans.refused(action.client, action.request)
                self.books.settle_all(gpu)
            case _:
                self.books.actions.append(action)

    def _answer(self, feed: Feed, action: Grant | Later | Admit | Refuse) -> None:
        """DRAM answered a pseudo-client."""
        match action:
            case Admit():
                if not feed.open:
                    feed.open = True
                    self.plans.offer(feed)
                    self.copies.pump(feed)
            case Refuse() if not (feed.open or feed.asked_for(action.request)):
                # DRAM has no reserve for it: nobody on this GPU can have the model now.
                self.plans.not_opened(feed, action.code, action.text)
                self.copies.not_opened(feed, action)
                self._close(feed)
            case Grant() | Later() | Refuse():
                self.copies.answer(feed, action)

    # --------------------------------------------------------------------------------------- feeds

    def plan(self, gpu: int, event: Plan) -> None:
        """A client of the GPU wants to follow it."""
        self.plans.plan(self._feed(gpu, event.model), event)

    def _feed(self, gpu: int, model: int) -> Feed:
        books = self.books
        feed = books.feeds.get((gpu, model))
        if feed is None:
            self._last_feed -= 1
            placed = books.gpus[gpu].books.models[model]
            feed = Feed(
                self._last_feed, gpu, model, placed.layer_bytes, books.config.is_direct(gpu)
            )
            for layer, slot in enumerate(placed.slots):
                if slot is not None and slot.state is SlotState.RESIDENT:
                    feed.on_gpu[layer] = -1  # before the first pass
            books.feeds[gpu, model] = books.feed_of[feed.id] = feed
            if not feed.direct:
                self.copies.join(feed)
                self.plans.declare(feed)
        return feed

    def _settle(self, feed: Feed) -> None:
        """Closes the feed when nobody needs it; takes its plan back when only requests do."""
        if feed.users or feed.id not in self.books.feed_of:
            return
        if feed.idle and not self.wanted(feed):
            self._close(feed)
        elif feed.open and feed.model not in self.books.dram.books.removed:
            self.plans.declare(feed)

    def wanted(self, feed: Feed) -> bool:
        """Whether a request on its GPU waits for a layer of its model."""
        return any(key.model == feed.model for key in self.books.gpus[feed.gpu].books.waiting)

    def _close(self, feed: Feed) -> None:
        del self.books.feeds[feed.gpu, feed.model], self.books.feed_of[feed.id]
        self.copies.leave(feed)
