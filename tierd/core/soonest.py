"""Which missing layer is needed soonest: one candidate for each plan, in a heap for each device.

A candidate changes with its client's own events, and with what happens to its model's layers: one
that is evicted may come before it (told at once), one that is fetched was the candidate (found out
when it comes up).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.orders import between, first_after
from tierd.core.retention import moving_layers

if TYPE_CHECKING:
    from tierd.core.leases import Ledger
    from tierd.core.memory import Memory
    from tierd.core.model import LayerKey
    from tierd.core.plans import PlanState
    from tierd.core.served import ModelState

_SPARE_ENTRIES = 64  #: outdated ones that the heap may hold beside twice the plans
#: A candidate is urgent so many steps beyond the layers that move at once, ...
URGENT_STEPS = 1
#: ... and unless the client is silent: for more than what it should take to come to it, times this.
SILENT_TIMES = 4


@dataclass(slots=True)
class Candidate:
    """A layer that some plan will need and that is not in memory."""

    due: int
    client: int
    key: LayerKey
    distance: int
    may_evict: bool  #: else it is fetched into free memory only
    urgent_ns: int  #: it is urgent while its client is expected to ask for it within this time


class Soonest:
    """Heaps of the next missing layer of each plan, the one due first on top."""

    def __init__(self, memory: Memory, ledger: Ledger, models: dict[int, ModelState]) -> None:
        self._memory = memory
        self._ledger = ledger
        self._models = models
        #: by device: heap of (due, client, stamp, plan)
        self._heaps: dict[int, list[tuple[int, int, int, PlanState]]] = {}
        self._stamps: dict[int, int] = {}  #: by client: of its entry; others are outdated
        self._found: dict[int, tuple[int, Candidate]] = {}  #: by client: model's version
        self._changed: dict[int, PlanState] = {}  #: by client: look again
        self._blocked: dict[int, PlanState] = {}  #: may not evict, and too little is free
        self._least = 0  #: granules that the smallest of the blocked ones needs
        self._stamp = 0

    def changed(self, client: int, plan: PlanState) -> None:
        """The client did something, or its plan is new."""
        self._changed[client] = plan

    def missing(self, model: ModelState, layer: int) -> None:
        """The layer is not in memory any more."""
        changed = self._changed
        for client, plan in model.plans.items():
            if client not in changed:
                found = self._found.get(client)
                if found is None or plan.kind == "open":
                    changed[client] = plan
                else:
                    steps = plan.distance(layer)
                    if steps is not None and steps < found[1].distance:
                        changed[client] = plan

    def forget(self, client: int) -> None:
        """The plan is over."""
        self._changed.pop(client, None)
        self._blocked.pop(client, None)
        self._stamps.pop(client, None)
        self._found.pop(client, None)

    def first(self, limit: int, device: int) -> list[Candidate]:
        """At most `limit` candidates that the device has, the ones due first; without those for
        which there is no room that they may take. Costs O(limit * log plans)."""
        self._refresh()
        heap = self._heaps.get(device, [])
        chosen: list[Candidate] = []
        taken: list[tuple[int, int, int, PlanState]] = []
        while heap and len(chosen) < limit:
            entry = heap[0]
            _, client, stamp, plan = entry
            if self._stamps.get(client) != stamp:
                heapq.heappop(heap)
                continue
            version, candidate = self._found[client]
            model = self._models[plan.model]
            if version != model.version:
                heapq.heappop(heap)
                self._look(client, plan)
                continue
            heapq.heappop(heap)
            charge = model.charges[candidate.key.layer]
            if not candidate.may_evict and charge > self._memory.free:
                self._least = min(self._least, charge) if self._blocked else charge
                self._blocked[client] = plan
                del self._stamps[client]
                continue
            taken.append(entry)
            chosen.append(candidate)
        for entry in taken:
            heapq.heappush(heap, entry)
        return chosen

    def _refresh(self) -> None:
        if self._blocked and self._memory.free >= self._least:
            self._changed.update(self._blocked)
            self._blocked.clear()
        if self._changed:
            for client, plan in self._changed.items():
                self._look(client, plan)
            self._changed.clear()
            for heap in self._heaps.values():
                if len(heap) > 2 * len(self._stamps) + _SPARE_ENTRIES:
                    heap[:] = [entry for entry in heap if self._stamps.get(entry[1]) == entry[2]]
                    heapq.heapify(heap)

    def _look(self, client: int, plan: PlanState) -> None:
        model = self._models[plan.model]
        self._blocked.pop(client, None)
        candidate = None
        if model.missing and not model.removed:
            candidate = self._next_missing(model, client, plan)
        if candidate is None:
            self._stamps.pop(client, None)
            self._found.pop(client, None)
            return
        self._stamp += 1
        self._stamps[client] = self._stamp
        self._found[client] = (model.version, candidate)
        heap = self._heaps.setdefault(model.device, [])
        heapq.heappush(heap, (candidate.due, client, self._stamp, plan))

    def _next_missing(self, model: ModelState, client: int, plan: PlanState) -> Candidate | None:
        if plan.reuse is not None:
            return self._hinted(model, client, plan)
        route = plan.route
        missing, moved = route.missing, route.present & route.passing
        position = plan.position
        room = moving_layers(plan.lookahead)
        moving = 0
        for key in self._ledger[client].layers:
            bits = route.bits.get(key.layer, 0) if key.model == model.id else 0
            if bits:
                missing &= ~bits
                moved &= ~bits
            moving += not bits or route.passing & bits != 0
            if moving > room:
                break
        place = first_after(missing, position)
        if place is None:
            return None
        distance = place - position
        if distance <= 0:
            if not plan.cyclic:
                return None
            distance += route.length
        moving += between(moved, position, place)
        key = model.keys[route.layers[place]]
        ahead_ns = plan.compute_ns * distance
        urgent_ns = SILENT_TIMES * ahead_ns if distance <= room + URGENT_STEPS else 0
        return Candidate(ahead_ns - plan.last_ns, client, key, distance, moving < room, urgent_ns)

    def _hinted(self, model: ModelState, client: int, plan: PlanState) -> Candidate | None:
        """Of an open plan only what was announced is fetched ahead, the most likely soonest."""
        held = self._ledger[client].layers
        best: Candidate | None = None
        for layer, (at, ppm) in plan.hints.items():
            key = model.keys[layer]
            if at <= plan.steps or key in held or not plan.route.missing & plan.route.bits[layer]:
                continue
            due = plan.due(layer)
            if ppm and (best is None or due < best.due):
                best = Candidate(due, client, key, at - plan.steps, True, 0)
        return best
