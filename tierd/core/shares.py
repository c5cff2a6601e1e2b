"""Whose read comes next from a device: earliest deadline first within weighted fair shares.

Start-time fair queueing (Goyal, Vin, Cheng 1996, section 2.1) with an earliest deadline first
choice among those that are not ahead of their share (EEVDF: Stoica, Abdel-Wahab 1995). Each client
has a *tag*: the bytes read for it from this device, divided by its weight. The device's *virtual
time* follows the lowest tag of those who want reads. Who is at or below it is *eligible*, and the
eligible request with the earliest deadline is read. So a client that wants much gets what the
others leave, and one that wants little never waits for more than one read of each other client.

Who was idle starts at the virtual time: an idle client saves nothing up. A read that several
clients wait for is charged to all in equal parts. Everything here is O(log clients).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.model import DEFAULT_WEIGHT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.core.books import Request
    from tierd.core.model import LayerKey

#: Part that one observation has in what a byte takes.
_CORRECTION = 8
#: A model keeps its places for as long as so many of its reads took.
_RECENT_READS = 4
#: Requests of crowded models that are passed over for one of another.
_PASSED_OVER = 8


@dataclass(slots=True, eq=False)
class Share:
    """What one client gets of one device."""

    client: int
    weight: int
    tag: int = 0  #: bytes charged, times DEFAULT_WEIGHT / weight, and what idle times passed by
    charged_bytes: int = 0
    in_flight: int = 0  #: reads that it waits for, or that were started ahead for it
    held: bool = False  #: nothing is to be read for it now (`convoy`)
    requests: list[tuple[int, int, Request]] = field(default_factory=list)  #: heap by deadline
    entry: Entry | None = None  #: while it has requests: where it stands in one of the heaps

    def head(self) -> Request | None:
        """Its request with the earliest deadline that no read is on its way for."""
        while self.requests:
            request = self.requests[0][2]
            if request.open and request.unread:
                return request
            heapq.heappop(self.requests)
        return None


@dataclass(slots=True, order=True)
class Entry:
    """A place in a heap; void as soon as its share has another."""

    first: int  #: tag, or deadline
    second: int  #: arrival of the request
    share: Share = field(compare=False)


#: Where an entry stands in a heap: tuples are compared without a call.
Place = tuple[int, int, Entry]


@dataclass(slots=True, eq=False)
class Bill:
    """A read under way, and who pays for it."""

    device: Device
    model: int
    nbytes: int
    started_ns: int
    paid: dict[Share, int] = field(default_factory=dict)  #: bytes charged so far

    def join(self, share: Share) -> None:
        """One more client waits for the read."""
        if share not in self.paid:
            self.paid[share] = 0
            share.in_flight += 1

    def split(self) -> None:
        """Charges all who wait in equal parts; the first one pays what cannot be divided."""
        part, rest = divmod(self.nbytes, len(self.paid))
        for share, paid in self.paid.items():
            owed, rest = part + rest, 0
            if owed != paid:
                self.device.charge(share, owed - paid)
                self.paid[share] = owed

    def settle(self, now_ns: int, *, arrived: bool) -> None:
        """The read is over; it never began to flow, or failed, where nothing arrived."""
        self.split()
        for share in self.paid:
            share.in_flight -= 1
        self.device.ended(self, now_ns, self.nbytes if arrived else 0)


class Device:
    """The reads of one device: who waits for them, in which order they are started."""

    def __init__(self, number: int) -> None:
        self.id = number
        self.in_flight = 0  #: reads under way
        self.largest_in_flight = 0  #: bytes of the largest of them
        self.most_in_flight = 0  #: that was ever allowed at once
        self.virtual = 0  #: the virtual time, in bytes at DEFAULT_WEIGHT
        self.ns_per_mib = 0  #: what a MiB takes at present, while it is read without a pause
        self.backlog_weight = 0  #: of clients that have requests
        self._shares: dict[int, Share] = {}
        self.unread_pins: dict[LayerKey, None] = {}  #: pinned layers to be read, first come first
        self._bills: dict[Bill, None] = {}
        self._reading: dict[int, int] = {}  #: by model: reads in flight
        #: by model: until when it counts as one that reads, and with which weight
        self._recent: dict[int, tuple[int, int]] = {}
        self._by_tag: list[Place] = []  #: with requests, ahead of their share
        self._by_deadline: list[Place] = []  #: with requests, eligible
        self._busy_from_ns = 0  #: since then bytes have flowed for the next read that ends

    def share(self, client: int, weight: int) -> Share:
        found = self._shares.get(client)
        if found is None:
            found = self._shares[client] = Share(client, weight, self.virtual)
        return found

    def weigh(self, client: int, weight: int) -> None:
        """Another weight from now on, also for what waits; its tag stays."""
        share = self._shares.get(client)
        if share is not None:
            if share.entry is not None:
                self.backlog_weight += weight - share.weight
            share.weight = weight

    def charged_bytes(self, client: int) -> int:
        """The client's part of all that was read for somebody."""
        share = self._shares.get(client)
        return 0 if share is None else share.charged_bytes

    def drop(self, client: int) -> None:
        """The client is gone; its requests are closed."""
        share = self._shares.pop(client, None)
        if share is not None:
            self._unqueue(share)

    def shares(self) -> Iterable[Share]:
        return self._shares.values()

    # ----------------------------------------------------------------------------------- requests

    def enqueue(self, share: Share, request: Request) -> None:
        """The request waits for a read, or its deadline has become an earlier one."""
        heapq.heappush(share.requests, (request.deadline_ns, request.number, request))
        self._place(share)

    def hold(self, share: Share) -> None:
        """No read is to be started for it until `resume`; it saves nothing up meanwhile."""
        share.held = True
        self._unqueue(share)

    def resume(self, share: Share) -> None:
        """Its requests wait for reads again."""
        share.held = False
        self._place(share)

    def eligible(self, limit: int, now_ns: int) -> Request | None:
        """Of those that are not ahead of their share, nor of a crowded model, the request with the
        earliest deadline."""
        passed_over: list[Place] = []
        found: Request | None = None
        while self._by_deadline and len(passed_over) < _PASSED_OVER:
            entry = self._by_deadline[0][2]
            share = entry.share
            if share.entry is not entry:
                heapq.heappop(self._by_deadline)
                continue
            request = share.head()
            if request is None:
                self._unqueue(share)
            elif (request.deadline_ns, request.number) != (entry.first, entry.second):
                self._place(share)
            elif self.crowded(request.key.model, limit, now_ns):
                passed_over.append(heapq.heappop(self._by_deadline))
            else:
                found = request
                break
        for place in passed_over:
            heapq.heappush(self._by_deadline, place)
        return found

    def lowest_tag(self) -> int | None:
        """The lowest tag of those who have requests and are ahead of their share."""
        while self._by_tag:
            entry = self._by_tag[0][2]
            share = entry.share
            if share.entry is not entry:
                heapq.heappop(self._by_tag)
            elif share.head() is None:
                self._unqueue(share)
            else:
                return entry.first
        return None

    def waits_at_lowest(self, limit: int, now_ns: int) -> bool:
        """Whether who has the lowest tag has to wait for a place of its model."""
        request = self._by_tag[0][2].share.head()
        return request is not None and self.crowded(request.key.model, limit, now_ns)

    def advance_to(self, tag: int) -> None:
        """Nobody with a lower tag wants a read: the virtual time comes to it."""
        self.virtual = max(self.virtual, tag)
        while self._by_tag and self._by_tag[0][0] <= self.virtual:
            entry = heapq.heappop(self._by_tag)[2]
            if entry.share.entry is entry:
                self._place(entry.share)

    def _place(self, share: Share) -> None:
        """Puts a share with requests where it belongs now."""
        request = share.head()
        if request is None or share.held:
            self._unqueue(share)
            return
        if share.entry is None:
            self.backlog_weight += share.weight
            share.tag = max(share.tag, self.virtual)
        if share.tag <= self.virtual:
            share.entry = Entry(request.deadline_ns, request.number, share)
            heapq.heappush(self._by_deadline, (share.entry.first, share.entry.second, share.entry))
        else:
            share.entry = Entry(share.tag, request.number, share)
            heapq.heappush(self._by_tag, (share.entry.first, share.entry.second, share.entry))

    def _unqueue(self, share: Share) -> None:
        if share.entry is not None:
            self.backlog_weight -= share.weight
            share.entry = None

    # -------------------------------------------------------------------------------------- reads

    def charge(self, share: Share, nbytes: int) -> None:
        """Bytes are read for the client; negative where others turn out to share a read."""
        share.charged_bytes += nbytes
        share.tag = max(share.tag, self.virtual) + nbytes * DEFAULT_WEIGHT // share.weight
        if share.entry is not None:
            self._place(share)

    def start(self, model: int, shares: Iterable[Share], nbytes: int, now_ns: int) -> Bill:
        """A read of `nbytes` begins, for whom these shares are."""
        if not self._bills:
            self._busy_from_ns = now_ns
        bill = Bill(self, model, nbytes, now_ns)
        self._reading[model] = self._reading.get(model, 0) + 1
        self._bills[bill] = None
        self.in_flight += 1
        self.largest_in_flight = max(self.largest_in_flight, nbytes)
        for share in shares:
            bill.join(share)
        bill.split()
        return bill

    def crowded(self, model: int, limit: int, now_ns: int) -> bool:
        """Whether the model has its part of the `limit` reads in flight, while others read too.

        A device serves what it was given in its own order: who comes often and briefly would find
        all places taken by who never stops. Clients of one model help each other and count as one.
        """
        mine = self._reading.get(model, 0)
        if not mine or limit == 1:
            return False
        for other in [m for m, (until_ns, _) in self._recent.items() if until_ns < now_ns]:
            del self._recent[other]
        weight = self._recent.get(model, (0, DEFAULT_WEIGHT))[1]
        total = weight + sum(w for m, (_, w) in self._recent.items() if m != model)
        return mine * total >= limit * weight

    def ended(self, bill: Bill, now_ns: int, nbytes: int) -> None:
        """A read ended; `nbytes` of it arrived."""
        del self._bills[bill]
        self.in_flight -= 1
        if bill.nbytes == self.largest_in_flight:
            self.largest_in_flight = max((other.nbytes for other in self._bills), default=0)
        self._reading[bill.model] -= 1
        if not self._reading[bill.model]:
            del self._reading[bill.model]
        weight = max((share.weight for share in bill.paid), default=DEFAULT_WEIGHT)
        pause_ns = _RECENT_READS * (now_ns - bill.started_ns)
        self._recent[bill.model] = now_ns + pause_ns, weight
        took_ns = now_ns - self._busy_from_ns
        self._busy_from_ns = now_ns
        if nbytes:
            sample = (took_ns << 20) // nbytes
            self.ns_per_mib += (sample - self.ns_per_mib) // (_CORRECTION if self.ns_per_mib else 1)

    def turn_ns(self, share: Share, nbytes: int) -> int:
        """What `nbytes` take the client at its share of the device, beside those who wait now."""
        weight = self.backlog_weight + (share.weight if share.entry is None else 0)
        return nbytes * self.ns_per_mib * weight // (share.weight << 20)
