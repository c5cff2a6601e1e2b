"""Which resident layer has the furthest next use: the rule of Belady (1966) over all plans.

Behind a client's position layers get nearer the further back one looks, so of those behind it only
the first evictable one matters, up to the next client's position; that one's due value is what the
soonest of all clients of the model says. One entry for each plan in one heap. Due values fall as
clients step and are found out when their entry comes up; a client whose own events raise them, or
beside whose layers something became evictable, is looked at again before the next question.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from tierd.core.orders import last_before

if TYPE_CHECKING:
    from tierd.core.plans import PlanState
    from tierd.core.residency import Slot
    from tierd.core.reuse import Reuse
    from tierd.core.served import ModelState

_SPARE_ENTRIES = 64  #: outdated ones that the heap may hold beside twice the plans


class Furthest:
    """A heap of one evictable layer for each plan, the one due last on top."""

    def __init__(self, models: dict[int, ModelState]) -> None:
        self._models = models
        self._heap: list[tuple[int, int, int, PlanState]] = []  #: (-due, client, stamp, plan)
        self._stamps: dict[int, int] = {}  #: by client: of its entry; others are outdated
        self._layers: dict[int, int] = {}  #: by client: the layer of its entry
        self._changed: dict[int, PlanState] = {}  #: by client: look again
        self._dry: dict[int, dict[int, PlanState]] = {}  #: by model, client: had nothing evictable
        self._stamp = 0

    def changed(self, client: int, plan: PlanState) -> None:
        """The client did something, or its plan is new."""
        self._changed[client] = plan

    def evictable(self, model: int) -> None:
        """Something of the model became evictable."""
        dry = self._dry.pop(model, None)
        if dry is not None:
            self._changed.update(dry)

    def forget(self, client: int, plan: PlanState) -> None:
        """The plan is over."""
        self._changed.pop(client, None)
        self._stamps.pop(client, None)
        self._layers.pop(client, None)
        if plan.model in self._dry:
            self._dry[plan.model].pop(client, None)

    def top(self) -> tuple[Slot, int] | None:
        """The evictable slot, alone in its granules, that is due last; its due value."""
        if self._changed:
            for client, plan in self._changed.items():
                self._look(client, plan)
            self._changed.clear()
            if len(self._heap) > 2 * len(self._stamps) + _SPARE_ENTRIES:
                self._heap = [e for e in self._heap if self._stamps.get(e[1]) == e[2]]
                heapq.heapify(self._heap)
        heap = self._heap
        while heap:
            negative, client, stamp, plan = heap[0]
            if self._stamps.get(client) != stamp:
                heapq.heappop(heap)
                continue
            model = self._models[plan.model]
            layer = self._layers[client]
            slot = model.slots[layer]
            if slot is None or not slot.evictable or slot.spared:
                heapq.heappop(heap)
                if slot is not None:
                    model.busy(slot)
                self._look(client, plan)
                continue
            due = model.due(layer)
            if due < -negative:
                heapq.heapreplace(heap, (-due, client, stamp, plan))
                continue
            return slot, -negative
        return None

    def top_small(self) -> tuple[Slot, int] | None:
        """Of the slots that share granules, which go last of all; costs a look at every plan."""
        best: tuple[Slot, int] | None = None
        for model in self._models.values():
            for plan in model.plans.values():
                layer = furthest_of(model, plan, plan.route.idle_small)
                if layer is not None:
                    due = model.due(layer)
                    slot = model.slots[layer]
                    if slot is not None and (best is None or due > best[1]):
                        best = slot, due
        return best

    def _look(self, client: int, plan: PlanState) -> None:
        model = self._models[plan.model]
        layer = furthest_of(model, plan, plan.route.idle)
        if layer is None:
            self._stamps.pop(client, None)
            self._dry.setdefault(model.id, {})[client] = plan
            return
        self._stamp += 1
        self._stamps[client] = self._stamp
        self._layers[client] = layer
        heapq.heappush(self._heap, (-model.due(layer), client, self._stamp, plan))


def furthest_of(model: ModelState, plan: PlanState, places: int) -> int | None:
    """The layer among `places` of the plan's order that this client alone would need last."""
    route = plan.route
    if plan.reuse is not None:
        return _least_expected(model, plan, plan.reuse, places)
    while True:
        place = last_before(places, plan.position)
        if place is None:
            return None
        layer = route.layers[place]
        if layer in route.only:
            return layer
        steps = plan.distance(layer)
        if steps is None or (plan.position + steps - place) % route.length == 0:
            return layer
        places &= ~(1 << place)  # the order has this layer again, nearer


def _least_expected(model: ModelState, plan: PlanState, reuse: Reuse, places: int) -> int | None:
    """Of an open plan: what is worth least, and among what was announced only if all else is."""
    slots, bits = model.slots, plan.route.bits
    soon = {layer for layer, (at, _) in plan.hints.items() if at > plan.steps}

    def idle(layer: int) -> bool:
        return bits.get(layer, 0) & places != 0

    def here(layer: int) -> bool:
        return slots[layer] is not None

    found = reuse.least(lambda layer: layer not in soon and idle(layer), here)
    return reuse.least(idle, here) if found is None and soon else found


def passing_behind(plan: PlanState, layer: int) -> int | None:
    """The nearest evictable layer before `layer` in the order that need not stay."""
    route = plan.route
    place = route.only.get(layer)
    if place is None:
        return None
    other = last_before(route.idle & route.passing, place)
    return None if other is None else route.layers[other]
