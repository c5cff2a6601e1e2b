"""Filling slots: which reads are started, and what gives way to them.

Which read comes next is said by `shares` (whose turn it is) and `policy` (what a plan needs next).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import DEFAULT_WEIGHT, OPERATOR, LayerKey, Read
from tierd.core.residency import Slot, SlotState

if TYPE_CHECKING:
    from tierd.core.answers import Answers
    from tierd.core.books import Books, Request
    from tierd.core.emptying import Emptier
    from tierd.core.memory import Claim
    from tierd.core.served import ModelState
    from tierd.core.shares import Device, Share
    from tierd.core.soonest import Candidate

#: Of the plans whose next layer is missing, those looked at for one read: soonest first.
CANDIDATES = 8
#: A read ahead goes before the requests of clients beyond their share when its client comes to the
#: layer within this many times what it takes at that client's share: two layers move at once.
URGENT_TURNS = 2
#: Beside a read this many times as large a small one may be started beyond the device's limit. With
#: two reads at once, it waits for half of one and then shares the device with the other: that is as
#: long as beside both of them for a factor of 2.
SMALL_FACTOR = 2


class Fetcher:
    """Starts reads, and has evicted what they need."""

    def __init__(self, books: Books, answers: Answers, emptier: Emptier) -> None:
        self._books = books
        self._answers = answers
        self._emptier = emptier
        self._blocked = False  #: a request of some device waits for memory that is on its way

    def advance(self) -> None:
        """Starts what can be started now: promised memory first, then requests, then plans."""
        books = self._books
        memory = books.memory
        if memory.shrinking:
            self._emptier.shrink()
        for slot in books.in_flight.values():
            if slot.claim is not None:
                if not memory.can_warm_up(slot.claim):
                    break
                memory.warm_up(slot.claim)
                self._read(slot)
        limits = [(device, books.reads_limit(device.id)) for device in books.devices.values()]
        served = [self._serve_requests(device, limit) for device, limit in limits]
        self._blocked = not all(served)
        if not self._blocked:
            for device, limit in limits:
                while device.in_flight < limit:
                    if not self._fetch_ahead(device, limit):
                        break
        if memory.shrinking:
            self._emptier.shrink()

    def _serve_requests(self, device: Device, limit: int) -> bool:
        """Starts what the device has room for; False if memory on its way must arrive first.

        Who stalls and gets nothing from the device may have one read more than its limit where a
        much larger one is in flight: it need not wait for the end of that.
        """
        if device.most_in_flight <= limit:
            device.most_in_flight = limit + 1
        now_ns = self._books.now
        while device.in_flight <= limit:
            full = device.in_flight == limit
            request = device.eligible(limit, now_ns)
            if request is None and not full and (lowest := device.lowest_tag()) is not None:
                if not self._blocked and self._fetch_ahead(device, limit, lowest):
                    continue
                if device.waits_at_lowest(limit, now_ns):
                    return True
                device.advance_to(lowest)
                request = device.eligible(limit, now_ns)
            if request is None or (full and not self._small_beside(request, device)):
                return True
            if not self._serve(request):
                return False
        return True

    def _small_beside(self, request: Request, device: Device) -> bool:
        if request.since_ns is None or request.share.in_flight:
            return False
        nbytes = self._books.models[request.key.model].layer_bytes[request.key.layer]
        return device.largest_in_flight >= SMALL_FACTOR * nbytes

    def _serve(self, request: Request) -> bool:
        """Starts a read for the request; False if memory on its way must arrive first."""
        key = request.key
        model = self._books.models[key.model]
        memory = self._books.memory
        claim = self._claim(model, key.layer, None)
        if claim is None and memory.ceiling > memory.budget:
            claim = self._claim(model, key.layer, None, memory.ceiling)
        while claim is None:
            victims = self._books.policy.victims(1, None, self._books.now)
            if victims is None:
                break
            # Enough is free, but in pieces that are too short: clear more of the address space.
            self._emptier.evict_all(victims, key)
            claim = memory.claim(model.arena, model.layer_bytes[key.layer], memory.ceiling)
        if claim is not None:
            self._start(model, key, claim)
            return True
        if self._books.in_flight or self._books.memory.discarding:
            return False
        granule = self._books.config.granule_bytes
        text = (
            f"arena {model.arena} of {self._books.memory.span(model.arena) * granule} bytes has no "
            f"{model.charges[key.layer] * granule} contiguous bytes left for layer {key.layer} of "
            f"model '{model.name}': the longest free range is "
            f"{self._books.memory.longest_free_run(model.arena) * granule}"
        )
        for waiting in self._books.waiting.pop(key):
            self._answers.close(waiting)
            self._answers.refuse(waiting, "internal", text)
        return True

    def _fetch_ahead(self, device: Device, limit: int, below: int | None = None) -> bool:
        """Starts the read of the next missing layer of a plan, if that does no harm.

        Those who are not ahead of their share come first. `below`: only who has a lower tag, and
        comes to the layer before its share of the device would have brought it: until then the
        requests of others, who stall, go first.
        """
        chosen: tuple[int, Candidate, Share] | None = None
        for candidate in self._books.policy.soonest(CANDIDATES, device.id):
            client = self._books.clients[candidate.client]
            share = device.share(client.id, client.weight)
            if share.held or device.crowded(candidate.key.model, limit, self._books.now):
                continue
            tag = max(share.tag, device.virtual)
            if below is not None:
                nbytes = self._books.models[candidate.key.model].layer_bytes[candidate.key.layer]
                wait_ns = candidate.due + self._books.now
                if tag >= below or wait_ns > URGENT_TURNS * device.turn_ns(share, nbytes):
                    continue
            if tag <= device.virtual:
                if self._start_ahead(candidate, share):
                    return True
            elif chosen is None or tag < chosen[0]:
                chosen = tag, candidate, share
        if device.unread_pins:
            share = device.share(OPERATOR, DEFAULT_WEIGHT)
            tag = max(share.tag, device.virtual)
            first = (below is None or tag < below) and (chosen is None or tag < chosen[0])
            if first and self._start_pinned(device, share):
                device.advance_to(tag)
                return True
        if chosen is None or not self._start_ahead(chosen[1], chosen[2]):
            return False
        device.advance_to(chosen[0])
        return True

    def _start_pinned(self, device: Device, share: Share) -> bool:
        key = next(iter(device.unread_pins))
        model = self._books.models[key.model]
        claim = self._claim(model, key.layer, None)
        if claim is None:
            return False
        self._start(model, key, claim, share)
        return True

    def _start_ahead(self, candidate: Candidate, share: Share) -> bool:
        key = candidate.key
        model = self._books.models[key.model]
        due = self._books.policy.spared_until(candidate, self._books.now)
        if not candidate.may_evict and (
            model.charges[key.layer] > self._books.memory.free or self._books.numbers.exhausted
        ):
            return False
        claim = self._claim(model, key.layer, due)
        if claim is None:
            return False
        self._start(model, key, claim, share)
        return True

    def _claim(
        self, model: ModelState, layer: int, due: int | None, limit: int | None = None
    ) -> Claim | None:
        """Room for a layer, evicting what is due later than `due` (None: whatever must go).

        `limit`: granules that slots may occupy then; None is the budget.
        """
        memory = self._books.memory
        nbytes = model.layer_bytes[layer]
        if limit is None:
            limit = memory.budget
        spare = None
        if self._books.numbers.exhausted:
            spare = self._books.policy.victim(due, self._books.now)
            if spare is None:
                return None
        claim = memory.claim(model.arena, nbytes, limit)
        shortfall = model.charges[layer] + memory.occupied - limit
        if claim is None and shortfall > 0:
            victims = self._books.policy.victims(shortfall, due, self._books.now)
            if victims is not None and due is not None:
                # Evicting for what then finds no address would turn the memory over for nothing.
                places = [victim.slot.place for victim in victims]
                if not memory.has_run(model.arena, model.charges[layer], places):
                    return None
            if victims is not None:
                self._emptier.evict_all(victims, model.keys[layer])
                claim = memory.claim(model.arena, nbytes, limit)
        if claim is not None and spare is not None and self._books.numbers.exhausted:
            self._emptier.evict_all([spare], model.keys[layer])
        return claim

    def _start(
        self, model: ModelState, key: LayerKey, claim: Claim, ahead_for: Share | None = None
    ) -> None:
        waiting = self._books.waiting.get(key, ())
        slot = Slot(
            self._books.numbers.take(), self._books.next_generation, key, model.arena, claim.place,
            SlotState.CLAIMED, bool(waiting), claim, key in self._books.pins,
        )  # fmt: skip
        self._books.next_generation += 1
        self._books.slots[slot.id] = slot
        self._books.in_flight[slot.id] = slot
        model.put(slot)
        device = self._books.devices[model.device]
        device.unread_pins.pop(key, None)
        for request in waiting:
            request.unread = False
        payers = [request.share for request in waiting]
        if ahead_for is not None:
            payers.append(ahead_for)
        nbytes, now = claim.place.nbytes, self._books.now
        self._books.bills[slot.id] = device.start(model.id, payers, nbytes, now)
        self._emptier.discard(claim.discards)
        if not claim.promised:
            self._read(slot)

    def _read(self, slot: Slot) -> None:
        assert slot.key is not None
        slot.state = SlotState.READING
        slot.claim = None
        self._books.count["reads"] += 1
        reason = "demand" if slot.demanded else "ahead"
        self._books.count["reads_ahead"] += not slot.demanded
        place = slot.place
        self._books.actions.append(
            Read(slot.id, slot.generation, slot.key, slot.arena, place.offset, place.nbytes, reason)
        )
        self._books.tell("read", slot.key, "into slot {}: {}", slot.id, reason)
