"""What there is: arenas, models and clients, as they come and go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.books import Client
from tierd.core.residency import SlotState
from tierd.core.served import ModelState
from tierd.core.shares import Device

if TYPE_CHECKING:
    from tierd.core.admission import Admission
    from tierd.core.answers import Answers
    from tierd.core.books import Books
    from tierd.core.convoy import Convoys
    from tierd.core.emptying import Emptier
    from tierd.core.model import (
        ArenaAdded,
        ClientGone,
        ClientJoined,
        ModelAdded,
        ModelRemoved,
        WeightChanged,
    )
    from tierd.core.pins import Pins
    from tierd.core.restart import Restart


class Inventory:
    """Who goes takes along what nobody else needs."""

    def __init__(
        self,
        books: Books,
        answers: Answers,
        admission: Admission,
        convoys: Convoys,
        emptier: Emptier,
        restart: Restart,
        pins: Pins,
    ) -> None:
        self._books = books
        self._answers = answers
        self._admission = admission
        self._convoys = convoys
        self._emptier = emptier
        self._restart = restart
        self._pins = pins

    def arena_added(self, event: ArenaAdded) -> None:
        granule = self._books.config.granule_bytes
        span, warm = event.span_bytes // granule, -(-event.warm_bytes // granule)
        if self._books.memory.has_arena(event.arena):
            raise self._books.illegal(f"arena {event.arena} exists")
        if not 0 <= warm <= span:
            raise self._books.illegal(
                f"arena {event.arena}: {event.warm_bytes} warm bytes in {event.span_bytes}"
            )
        if self._books.memory.warm + self._books.memory.promised + warm > self._books.memory.budget:
            raise self._books.illegal(
                f"arena {event.arena}: {event.warm_bytes} warm bytes, the budget of "
                f"{self._books.config.budget_bytes} has {self._books.memory.warm * granule} in use"
            )
        self._books.memory.add_arena(event.arena, span, warm)

    def model_added(self, event: ModelAdded) -> None:
        if event.model in self._books.models or event.model in self._books.removed:
            raise self._books.illegal(f"model {event.model} exists or existed")
        if not self._books.memory.has_arena(event.arena):
            raise self._books.illegal(f"model {event.model}: no arena {event.arena}")
        if any(nbytes <= 0 or nbytes % 4096 for nbytes in event.layer_bytes):
            raise self._books.illegal(
                f"model {event.model}: a layer is empty or no multiple of 4 KiB"
            )
        self._books.devices.setdefault(event.device, Device(event.device))
        charges = [self._books.memory.charge(nbytes) for nbytes in event.layer_bytes]
        self._books.models[event.model] = ModelState(
            event.model, event.name, event.arena, event.layer_bytes, charges, event.device
        )

    def model_removed(self, event: ModelRemoved) -> None:
        model = self._books.models.get(event.model)
        if model is None or model.removed:
            raise self._books.illegal(f"model {event.model} is not served")
        model.removed = True
        self._books.removed.add(model.id)
        self._convoys.model_removed(model.id)
        self._pins.forget(model)
        for client in self._books.clients.values():
            if client.plan is not None and client.plan.model == model.id:
                self._admission.drop_plan(client)
                self._books.ledger.set_reserve(client.id, 0)
        for awaiting in list(self._books.awaiting.values()):
            if self._books.awaited_layer(awaiting)[0] is model:
                text = f"model '{model.name}' was removed"
                self._admission.withdraw(awaiting, "model_removed", text)
        for key in model.keys:
            for request in self._books.waiting.pop(key, ()):
                self._answers.close(request)
                self._answers.refuse(request, "model_removed", f"model '{model.name}' was removed")
        for slot in list(model.slots):
            if slot is None:
                continue
            if slot.state is SlotState.CLAIMED:
                self._emptier.abandon(slot)
            elif slot.evictable:
                self._emptier.evict(slot, "model '{}' was removed", model.name)
        self._books.leaving[model.id] = model
        self._emptier.forget_if_empty(model)

    def client_joined(self, event: ClientJoined) -> None:
        if event.client in self._books.clients:
            raise self._books.illegal(f"client {event.client} is connected")
        self._books.clients[event.client] = Client(event.client, event.weight)
        self._books.ledger.open(event.client)

    def weight_changed(self, event: WeightChanged) -> None:
        client = self._books.client(event.client)
        if event.weight < 1:
            raise self._books.illegal(f"client {event.client}: a weight of {event.weight}")
        client.weight = event.weight
        for device in self._books.devices.values():
            device.weigh(client.id, event.weight)

    def client_gone(self, event: ClientGone) -> None:
        client = self._books.client(event.client)
        if client.id in self._books.awaiting:
            self._admission.stop_waiting(client.id)
        for request in list(client.requests.values()):
            waiting = self._books.waiting[request.key]
            waiting.remove(request)
            if not waiting:
                del self._books.waiting[request.key]
            self._answers.close(request)
        leases = list(client.leases.values())
        client.leases.clear()
        for slot in leases:
            slot.leases -= 1
        self._admission.drop_plan(client)
        for device in self._books.devices.values():
            device.drop(client.id)
        del self._books.clients[client.id]
        self._books.ledger.close(client.id)
        for slot in {slot.id: slot for slot in leases}.values():
            if event.holder is not None:
                self._restart.quarantine(slot, event.holder)
            self._books.policy.resident(slot)
            self._emptier.no_longer_used(slot)
        self._books.tell("gone", None, "client {} left {} leases behind", client.id, len(leases))
