"""Slots and models: what is where, and what each layer is good for."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from tierd.core.model import LayerKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.core.memory import Claim
    from tierd.core.model import Plan
    from tierd.core.placement import Place
    from tierd.core.plans import PlanState


class SlotState(Enum):
    """What a slot waits for."""

    CLAIMED = "claimed"  #: memory: discards elsewhere must finish first
    READING = "reading"  #: its ReadDone
    RESIDENT = "resident"  #: nothing; it can be leased


@dataclass(slots=True, eq=False)
class Slot:
    """A range of an arena and what it holds."""

    id: int
    generation: int
    key: LayerKey | None  #: None: adopted, holds nothing that is served, only kept for its holders
    arena: int
    place: Place
    state: SlotState
    demanded: bool = False  #: somebody asked for it; else it is fetched ahead of all requests
    claim: Claim | None = None  #: while CLAIMED
    leases: int = 0
    holders: dict[int, None] = field(
        default_factory=dict
    )  #: processes with an earlier daemon's lease

    @property
    def evictable(self) -> bool:
        return self.state is SlotState.RESIDENT and not self.leases and not self.holders


class SlotNumbers:
    """Hands out the lowest free slot number, so that the slot table stays dense."""

    def __init__(self, limit: int, used: Sequence[int] = ()) -> None:
        self._limit = limit
        self._next = max(used, default=-1) + 1
        self._returned = sorted(set(range(self._next)) - set(used))

    @property
    def exhausted(self) -> bool:
        return not self._returned and self._next >= self._limit

    def take(self) -> int:
        if self._returned:
            return heapq.heappop(self._returned)
        self._next += 1
        return self._next - 1

    def give_back(self, number: int) -> None:
        heapq.heappush(self._returned, number)


class ModelState:
    """A served pack: its layers, the slots that hold them, and the plans over it."""

    def __init__(
        self,
        model: int,
        name: str,
        arena: int,
        layer_bytes: Sequence[int],
        charges: Sequence[int],
        device: int = 0,
    ) -> None:
        self.id = model
        self.name = name
        self.arena = arena
        self.device = device
        self.layer_bytes = tuple(layer_bytes)
        self.charges = tuple(charges)  #: granules
        self.keys = tuple(LayerKey(model, layer) for layer in range(len(self.layer_bytes)))
        self.slots: list[Slot | None] = [None] * len(self.layer_bytes)
        self.missing = len(self.layer_bytes)  #: layers without a slot
        self.failed: set[int] = set()  #: layers whose last read failed; membership only
        self.removed = False
        self.plans: dict[int, PlanState] = {}  #: by client, in the order in which they came
        self.users = [0] * len(self.layer_bytes)  #: plans that use the layer
        self.kept = bytearray(len(self.layer_bytes))  #: `retention`: layers that should stay
        self.kept_for: tuple[PlanState, int] | None = None  #: the plan and share that chose them

    def largest(self, plan: Plan) -> int:
        """The layer that decides what the plan reserves."""
        return max((*plan.order, *plan.beside), key=lambda layer: self.charges[layer])

    def put(self, slot: Slot) -> None:
        assert slot.key is not None
        self.slots[slot.key.layer] = slot
        self.missing -= 1

    def drop(self, slot: Slot) -> None:
        assert slot.key is not None
        self.slots[slot.key.layer] = None
        self.missing += 1

    def due(self, layer: int) -> int:
        """When the layer is expected to be asked for next, by whoever comes first (`plans`)."""
        return min(plan.due(layer) for plan in self.plans.values())
