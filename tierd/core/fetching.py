"""Filling and emptying slots: the actions that change what is resident."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from tierd.core.model import Discard, Evict, LayerKey, Read
from tierd.core.plans import NEVER
from tierd.core.residency import ModelState, Slot, SlotState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.core.answers import Answers
    from tierd.core.books import Books, Request
    from tierd.core.memory import Claim
    from tierd.core.placement import Range
    from tierd.core.policy import Victim


class Fetcher:
    """Starts reads, evicts, discards."""

    def __init__(self, books: Books, answers: Answers) -> None:
        self._books = books
        self._answers = answers

    def advance(self) -> None:
        """Starts what can be started now: promised memory first, then requests, then plans."""
        if self._books.memory.over_budget:
            self._discard(self._books.memory.shed())
        for slot in self._books.in_flight.values():
            if slot.claim is not None:
                if not self._books.memory.can_warm_up(slot.claim):
                    break
                self._books.memory.warm_up(slot.claim)
                self._read(slot)
        limit = self._books.config.reads_in_flight
        while len(self._books.in_flight) < limit and (request := self._next_request()) is not None:
            if not self._serve(request):
                return
        while len(self._books.in_flight) < limit and self._fetch_ahead():
            pass

    def _next_request(self) -> Request | None:
        """The accepted request with the earliest deadline whose layer is not on its way."""
        while self._books.queue:
            request = self._books.queue[0][2]
            key = request.key
            if request.open and self._books.models[key.model].slots[key.layer] is None:
                return request
            heapq.heappop(self._books.queue)
        return None

    def _serve(self, request: Request) -> bool:
        """Starts a read for the request; False if memory on its way must arrive first."""
        key = request.key
        model = self._books.models[key.model]
        claim = self._claim(model, key.layer, None)
        while claim is None:
            victims = self._books.policy.victims(1, None, self._books.now)
            if victims is None:
                break
            # Enough is free, but in pieces that are too short: clear more of the address space.
            self._evict_all(victims, key)
            claim = self._books.memory.claim(model.arena, model.layer_bytes[key.layer])
        if claim is not None:
            self._start(model, key, claim, demanded=True)
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

    def _fetch_ahead(self) -> bool:
        """Starts the read of the next missing layer of all plans, if that does no harm."""
        for candidate in self._books.policy.candidates():
            key = candidate.key
            model = self._books.models[key.model]
            due = candidate.due if candidate.may_evict else -NEVER
            if not candidate.may_evict and (
                model.charges[key.layer] > self._books.memory.free or self._books.numbers.exhausted
            ):
                continue
            claim = self._claim(model, key.layer, due)
            if claim is not None:
                self._start(model, key, claim, demanded=False)
                return True
        return False

    def _claim(self, model: ModelState, layer: int, due: int | None) -> Claim | None:
        """Room for a layer, evicting what is due later than `due` (None: whatever must go)."""
        nbytes = model.layer_bytes[layer]
        spare = None
        if self._books.numbers.exhausted:
            spare = self._books.policy.victim(due, self._books.now)
            if spare is None:
                return None
        claim = self._books.memory.claim(model.arena, nbytes)
        shortfall = model.charges[layer] - self._books.memory.free
        if claim is None and shortfall > 0:
            victims = self._books.policy.victims(shortfall, due, self._books.now)
            if victims is not None and due is not None:
                # Evicting for what then finds no address would turn the memory over for nothing.
                places = [victim.slot.place for victim in victims]
                run = self._books.memory.longest_free_run(model.arena, places)
                if run < model.charges[layer]:
                    return None
            if victims is not None:
                self._evict_all(victims, model.keys[layer])
                claim = self._books.memory.claim(model.arena, nbytes)
        if claim is not None and spare is not None and self._books.numbers.exhausted:
            self._evict_all([spare], model.keys[layer])
        return claim

    def _evict_all(self, victims: list[Victim], wanted: LayerKey) -> None:
        for victim in victims:
            due = "no plan uses it" if victim.due == NEVER else "its next use is further away"
            self.evict(victim.slot, "for {}: {}", wanted, due)

    def _start(self, model: ModelState, key: LayerKey, claim: Claim, *, demanded: bool) -> None:
        slot = Slot(
            self._books.numbers.take(), self._books.next_generation, key, model.arena, claim.place,
            SlotState.CLAIMED, demanded, claim,
        )  # fmt: skip
        self._books.next_generation += 1
        self._books.slots[slot.id] = slot
        self._books.in_flight[slot.id] = slot
        model.put(slot)
        self._discard(claim.discards)
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

    def _discard(self, discards: Iterable[Range]) -> None:
        granule = self._books.config.granule_bytes
        for discard in discards:
            self._books.count["discards"] += 1
            offset, nbytes = discard.start * granule, discard.granules * granule
            self._books.actions.append(Discard(discard.arena, offset, nbytes))
            self._books.tell("discard", None, "{} bytes at {} of arena {}", nbytes, offset,
                discard.arena,
            )  # fmt: skip

    def no_longer_used(self, slot: Slot) -> None:
        """A lease or holder is gone: drop what is served no more."""
        if not slot.evictable:
            return
        if slot.key is None:
            self.evict(slot, "nothing that is served")
        elif (model := self._books.models[slot.key.model]).removed:
            self.evict(slot, "model '{}' was removed", model.name)
            self.forget_if_empty(model)

    def evict(self, slot: Slot, reason: str, *values: object) -> None:
        """Empties a slot that nobody reads; its memory stays warm."""
        self._books.memory.release(slot.place)
        self._forget(slot)
        self._books.count["evictions"] += 1
        self._books.actions.append(Evict(slot.id, slot.generation, slot.key))
        self._books.tell("evict", slot.key, reason, *values)

    def abandon(self, slot: Slot) -> None:
        """Gives up a slot that still waits for its memory: no read was started."""
        assert slot.claim is not None
        self._books.memory.abandon(slot.claim)
        del self._books.in_flight[slot.id]
        self._forget(slot)

    def _forget(self, slot: Slot) -> None:
        del self._books.slots[slot.id]
        self._books.numbers.give_back(slot.id)
        self._books.policy.evicted(slot)
        if slot.key is not None:
            self._books.models[slot.key.model].drop(slot)

    def forget_if_empty(self, model: ModelState) -> None:
        if model.removed and model.missing == len(model.slots):
            del self._books.models[model.id]
