"""Who is let in: plans, and requests under the rule of `leases`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import Acquire, Admit, Later, Plan
from tierd.core.plans import PlanState

if TYPE_CHECKING:
    from tierd.core.answers import Answers
    from tierd.core.books import Books, Client
    from tierd.core.convoy import Convoys
    from tierd.core.model import PlanOver
    from tierd.core.served import ModelState


class Admission:
    """Admits plans and requests, or answers why not."""

    def __init__(self, books: Books, answers: Answers, convoys: Convoys) -> None:
        self._books = books
        self._answers = answers
        self._convoys = convoys

    def plan(self, event: Plan) -> None:
        client = self._books.client(event.client)
        model = self._books.served(event.model)
        if isinstance(model, str):
            self._answers.refuse(event, model, f"model {event.model} is not served")
            return
        layers = len(model.slots)
        named = (*event.order, *event.beside)
        wrong = next((layer for layer in named if not 0 <= layer < layers), None)
        if not event.order or event.lookahead < 0 or wrong is not None:
            what = f"layer {wrong}" if wrong is not None else f"lookahead {event.lookahead}"
            self._answers.refuse(
                event,
                "bad_request",
                f"a plan over model '{model.name}' needs layers 0 to {layers - 1} and a lookahead "
                f">= 0; this one has {what if event.order else 'no layers'}",
            )
            return
        if client.id in self._books.awaiting:
            before = self._books.awaiting[client.id]
            self.withdraw(before, "bad_request", "a later plan replaces this one")
        reserve = model.charges[model.largest(event)]
        if self._admits_plan(event, model, reserve):
            self._admit(event, client, model, reserve)
        elif not self._waits(event, client, reserve):
            self._answers.refuse_too_small(event, model, model.largest(event), client)

    def plan_over(self, event: PlanOver) -> None:
        """A reserve that ends makes neither sum of the rule larger, whatever the client holds."""
        client = self._books.client(event.client)
        awaiting = self._books.awaiting.get(client.id)
        if isinstance(awaiting, Plan) and awaiting.model == event.model:
            self.withdraw(awaiting, "bad_request", "the client took its plan back")
        if client.plan is not None and client.plan.model == event.model:
            self.drop_plan(client)
            self._books.ledger.set_reserve(client.id, 0)
            self._books.tell("plan over", None, "client {} follows no plan any more", client.id)

    def admit_waiting(self) -> list[Acquire]:
        """Admits the plans that fit now, refuses what has waited long enough. Returns the requests
        that fit now; they are to be asked again."""
        fit: list[Acquire] = []
        for event in list(self._books.awaiting.values()):
            model, layer = self._books.awaited_layer(event)
            reserve = model.charges[layer]
            client = self._books.clients[event.client]
            if isinstance(event, Plan):
                admitted = self._admits_plan(event, model, reserve)
            else:
                admitted = self._admits_first(event, model, reserve)
            if admitted:
                self.stop_waiting(client.id)
                if isinstance(event, Plan):
                    self._admit(event, client, model, reserve)
                else:
                    fit.append(event)
            elif self._books.now - event.at_ns >= self._books.config.admission_patience_ns:
                self.stop_waiting(client.id)
                self._answers.refuse_too_small(event, model, layer, client)
        return fit

    def _waits(self, event: Plan | Acquire, client: Client, reserve: int) -> bool:
        """Lets the event wait, if it fits as soon as others hold no more than their reserves."""
        ledger = self._books.ledger
        if client.id in self._books.awaiting or not ledger.admits_once_released(client.id, reserve):
            return False
        self._books.awaiting[client.id] = event
        ledger.awaited += reserve
        key, what = (None, "plan") if isinstance(event, Plan) else (event.key, "first request")
        self._books.tell("wait", key, "the {} of client {} waits until others hold no more than "
            "their reserves", what, client.id,
        )  # fmt: skip
        return True

    def _admits_plan(self, plan: Plan, model: ModelState, reserve: int) -> bool:
        layers = dict.fromkeys(plan.order)
        return self._books.ledger.admits_plan(
            plan.client, reserve, lambda: self._books.wanted.anew(model, layers)
        )

    def _admits_first(self, event: Acquire, model: ModelState, charge: int) -> bool:
        """Whether a client without a plan, which holds nothing, may have its first layer now."""
        wanted = model.reasons[event.key.layer] > 0
        ledger = self._books.ledger
        awaited = ledger.awaited
        if event.client in self._books.awaiting:
            ledger.awaited -= charge  # what it waits for itself is not kept from it
        admitted = ledger.admits(event.client, extra=charge, wanted=wanted, reserve=charge)
        ledger.awaited = awaited
        return admitted

    def withdraw(self, event: Plan | Acquire, code: str, text: str) -> None:
        """What waits for room is refused."""
        self.stop_waiting(event.client)
        self._answers.refuse(event, code, text)

    def stop_waiting(self, client: int) -> None:
        event = self._books.awaiting.pop(client)
        model, layer = self._books.awaited_layer(event)
        self._books.ledger.awaited -= model.charges[layer]

    def _admit(self, event: Plan, client: Client, model: ModelState, reserve: int) -> None:
        self._books.ledger.set_reserve(client.id, reserve)
        self.drop_plan(client)
        client.plan = PlanState(
            model.id,
            model.order_of(event.order),
            kind=event.kind,
            lookahead=event.lookahead,
            at_ns=self._books.now,
            tokens_per_pass=event.tokens_per_pass,
            reuse=model.reuse_of_layers() if event.kind == "open" else None,
        )
        model.add_plan(client.id, client.plan)
        self._books.wanted.add(model, client.plan.route.indices)
        self._books.policy.plans_changed(model)
        nbytes = reserve * self._books.config.granule_bytes
        self._books.actions.append(Admit(client.id, event.request, nbytes))
        self._books.tell("admit", None, "client {} on model '{}', {} bytes reserved", client.id,
            model.name, nbytes,
        )  # fmt: skip

    def drop_plan(self, client: Client) -> None:
        if client.plan is None:
            return
        self._convoys.plan_dropped(client)
        model = self._books.models[client.plan.model]
        model.drop_plan(client.id)
        self._books.wanted.drop(model, client.plan.route.indices)
        self._books.policy.plan_over(client.id, client.plan)
        client.plan = None
        self._books.policy.plans_changed(model)

    def admits(self, event: Acquire, client: Client, model: ModelState) -> bool:
        """Whether the admission rule allows the request; answers it where not."""
        key = event.key
        charge = model.charges[key.layer]
        account = self._books.ledger[client.id]
        extra = self._books.ledger.extra(client.id, key, charge)
        if client.plan is None and charge > account.reserve and not account.held:
            if self._admits_first(event, model, charge):
                self._books.ledger.set_reserve(client.id, charge)
                return True
            if not event.ahead and self._waits(event, client, charge):
                return False
        else:
            wanted = model.reasons[key.layer] > 0
            if self._books.ledger.admits(client.id, extra=extra, wanted=wanted):
                return True
        if event.ahead:
            self._books.count["later"] += 1
            self._books.actions.append(Later(client.id, event.request))
            self._books.tell("later", key, "client {} holds {} granules, {} more are not free of "
                "other clients' reserves", client.id, account.held, extra,
            )  # fmt: skip
        elif not account.held:
            self._answers.refuse_too_small(event, model, key.layer, client)
        elif not self._books.ledger.available_slots:
            self._answers.refuse_slot(event, model, key.layer)
        else:
            granule = self._books.config.granule_bytes
            self._answers.refuse(
                event,
                "lease_limit",
                f"client {client.id} holds {account.held * granule} bytes in "
                f"{len(client.leases)} leases and {len(client.requests)} requests, asks for "
                f"{extra * granule} more, its reserve is {account.reserve * granule} and "
                f"{max(self._books.ledger.available, 0) * granule} are available: release first",
            )
        return False
