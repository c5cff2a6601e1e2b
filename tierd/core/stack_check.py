"""What must always be true between the machines of a stack, and cheaply of each machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.errors import InvariantBroken
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.books import Books
    from tierd.core.model import Read
    from tierd.core.stack_exchange import Exchange
    from tierd.core.stack_feed import Feed


def check_stack(exchange: Exchange) -> None:
    """Raises InvariantBroken where a read, a lease or a plan is lost between two machines."""
    books = exchange.books
    if books.todo:
        raise InvariantBroken(f"{len(books.todo)} events between machines were not delivered")
    pseudo = {client for client in books.dram.books.clients if client < 0}
    if pseudo != {feed.id for feed in exchange.feeds.values() if feed.joined}:
        raise InvariantBroken(f"DRAM has the pseudo-clients {sorted(pseudo)}, not those of feeds")
    for gpu, machine in enumerate(books.gpus):
        reading = {
            slot.id: slot.key
            for slot in machine.books.slots.values()
            if slot.state is SlotState.READING
        }
        fed = {
            read.slot: read.key
            for feed in exchange.feeds.values()
            if feed.gpu == gpu
            for read in _reads(feed)
        }
        if reading != fed:
            raise InvariantBroken(f"GPU {gpu} reads into {reading}, its feeds into {fed}")
    for feed in exchange.feeds.values():
        _check_feed(exchange, feed)


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


def _check_feed(exchange: Exchange, feed: Feed) -> None:
    _check_in_dram(exchange, feed)
    if feed.parked and feed.open and not (feed.full and feed.holds):
        raise InvariantBroken(f"feed {feed.id} waits for nothing with {feed.parked}")
    if not (feed.users or feed.waiting or feed.offered) and feed.idle and not exchange.wanted(feed):
        raise InvariantBroken(f"nobody needs feed {feed.id}")
    plans = exchange.plans
    for mine, where in (
        (feed.waiting, plans.waiting),
        (feed.offered, plans.offered),
        (feed.users, plans.using),
    ):
        if any(where.get(user) is not feed for user in mine):
            raise InvariantBroken(f"feed {feed.id} has plans of clients that do not know it")
    model = exchange.books.gpus[feed.gpu].books.models.get(feed.model)
    there = set()
    if model is not None:
        there = {
            layer
            for layer, slot in enumerate(model.slots)
            if slot is not None and slot.state is not SlotState.CLAIMED
        }
    if not there >= set(feed.on_gpu):
        raise InvariantBroken(f"feed {feed.id} takes {sorted(feed.on_gpu)} for resident")


def _check_in_dram(exchange: Exchange, feed: Feed) -> None:
    """What the feed has in DRAM is what its copies need there, and nothing else."""
    if feed.direct and (feed.parked or feed.joined is not feed.holds):
        raise InvariantBroken(f"direct feed {feed.id} keeps a place in DRAM for nothing")
    client = exchange.books.dram.books.clients.get(feed.id)
    if client is not None and client.weight != feed.weight_now:
        raise InvariantBroken(f"feed {feed.id} weighs {client.weight} in DRAM")
    leased = {} if client is None else {lease: slot.key for lease, slot in client.leases.items()}
    copied = {
        copying.lease: copying.read.key
        for copying in feed.copying.values()
        if copying.lease is not None
    }
    if leased != copied:
        raise InvariantBroken(f"feed {feed.id} leases {leased}, and copies {copied}")
    requests = set() if client is None else {one.request for one in client.requests.values()}
    if requests != {*feed.asking, *feed.filling, *feed.orphans}:
        raise InvariantBroken(f"feed {feed.id} and DRAM differ about what it asked for")
    for request, copying in feed.filling.items():
        source = exchange.books.read_in_dram(copying.read.key)
        if source is None or source is not copying.source or copying.request != request:
            raise InvariantBroken(f"feed {feed.id} copies {copying} from a slot that is not read")
        if feed.copying.get(copying.read.slot) is not copying:
            raise InvariantBroken(f"feed {feed.id} lost the early copy {copying}")
    if exchange.books.config.early:
        for _, read in feed.asking.values():
            if exchange.books.read_in_dram(read.key) is not None:
                raise InvariantBroken(f"feed {feed.id} does not copy {read.key}, which is read")
