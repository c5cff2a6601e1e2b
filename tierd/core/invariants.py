"""What must always be true of the books; costs O(everything)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tierd.core.errors import InvariantBroken
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.books import Books


def check_books(books: Books) -> None:
    """Raises InvariantBroken where the books contradict each other; costs O(everything)."""
    memory = books.memory
    over = memory.shrinking or books.ledger.quarantined > memory.budget
    if memory.warm > memory.budget and not (over or memory.discarding):
        raise InvariantBroken(f"{memory.warm} warm granules, the budget is {memory.budget}")
    memory.check([slot.place for slot in books.slots.values()])
    books.ledger.check()
    _check_room(books)
    _check_slots(books)
    _check_clients(books)
    _check_wanted(books)
    _check_places(books)


def _check_slots(books: Books) -> None:
    leases: dict[int, int] = {}  # by slot
    for client in books.clients.values():
        for slot in client.leases.values():
            leases[slot.id] = leases.get(slot.id, 0) + 1
    for slot in books.slots.values():
        if slot.leases != leases.pop(slot.id, 0):
            raise InvariantBroken(f"slot {slot.id} counts {slot.leases} leases")
        in_flight = slot.state is not SlotState.RESIDENT
        if in_flight != (slot.id in books.in_flight) or (in_flight and slot.leases):
            raise InvariantBroken(f"slot {slot.id} is {slot.state.value}, but is not")
        if (slot.claim is not None) != (slot.state is SlotState.CLAIMED):
            raise InvariantBroken(f"slot {slot.id} is {slot.state.value} with a claim")
        if slot.key is None and not slot.holders:
            raise InvariantBroken(f"slot {slot.id} holds nothing for nobody")
        if slot.key is not None:
            model = books.models[slot.key.model]
            if model.slots[slot.key.layer] is not slot:
                raise InvariantBroken(f"slot {slot.id} is not where its layer is")
            if slot.evictable and model.removed:
                raise InvariantBroken(f"slot {slot.id} holds a layer that nobody can ask for")
    if leases:
        raise InvariantBroken(f"slots {list(leases)} are leased, and empty")
    if books.leaving != {model.id: model for model in books.models.values() if model.removed}:
        raise InvariantBroken(f"the models {list(books.leaving)} are not those that were removed")
    _check_reads(books)
    _check_pins(books)
    quarantined = sum(s.place.range.granules for s in books.slots.values() if s.holders)
    held = sum(1 for slot in books.slots.values() if slot.holders)
    if held != books.ledger.quarantined_slots or any(
        number >= books.config.slot_limit for number in books.slots
    ):
        raise InvariantBroken(f"{held} slots in quarantine, or a slot beyond the limit")
    if quarantined != books.ledger.quarantined:
        raise InvariantBroken(f"{quarantined} granules in quarantine")
    for model in books.models.values():
        if model.missing != model.slots.count(None):
            raise InvariantBroken(f"model {model.id} misses {model.missing} layers")


def _check_room(books: Books) -> None:
    """Promises can be kept: what cannot be evicted fits, with what is left of every reserve."""
    ledger = books.ledger
    others = dict(books.pins)
    unknown = slots_of_unknown = 0
    for slot in books.slots.values():
        if slot.holders and slot.key is not None:
            others[slot.key] = slot.place.range.granules
        elif slot.holders:
            unknown += slot.place.range.granules
            slots_of_unknown += 1
    granules, slots = ledger.needed(others)
    granules += unknown
    slots += slots_of_unknown
    if granules > books.memory.ceiling and ledger.quarantined <= books.memory.budget:
        raise InvariantBroken(f"{granules} granules are promised, of {books.memory.ceiling}")
    if slots > ledger.slot_limit:
        raise InvariantBroken(f"{slots} slots are promised, of {ledger.slot_limit}")


def _check_wanted(books: Books) -> None:
    """The sum that counts a layer once, from the plans, pins and slots that it comes from."""
    granules = number = 0
    pins, lingering = books.pins, books.ledger.lingering
    for model in books.models.values():
        plans = [0] * len(model.slots)
        for plan in model.plans.values():
            for layer in plan.route.indices:
                plans[layer] += 1
        for layer, (slot, reasons) in enumerate(zip(model.slots, plans, strict=True)):
            if pins:  # keys are looked up only where there may be one: there are many layers
                reasons += model.keys[layer] in pins
            charge = model.charges[layer]
            if slot is not None and slot.holders and slot.place.range.granules == charge:
                reasons += 1
            if reasons != model.reasons[layer] or (
                lingering and reasons and model.keys[layer] in lingering
            ):
                key = model.keys[layer]
                raise InvariantBroken(f"layer {key} is wanted for {model.reasons[layer]} reasons")
            if reasons:
                granules += charge
                number += 1
    for slot in books.slots.values():
        charge = books.models[slot.key.model].charges[slot.key.layer] if slot.key else 0
        if slot.holders and slot.place.range.granules != charge:
            granules += slot.place.range.granules
            number += 1
    granules += sum(lingering.values())
    number += len(lingering)
    if (granules, number) != (books.ledger.wanted, books.ledger.wanted_slots):
        raise InvariantBroken(
            f"{granules} granules of {number} layers are wanted, booked {books.ledger.wanted}"
        )


def _check_pins(books: Books) -> None:
    ledger = books.ledger
    if sum(books.pins.values()) != ledger.pinned or len(books.pins) != ledger.pinned_slots:
        raise InvariantBroken(f"{ledger.pinned} granules and {ledger.pinned_slots} slots pinned")
    for slot in books.slots.values():
        if slot.pinned is not (bool(books.pins) and slot.key in books.pins):
            raise InvariantBroken(f"slot {slot.id} is pinned: {slot.pinned}")
    for device in books.devices.values():
        for key in device.unread_pins:
            if key not in books.pins or books.models[key.model].slots[key.layer] is not None:
                raise InvariantBroken(f"{key} is to be read for its pin, without need")


def _check_reads(books: Books) -> None:
    if set(books.bills) != set(books.in_flight):
        raise InvariantBroken("reads in flight and those that are paid for differ")
    for device in books.devices.values():
        bills = [bill for bill in books.bills.values() if bill.device is device]
        if device.in_flight != len(bills) or len(bills) > device.most_in_flight:
            raise InvariantBroken(f"{len(bills)} reads of device {device.id} in flight")
        if device.largest_in_flight != max((bill.nbytes for bill in bills), default=0):
            raise InvariantBroken(f"no read of {device.largest_in_flight} bytes is the largest")
        payers = Counter(id(share) for bill in bills for share in bill.paid)
        for share in device.shares():
            if share.in_flight != payers[id(share)]:
                raise InvariantBroken(f"client {share.client} waits for {share.in_flight} reads")
            if (share.entry is None and not share.held) and share.head() is not None:
                raise InvariantBroken(f"client {share.client} waits for no turn")
        weight = sum(share.weight for share in device.shares() if share.entry is not None)
        if weight != device.backlog_weight:
            raise InvariantBroken(f"device {device.id}: weight {weight} waits")
    for slot in books.in_flight.values():
        if slot.key is not None and any(r.unread for r in books.waiting.get(slot.key, ())):
            raise InvariantBroken(f"slot {slot.id} is on its way, but a request waits for a turn")


def _check_places(books: Books) -> None:
    """The sets of places that choose victims and reads are those of the slots."""
    for model in books.models.values():
        if model.charged != sum(model.charges[i] for i, slot in enumerate(model.slots) if slot):
            raise InvariantBroken(f"model {model.id} is charged {model.charged} granules")
        for order in model.orders.values():
            for layer, bits in order.bits.items():
                slot = model.slots[layer]
                idle = (order.idle | order.idle_small) & bits
                if idle != (bits if slot is not None and slot.evictable else 0):
                    raise InvariantBroken(
                        f"layer {model.id}/{layer} is no victim, or one by mistake"
                    )
                missing = slot is None and layer not in model.failed
                if order.missing & bits != (bits if missing else 0):
                    raise InvariantBroken(f"layer {model.id}/{layer} is not missing, or unknown")
                if order.present & bits != (bits if slot is not None else 0):
                    raise InvariantBroken(f"layer {model.id}/{layer} is not where it should be")


def _check_clients(books: Books) -> None:
    layers = [books.awaited_layer(event) for event in books.awaiting.values()]
    awaited = sum(model.charges[layer] for model, layer in layers)
    if awaited != books.ledger.awaited:
        raise InvariantBroken(f"{awaited} granules awaited, booked {books.ledger.awaited}")
    waiting = [request for requests in books.waiting.values() for request in requests]
    mine = [request for c in books.clients.values() for request in c.requests.values()]
    if {id(r) for r in waiting} != {id(r) for r in mine} or not all(r.open for r in waiting):
        raise InvariantBroken("a request waits for a layer without its client, or not at all")
    for client in books.clients.values():
        keys = [slot.key for slot in client.leases.values()]
        keys += [request.key for request in client.requests.values()]
        layers_held = books.ledger[client.id].layers
        if (keys or layers_held) and Counter(keys) != layers_held:
            raise InvariantBroken(f"client {client.id} is charged for other layers than it has")
    queued = {
        id(request)
        for device in books.devices.values()
        for share in device.shares()
        if share.entry is not None or share.held
        for _, _, request in share.requests
    }
    for request in waiting:
        slot = books.models[request.key.model].slots[request.key.layer]
        if slot is None and id(request) not in queued:
            raise InvariantBroken(f"client {request.client} waits and is not queued")
        if slot is not None and slot.state is SlotState.RESIDENT:
            raise InvariantBroken(f"client {request.client} waits for a resident layer")
