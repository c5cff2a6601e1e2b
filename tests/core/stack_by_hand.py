"""Three tiers fed by hand: one event in, the exact actions out. Layers are granules of G bytes."""

from __future__ import annotations

from typing import TypeVar

from tierd.core.model import ArenaAdded, CoreConfig, LayerKey, ModelAdded, Read, ReadDone
from tierd.core.stack import TierStack
from tierd.core.stack_model import (
    Copy,
    CopyDone,
    DirectRead,
    GpuArenaAdded,
    JoinedGpu,
    ModelPlaced,
    StackAction,
    StackConfig,
    StackEvent,
)

T = TypeVar("T")
G = 2 << 20
FIRST = 10  #: client ids on GPU 0 start here


def stack_of(
    dram: int,
    gpu: int,
    *models: tuple[int, ...],
    gpus: int = 1,
    clients: int = 1,
    copies: int = 1,
    early: bool = False,
    direct: bool = False,
) -> TierStack:
    """Budgets and layer sizes in granules; clients 10, 11, ... on GPU 0, 20, ... on GPU 1."""
    config = StackConfig(
        CoreConfig(dram * G),
        (CoreConfig(gpu * G, reads_in_flight=copies),) * gpus,
        early=early,
        direct=(direct,) * gpus,
    )
    stack = TierStack(config)
    stack.handle(ArenaAdded(0, 0, 1024 * G, dram * G))
    for number in range(gpus):
        stack.handle(GpuArenaAdded(0, number, 100 + number, 1024 * G, gpu * G))
    for model, sizes in enumerate(models):
        stack.handle(ModelAdded(0, model, f"m{model}", 0, tuple(size * G for size in sizes)))
        for number in range(gpus):
            stack.handle(ModelPlaced(0, number, model, 100 + number))
    for number in range(gpus):
        for client in range(clients):
            stack.handle(JoinedGpu(0, FIRST * (number + 1) + client, number))
    return stack


def feed(stack: TierStack, *events: StackEvent) -> list[StackAction]:
    actions: list[StackAction] = []
    for event in events:
        actions += stack.handle(event)
        stack.check()
    return actions


def of(kind: type[T], actions: list[StackAction]) -> list[T]:
    return [action for action in actions if isinstance(action, kind)]


def settle(stack: TierStack, actions: list[StackAction], at_ns: int = 0) -> list[StackAction]:
    """Completes reads and copies until nothing is under way; returns all actions, these first."""
    done = 0
    while done < len(actions):
        action = actions[done]
        done += 1
        if isinstance(action, Read):
            actions += feed(stack, ReadDone(at_ns, action.slot))
        elif isinstance(action, Copy | DirectRead):
            actions += feed(stack, CopyDone(at_ns, action.gpu, action.slot))
    return actions


def finish(stack: TierStack, at_ns: int = 0) -> list[StackAction]:
    """Completes whatever is under way, reads first, until nothing is; returns all actions."""
    actions: list[StackAction] = []
    while True:
        reading = [slot.id for slot in stack.dram.books.in_flight.values() if slot.claim is None]
        copying = [
            (one.gpu, slot) for one in stack.exchange.feeds.values() for slot in list(one.copying)
        ]
        if not (reading or copying):
            return actions
        actions += feed(stack, *(ReadDone(at_ns, slot) for slot in reading))
        actions += feed(stack, *(CopyDone(at_ns, gpu, slot) for gpu, slot in copying))


def key(layer: int, model: int = 0) -> LayerKey:
    return LayerKey(model, layer)
