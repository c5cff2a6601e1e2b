"""A machine that is fed by hand, and checked each time; with `feed` reads and discards are done.

Layers are one granule (G) or as a test says.
"""

from __future__ import annotations

from typing import TypeVar

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Action,
    ArenaAdded,
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Event,
    LayerKey,
    ModelAdded,
    Read,
    ReadDone,
)

G = 2 << 20
T = TypeVar("T")


def machine_of(
    granules: int,
    *models: tuple[int, ...],
    clients: int,
    warm: int | None = None,
    reads_in_flight: int = 2,
    span: int = 1024,
    slot_limit: int = 1 << 30,
) -> TierMachine:
    """One arena, models of these layer sizes (in granules), and clients 1, 2, ..."""
    config = CoreConfig(granules * G, reads_in_flight=reads_in_flight, slot_limit=slot_limit)
    machine = TierMachine(config)
    warm = granules if warm is None else warm
    machine.handle(ArenaAdded(0, 0, span * G, warm * G))
    for number, layers in enumerate(models):
        sizes = tuple(size * G for size in layers)
        machine.handle(ModelAdded(0, number, f"m{number}", 0, sizes))
    for client in range(1, clients + 1):
        machine.handle(ClientJoined(0, client))
    return machine


def tell(machine: TierMachine, *events: Event) -> list[Action]:
    """All actions; the invariants hold after each event."""
    actions: list[Action] = []
    for event in events:
        actions += machine.handle(event)
        machine.check()
    return actions


def feed(machine: TierMachine, *events: Event) -> list[Action]:
    """All actions, with reads and discards done at once; the invariants hold after each event."""
    actions: list[Action] = []
    todo = list(events)
    while todo:
        event = todo.pop(0)
        new = tell(machine, event)
        actions += new
        for action in new:
            if isinstance(action, Read):
                todo.append(ReadDone(event.at_ns, action.slot))
            elif isinstance(action, Discard):
                todo.append(DiscardDone(event.at_ns, action.arena, action.offset, action.nbytes))
    return actions


def key(layer: int, model: int = 0) -> LayerKey:
    return LayerKey(model, layer)


def of(kind: type[T], actions: list[Action]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]
