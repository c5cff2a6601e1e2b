"""Layers on their way to GPUs: what a GPU's machine wants to read, until it is there or failed.

    parked -> asking at DRAM -> (filling: copied while it is read ->) copied under a lease in DRAM
           -> read past DRAM

A copy is early (`Copy.filling`) where the layer that the feed asked for is being read: the request
stays open, and its grant makes the copy that of the lease. Where the request is refused instead,
the copy is stopped; where the copy fails first, the request becomes an orphan. The GPU's machine
hears of the end of a read when nothing writes to its slot any more, never before.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from tierd.core.model import (
    Acquire,
    ClientGone,
    ClientJoined,
    Grant,
    Later,
    ReadFailed,
    Refuse,
    Release,
)
from tierd.core.residency import SlotState
from tierd.core.stack_feed import Copying
from tierd.core.stack_model import Copy, DirectRead, StopCopy, Unload

if TYPE_CHECKING:
    from tierd.core.model import Evict, LayerKey, Read
    from tierd.core.residency import Slot
    from tierd.core.stack_books import StackBooks
    from tierd.core.stack_feed import Feed
    from tierd.core.stack_plans import FeedPlans


class FeedCopies:
    """Asks DRAM for layers, starts copies and direct reads, and ends them."""

    def __init__(self, books: StackBooks, plans: FeedPlans) -> None:
        self._books = books
        self._plans = plans
        self._unheard: set[tuple[int, int]] = set()  #: slots of GPUs without a copy, to be emptied

    # -------------------------------------------------------------------------------------- asking

    def read(self, feed: Feed, read: Read) -> None:
        """The GPU has a slot for a layer."""
        feed.reading(read)
        heapq.heappush(feed.parked, (self._books.request(), read))
        self.pump(feed)

    def pump(self, feed: Feed) -> None:
        """Asks DRAM for what the GPU wants to read.

        Only beside others of its own is a layer asked for as one ahead, which DRAM may put off:
        alone it is within the feed's reserve, and never is. A direct feed has no reserve: what DRAM
        puts off or has not, it reads past DRAM.
        """
        while feed.open and feed.parked and not feed.full:
            number, read = heapq.heappop(feed.parked)
            if feed.direct and self._books.in_dram(read.key) is None:
                self._read_directly(feed, read, "which has it not")
                continue
            if feed.direct and not feed.joined:
                self.join(feed)
            request = self._books.request()
            ahead = feed.direct or feed.holds
            acquire = Acquire(self._books.now, feed.id, request, read.key, ahead=ahead)
            feed.asking[request] = (number, read)
            self._books.todo.append((None, acquire))

    def is_gone(self, feed: Feed, event: Acquire) -> bool:
        """Whether the layer left DRAM between a direct feed's question and its delivery: then it is
        read past it."""
        if not feed.direct or self._books.in_dram(event.key) is not None:
            return False
        _, read = feed.asking.pop(event.request)
        self._read_directly(feed, read, "which has it no more")
        self._ended(feed)
        return True

    def join(self, feed: Feed) -> None:
        """The feed is a client of DRAM from now on."""
        feed.joined = True
        self._books.todo.append((None, ClientJoined(self._books.now, feed.id, feed.weight)))

    def leave(self, feed: Feed) -> None:
        """The feed is no client of DRAM any more."""
        if feed.joined:
            feed.joined = False
            self._books.todo.append((None, ClientGone(self._books.now, feed.id)))

    def _ended(self, feed: Feed) -> None:
        """Something that the feed had in DRAM, or under way, ended; what that kept out comes in."""
        feed.full = False
        if feed.direct and not feed.holds:
            self.leave(feed)
        self.pump(feed)
        self._books.settle(feed)
        self._plans.declare_if_all_stays(feed)

    # ------------------------------------------------------------------------------- DRAM's answers

    def answer(self, feed: Feed, action: Grant | Later | Refuse) -> None:
        """DRAM answered a request, or refused a plan that is no longer needed."""
        if action.request in feed.orphans:
            feed.orphans.remove(action.request)
            if isinstance(action, Grant):
                release = Release(self._books.now, feed.id, action.lease)
                self._books.todo.append((None, release))
            self._ended(feed)
        elif action.request in feed.filling:
            copying = feed.filling.pop(action.request)
            copying.request = None
            if isinstance(action, Grant):
                copying.lease = action.lease
                return
            if isinstance(action, Refuse) and not copying.broken:  # else it ends by itself
                self._books.actions.append(StopCopy(feed.gpu, copying.read.slot))
                self._books.tell(feed.gpu, "stop", copying.read.key, "its copy: {}", action.text)
            self._ended(feed)
        elif action.request in feed.asking:
            self._answer_before_copy(feed, action)

    def _answer_before_copy(self, feed: Feed, action: Grant | Later | Refuse) -> None:
        number, read = feed.asking.pop(action.request)
        match action:
            case Grant():
                feed.copying[read.slot] = Copying(read, lease=action.lease)
                self._copy(feed, read, action.slot, action.arena, action.offset, filling=False)
            case Later() if feed.direct:
                self._read_directly(feed, read, "which has it, but no room to keep it meanwhile")
                self._ended(feed)
            case Later():
                heapq.heappush(feed.parked, (number, read))
                feed.full = True
                self._books.tell(feed.gpu, "put off", read.key, "DRAM has no room for it beside "
                    "what is copied to this GPU",
                )  # fmt: skip
            case _:
                self._fail(feed, read, action)
                self._ended(feed)

    def not_opened(self, feed: Feed, refusal: Refuse) -> None:
        """DRAM has no reserve for the feed: what waits for it fails."""
        for _, read in sorted(feed.parked, key=lambda parked: parked[0]):
            self._fail(feed, read, refusal)
        feed.parked.clear()

    def _fail(self, feed: Feed, read: Read, refusal: Refuse) -> None:
        """DRAM cannot give the layer; the shell never heard of the slot that waits for it."""
        self._unheard.add((feed.gpu, read.slot))
        failed = ReadFailed(self._books.now, read.slot, refusal.code, refusal.text)
        self._books.todo.append((feed.gpu, failed))

    # -------------------------------------------------------------------------------------- copies

    def start_early(self, feed: Feed, request: int) -> None:
        """Copies what the feed asked for while it is being read, if that is so."""
        if not self._books.config.early or request not in feed.asking:
            return
        read = feed.asking[request][1]
        source = self._books.read_in_dram(read.key)
        if source is None:
            return
        del feed.asking[request]
        copying = Copying(read, request=request, source=source)
        feed.copying[read.slot] = feed.filling[request] = copying
        self._copy(feed, read, source.id, source.arena, source.place.offset, filling=True)

    def dram_reads(self, key: LayerKey) -> None:
        """DRAM reads the layer from now on: feeds that wait for it copy it meanwhile."""
        for request in self._books.dram.books.waiting.get(key, ()):
            if request.client < 0:
                self.start_early(self._books.feed_of[request.client], request.request)

    def _copy(
        self, feed: Feed, read: Read, slot: int, arena: int, offset: int, *, filling: bool
    ) -> None:
        self._books.actions.append(
            Copy(
                feed.gpu, read.slot, read.generation, read.key, read.arena, read.offset,
                read.nbytes, slot, arena, offset, read.reason, filling,
            )
        )  # fmt: skip
        meanwhile = ", while that is read" if filling else ""
        self._books.tell(feed.gpu, "copy", read.key, "from slot {} of DRAM{}", slot, meanwhile)

    def _read_directly(self, feed: Feed, read: Read, why: str) -> None:
        feed.copying[read.slot] = Copying(read)
        self._books.actions.append(
            DirectRead(
                feed.gpu, read.slot, read.generation, read.key, read.arena, read.offset,
                read.nbytes, read.reason,
            )
        )  # fmt: skip
        self._books.tell(feed.gpu, "direct read", read.key, "past DRAM, {}", why)

    def copying(self, gpu: int, slot: int) -> tuple[Feed, Copying] | None:
        """What is under way to this slot, and its feed."""
        found = self._books.gpus[gpu].books.slots.get(slot)
        feed = None
        if found is not None and found.key is not None:
            feed = self._books.feeds.get((gpu, found.key.model))
        if feed is None or slot not in feed.copying:
            return None
        return feed, feed.copying[slot]

    def copied(self, feed: Feed, copying: Copying) -> None:
        """The copy is over: its lease in DRAM ends, and what that kept out comes in."""
        del feed.copying[copying.read.slot]
        if copying.lease is not None:
            self._books.todo.append((None, Release(self._books.now, feed.id, copying.lease)))
        elif copying.request is not None:
            del feed.filling[copying.request]
            feed.orphans.add(copying.request)
        self._ended(feed)

    def source_failed(self, source: Slot) -> None:
        """The read of a slot in DRAM failed: the shell ends early copies of it by itself."""
        for feed in self._books.feeds.values():
            for copying in feed.copying.values():
                copying.broken |= copying.source is source

    def evicted(self, gpu: int, evict: Evict) -> None:
        """A slot of the GPU is empty."""
        if (gpu, evict.slot) in self._unheard:
            self._unheard.remove((gpu, evict.slot))
        else:
            unload = Unload(gpu, evict.slot, evict.generation, evict.key)
            self._books.actions.append(unload)
        feed = None if evict.key is None else self._books.feeds.get((gpu, evict.key.model))
        if feed is not None and evict.key is not None:
            feed.on_gpu.pop(evict.key.layer, None)


def not_whole(copying: Copying) -> str | None:
    """Why the copy cannot have been done: its source is not verified."""
    if copying.broken:
        return "the read of its source failed"
    source = copying.source
    if source is not None and source.state is SlotState.READING:
        return "its source is still being read"
    return None
