"""Layers that clients ask for and give back: granted at once, or read first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.books import Request
from tierd.core.plans import LONGEST_STEP_NS
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.admission import Admission
    from tierd.core.answers import Answers
    from tierd.core.books import Books, Client
    from tierd.core.convoy import Convoys
    from tierd.core.emptying import Emptier
    from tierd.core.model import Acquire, LayerKey, Release
    from tierd.core.plans import PlanState


class Requests:
    """Takes acquires and releases; what a read brings is granted when it has ended."""

    def __init__(
        self,
        books: Books,
        answers: Answers,
        admission: Admission,
        convoys: Convoys,
        emptier: Emptier,
    ) -> None:
        self._books = books
        self._answers = answers
        self._admission = admission
        self._convoys = convoys
        self._emptier = emptier

    def acquire(self, event: Acquire) -> None:
        books = self._books
        client = books.client(event.client)
        key = event.key
        model = books.served(key.model)
        if isinstance(model, str):
            self._answers.refuse(event, model, f"model {key.model} is not served")
            return
        if not 0 <= key.layer < len(model.slots):
            self._answers.refuse(
                event, "not_found", f"model '{model.name}' has layers 0 to {len(model.slots) - 1}, "
                f"not {key.layer}",
            )  # fmt: skip
            return
        if not self._admission.admits(event, client, model):
            return
        idle = not client.leases and not client.requests
        wanted = model.reasons[key.layer] > 0
        books.ledger.hold(client.id, key, model.charges[key.layer], wanted=wanted)
        stalled = idle or not event.ahead
        deadline_ns = self._deadline_ns(client, stalled=stalled)
        plan = client.plan
        if plan is not None:
            plan.last_ns = books.now
            if plan.model == key.model and not self._asked_already(client, plan, key):
                plan.advance(key.layer, books.now)
                self._convoys.stepped(client)
            books.policy.touched(client.id, plan)
        books.arrivals += 1
        share = books.devices[model.device].share(client.id, client.weight)
        request = Request(
            client.id, event.request, key, books.now if stalled else None, deadline_ns,
            books.arrivals, share,
        )  # fmt: skip
        slot = model.slots[key.layer]
        if slot is not None and slot.state is SlotState.RESIDENT:
            books.count["hits"] += 1
            self._answers.grant(request, client, slot)
            return
        books.count["misses"] += 1
        if key.layer in model.failed:
            books.policy.worth_a_read_again(model, key.layer)
        client.requests[request.number] = request
        books.waiting.setdefault(key, []).append(request)
        client.stalled += stalled
        if slot is None:
            self._answers.enqueue(request)
        else:
            slot.demanded = True
            request.unread = False
            books.bills[slot.id].join(share)
        books.tell("wait", key, "client {} {}", client.id,
            "stalls for it" if stalled else "wants it ahead",
        )  # fmt: skip

    def _deadline_ns(self, client: Client, *, stalled: bool) -> int:
        """When the client's compute will reach a layer that it asks for now: after those that it
        stalls for, and before one ahead after all that it holds or asked for; at most 1 s."""
        before = client.stalled if stalled else len(client.leases) + len(client.requests)
        now = self._books.now
        if client.plan is None or not before:
            return now
        return now + min(before * client.plan.compute_ns, LONGEST_STEP_NS)

    def _asked_already(self, client: Client, plan: PlanState, key: LayerKey) -> bool:
        """Asking again for what it just asked for does not move a client along its plan."""
        return (
            plan.position >= 0
            and plan.order[plan.position] == key.layer
            and self._books.ledger[client.id].layers[key] > 1
        )

    def release(self, event: Release) -> None:
        client = self._books.client(event.client)
        slot = client.leases.get(event.lease)
        if slot is None:
            raise self._books.illegal(f"client {event.client} has no lease {event.lease}")
        del client.leases[event.lease]
        slot.leases -= 1
        assert slot.key is not None
        self._books.ledger.let_go(client.id, slot.key)
        if client.plan is not None:
            client.plan.last_ns = self._books.now
            self._books.policy.touched(client.id, client.plan)
        if not client.leases and client.requests:
            self._promote(client)
        self._books.policy.resident(slot)
        self._emptier.no_longer_used(slot)

    def _promote(self, client: Client) -> None:
        """The client has nothing left to compute with: it stalls for its oldest request."""
        requests = client.requests.values()
        if client.stalled:
            return
        request = next(iter(requests))
        request.since_ns = self._books.now
        client.stalled += 1
        if request.unread and request.deadline_ns > self._books.now:
            request.deadline_ns = self._books.now
            self._answers.enqueue(request)
