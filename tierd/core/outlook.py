"""What the clients' plans ask of the devices: the input of `prediction`, read from the books."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.prediction import Load

if TYPE_CHECKING:
    from tierd.core.books import Books


def loads_of(books: Books) -> list[Load]:
    """One pass of every client with a cyclic plan that was seen to step; of others nothing can be
    said. What the policy keeps of a model is not read, everything else once in a pass."""
    loads = []
    for client in books.clients.values():
        plan = client.plan
        if plan is None or plan.kind != "cyclic" or plan.stepped_ns is None:
            continue
        model = books.models[plan.model]
        passing = [layer for layer in plan.layers() if not model.kept[layer]]
        loads.append(
            Load(
                client=client.id,
                model=model.id,
                device=model.device,
                compute_ns=plan.pass_compute_ns or plan.compute_ns * len(plan.order),
                ssd_bytes=sum(model.layer_bytes[layer] for layer in passing),
                weight=client.weight,
                tokens_per_pass=plan.tokens_per_pass,
            )
        )
    return loads
