"""A machine that is fed by hand: reads and discards are done at once, and it is checked each time.

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
    slot_limit: int = 1 << 30,
) -> TierMachine:
    """One arena, models of these layer sizes (in granules), and clients 1, 2, ..."""
    machine = TierMachine(CoreConfig(granules * G, reads_in_flight=2, slot_limit=slot_limit))
    warm = granules if warm is None else warm
    machine.handle(ArenaAdded(0, 0, 1024 * G, warm * G))
    for number, layers in enumerate(models):
        sizes = tuple(size * G for size in layers)
        machine.handle(ModelAdded(0, number, f"m{number}", 0, sizes))
    for client in range(1, clients + 1):
        machine.handle(ClientJoined(0, client))
    return machine


def feed(machine: TierMachine, *events: Event) -> list[Action]:
    """All actions, with reads and discards done at once; the invariants hold after each event."""
    actions: list[Action] = []
    todo = list(events)
    while todo:
        event = todo.pop(0)
        new = machine.handle(event)
        machine.check()
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
