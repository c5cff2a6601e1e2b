"""What must always be true between the machines of a stack, and cheaply of each machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.errors import InvariantBroken
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.books import Books
    from tierd.core.model import Read
    from tierd.core.stack_feed import Feed
    from tierd.core.stack_feeds import Feeds


def check_stack(feeds: Feeds) -> None:
    """Raises InvariantBroken where a read, a lease or a plan is lost between two machines."""
    if feeds.todo:
        raise InvariantBroken(f"{len(feeds.todo)} events between machines were not delivered")
    pseudo = {client for client in feeds.dram.books.clients if client < 0}
    if pseudo != {feed.id for feed in feeds.feeds.values()}:
        raise InvariantBroken(f"DRAM has the pseudo-clients {sorted(pseudo)}, not those of feeds")
    for gpu, machine in enumerate(feeds.gpus):
        reading = {
            slot.id: slot.key
            for slot in machine.books.slots.values()
            if slot.state is SlotState.READING
        }
        fed = {
            read.slot: read.key
            for feed in feeds.feeds.values()
            if feed.gpu == gpu
            for read in _reads(feed)
        }
        if reading != fed:
            raise InvariantBroken(f"GPU {gpu} reads into {reading}, its feeds into {fed}")
    for feed in feeds.feeds.values():
        _check_feed(feeds, feed)


def check_sums(books: Books) -> None:
    """The sums that every promise rests on, for after each event; costs O(1)."""
    memory, ledger = books.memory, books.ledger
    if memory.warm > memory.budget and not (memory.shrinking or memory.discarding):
        raise InvariantBroken(f"{memory.warm} warm granules, the budget is {memory.budget}")
    if memory.shrinking or ledger.quarantined > memory.budget:
        return  # a restart, or a budget that was lowered: what is above it is on its way out
    if memory.occupied > memory.budget or memory.promised < 0:
        raise InvariantBroken(f"{memory.occupied} granules occupied of {memory.budget}")


def _reads(feed: Feed) -> list[Read]:
    return [
        *(read for _, read in feed.parked),
        *(read for _, read in feed.asking.values()),
        *(copying.read for copying in feed.copying.values()),
    ]


def _check_feed(feeds: Feeds, feed: Feed) -> None:
    client = feeds.dram.books.clients[feed.id]
    leased = {lease: slot.key for lease, slot in client.leases.items()}
    if leased != {copying.lease: copying.read.key for copying in feed.copying.values()}:
        raise InvariantBroken(f"feed {feed.id} leases {leased}, and copies something else")
    if {request.request for request in client.requests.values()} != set(feed.asking):
        raise InvariantBroken(f"feed {feed.id} and DRAM differ about what it asked for")
    if feed.parked and feed.open and not (feed.full and feed.holds):
        raise InvariantBroken(f"feed {feed.id} waits for nothing with {feed.parked}")
    if not (feed.users or feed.waiting or feed.offered) and feed.idle and not feeds.wanted(feed):
        raise InvariantBroken(f"nobody needs feed {feed.id}")
    for plans, where in (
        (feed.waiting, feeds.waiting),
        (feed.offered, feeds.offered),
        (feed.users, feeds.using),
    ):
        if any(where.get(user) is not feed for user in plans):
            raise InvariantBroken(f"feed {feed.id} has plans of clients that do not know it")
    model = feeds.gpus[feed.gpu].books.models.get(feed.model)
    there = set()
    if model is not None:
        there = {
            layer
            for layer, slot in enumerate(model.slots)
            if slot is not None and slot.state is not SlotState.CLAIMED
        }
    if not there >= set(feed.on_gpu):
        raise InvariantBroken(f"feed {feed.id} takes {sorted(feed.on_gpu)} for resident")
