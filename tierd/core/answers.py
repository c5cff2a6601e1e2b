"""Answers to clients: what ends a request, and what it changes in the books."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import Acquire, Grant, Plan, Refuse

if TYPE_CHECKING:
    from tierd.core.books import Books, Client, Request
    from tierd.core.residency import Slot
    from tierd.core.served import ModelState


class Answers:
    """Grants and refuses."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def grant(self, request: Request, client: Client, slot: Slot) -> None:
        books = self._books
        lease = books.next_lease
        books.next_lease += 1
        client.leases[lease] = slot
        if not slot.leases:
            books.policy.leased(slot)
        slot.leases += 1
        waited_ns = 0 if request.since_ns is None else books.now - request.since_ns
        if client.plan is not None:
            client.plan.waited(waited_ns)
        client.stall_ns += waited_ns
        client.granted += 1
        books.count["grants"] += 1
        books.count["stall_ns"] += waited_ns
        place = slot.place
        books.actions.append(
            Grant(
                client.id, request.request, lease, request.key, slot.id, slot.generation,
                slot.arena, place.offset, place.nbytes, waited_ns,
            )
        )  # fmt: skip
        books.tell("grant", request.key, "client {} after {} ns", client.id, waited_ns)

    def refuse(self, request: Plan | Acquire | Request, code: str, text: str) -> None:
        self._books.count["refusals"] += 1
        self._books.actions.append(Refuse(request.client, request.request, code, text))
        key = None if isinstance(request, Plan) else request.key
        self._books.tell("refuse", key, "client {}: {}: {}", request.client, code, text)

    def refuse_too_small(
        self, event: Plan | Acquire, model: ModelState, layer: int, client: Client
    ) -> None:
        if not self._books.ledger.available_slots and not self._books.ledger[client.id].slots:
            self.refuse_slot(event, model, layer)
            return
        granule = self._books.config.granule_bytes
        free = self._books.ledger.available + self._books.ledger[client.id].committed
        self.refuse(
            event,
            "budget_too_small",
            f"layer {layer} of model '{model.name}' needs {model.charges[layer] * granule} bytes; "
            f"{max(free, 0) * granule} of the budget of {self._books.memory.budget * granule} are "
            f"available ({len(self._books.clients) - 1} other clients, "
            f"{self._books.ledger.quarantined * granule} bytes in quarantine, "
            f"{self._books.ledger.pinned * granule} pinned)",
        )

    def refuse_slot(self, event: Plan | Acquire, model: ModelState, layer: int) -> None:
        ledger = self._books.ledger
        self.refuse(
            event,
            "lease_limit",
            f"layer {layer} of model '{model.name}' needs a slot; of {ledger.slot_limit} slots "
            f"clients hold or have reserved {ledger.committed_slots}, and "
            f"{ledger.quarantined_slots} are in quarantine, {ledger.pinned_slots} pinned: "
            f"release first",
        )

    def close(self, request: Request) -> None:
        """The request has its answer, or nobody wants one any more."""
        client = self._books.clients[request.client]
        self.end(request, client)
        self._books.ledger.let_go(client.id, request.key)

    def end(self, request: Request, client: Client) -> None:
        """The request is open no more; what it is charged stays."""
        request.open = False
        client.stalled -= request.since_ns is not None
        del client.requests[request.number]

    def enqueue(self, request: Request) -> None:
        """A read is wanted by the request's deadline, which may have become an earlier one."""
        device = self._books.devices[self._books.models[request.key.model].device]
        device.enqueue(request.share, request)
