"""What the machine reports about itself: immutable, exact, taken between two events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.books import Books, Client
    from tierd.core.served import ModelState


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """Bytes. `used` counts every granule with memory behind it, occupied or not."""

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    resident_bytes: int
    leased_bytes: int
    in_flight_bytes: int
    quarantined_bytes: int
    pinned_bytes: int
    reserved_bytes: int  #: what admission has promised to all clients
    discarding_bytes: int
    above_budget_bytes: int = 0  #: of `used`; only after the budget was lowered


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the machine was made."""

    grants: int = 0
    hits: int = 0  #: acquires that were granted at once
    misses: int = 0  #: acquires that had to wait for a read
    later: int = 0
    refusals: int = 0
    reads: int = 0  #: reads that were started
    reads_ahead: int = 0  #: of them, without a request
    read_bytes: int = 0  #: of reads that are done
    reads_failed: int = 0
    evictions: int = 0
    discards: int = 0
    stall_ns: int = 0
    holds: int = 0  #: of clients, to bring them into phase with others (`convoy`)
    held_ns: int = 0  #: what these holds lasted, together


@dataclass(frozen=True, slots=True)
class ClientSnapshot:
    """One client. `model` and `position` are of its plan, None without one."""

    client: int
    model: int | None
    position: int | None  #: index into the plan's order of the layer that was asked for last
    leases: int
    leased_bytes: int  #: what its leases and accepted requests are charged with
    waiting: int  #: open requests
    reserved_bytes: int
    stall_ns: int
    granted: int
    weight: int
    read_bytes: int  #: its part of what was read: a read is for all who wait for it, in equal parts
    kind: str | None  #: of its plan
    tokens_per_pass: int | None


@dataclass(frozen=True, slots=True)
class LayerSnapshot:
    """One layer of a model."""

    layer: int
    nbytes: int
    state: str  #: "absent", "reading" or "resident"
    pinned: bool
    leases: int
    slot: int | None
    generation: int | None
    next_use: int | None  #: steps until the client that needs it soonest, None if no plan has it


@dataclass(frozen=True, slots=True)
class Snapshot:
    memory: MemorySnapshot
    counters: Counters
    clients: tuple[ClientSnapshot, ...]
    models: dict[int, tuple[LayerSnapshot, ...]]  #: by model id


def snapshot_of(books: Books) -> Snapshot:
    """The state between two events, in bytes and steps. Costs O(layers * plans): who needs a part
    of it asks for that."""
    return Snapshot(
        memory_of(books),
        counters_of(books),
        clients_of(books),
        {model: layers_of(books, model) for model in books.models},
    )


def memory_of(books: Books) -> MemorySnapshot:
    granule = books.config.granule_bytes
    memory = books.memory
    resident = leased = in_flight = 0
    for slot in books.slots.values():
        nbytes = slot.place.nbytes
        resident += nbytes * (slot.state is SlotState.RESIDENT and slot.key is not None)
        leased += nbytes * (slot.leases > 0)
        in_flight += nbytes * (slot.state is not SlotState.RESIDENT)
    return MemorySnapshot(
        memory.budget * granule, memory.warm * granule, memory.peak * granule,
        resident, leased, in_flight, books.ledger.quarantined * granule,
        books.ledger.pinned * granule,
        books.ledger.committed * granule, memory.discarding * granule,
        max(memory.warm - memory.budget, 0) * granule,
    )  # fmt: skip


def counters_of(books: Books) -> Counters:
    return Counters(**books.count)


def clients_of(books: Books) -> tuple[ClientSnapshot, ...]:
    return tuple(_client_snapshot(books, client) for client in books.clients.values())


def layers_of(books: Books, model: int) -> tuple[LayerSnapshot, ...]:
    """Raises KeyError for a model that is not known."""
    state = books.models[model]
    return tuple(_layer_snapshot(books, state, layer) for layer in range(len(state.slots)))


def _client_snapshot(books: Books, client: Client) -> ClientSnapshot:
    granule = books.config.granule_bytes
    account = books.ledger[client.id]
    plan = client.plan
    return ClientSnapshot(
        client.id,
        None if plan is None else plan.model,
        None if plan is None else max(plan.position, 0),
        len(client.leases),
        account.held * granule,
        len(client.requests),
        account.reserve * granule,
        client.stall_ns,
        client.granted,
        client.weight,
        sum(device.charged_bytes(client.id) for device in books.devices.values()),
        None if plan is None else plan.kind,
        None if plan is None else plan.tokens_per_pass,
    )


def _layer_snapshot(books: Books, model: ModelState, layer: int) -> LayerSnapshot:
    slot = model.slots[layer]
    distances = [plan.distance(layer) for plan in model.plans.values()]
    next_use = min((steps for steps in distances if steps is not None), default=None)
    nbytes = model.layer_bytes[layer]
    pinned = model.keys[layer] in books.pins
    if slot is None:
        return LayerSnapshot(layer, nbytes, "absent", pinned, 0, None, None, next_use)
    state = "resident" if slot.state is SlotState.RESIDENT else "reading"
    return LayerSnapshot(
        layer, nbytes, state, pinned, slot.leases, slot.id, slot.generation, next_use
    )
