"""What the clients' plans ask of the devices: the input of `prediction`, read from the books."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.prediction import Load

if TYPE_CHECKING:
    from tierd.core.books import Books, Client
    from tierd.core.plans import PlanState


def loads_of(books: Books) -> list[Load]:
    """One pass of every client with a cyclic plan that was seen to step; of others nothing can be
    said. What the policy keeps of a model is not read, everything else once in a pass."""
    loads = []
    for client, plan in steady_plans(books):
        model = books.models[plan.model]
        ssd_bytes = sum(model.layer_bytes[layer] for layer in passing(books, plan))
        loads.append(load_of(client, plan, model.device, ssd_bytes))
    return loads


def steady_plans(books: Books) -> list[tuple[Client, PlanState]]:
    """The clients of whose passes something can be said, and their plans."""
    return [
        (client, client.plan)
        for client in books.clients.values()
        if client.plan is not None
        and client.plan.kind == "cyclic"
        and client.plan.stepped_ns is not None
    ]


def passing(books: Books, plan: PlanState) -> list[int]:
    """The layers that come once in a pass, and do not stay."""
    model = books.models[plan.model]
    return [layer for layer in plan.layers() if not model.kept[layer]]


def load_of(client: Client, plan: PlanState, device: int, ssd_bytes: int) -> Load:
    """What a pass of the client asks of the device."""
    return Load(
        client=client.id,
        model=plan.model,
        device=device,
        compute_ns=plan.pass_compute_ns or plan.compute_ns * len(plan.order),
        ssd_bytes=ssd_bytes,
        weight=client.weight,
        tokens_per_pass=plan.tokens_per_pass,
    )
