"""Models: their layers and slots, the plans over them, what each layer is good for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import LayerKey
from tierd.core.orders import Order
from tierd.core.plans import NEVER
from tierd.core.reuse import Reuse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tierd.core.model import Plan
    from tierd.core.plans import PlanState
    from tierd.core.residency import Slot


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
        self.charged = 0  #: granules of the layers that have one
        self.version = 0  #: changes whenever a layer comes or goes
        self.failed: set[int] = set()  #: layers whose last read failed; membership only
        self.removed = False
        self.plans: dict[int, PlanState] = {}  #: by client, in the order in which they came
        self.orders: dict[tuple[int, ...], Order] = {}  #: those of the plans
        self.reuse: Reuse | None = None  #: once there was an open plan
        self.users = [0] * len(self.layer_bytes)  #: plans that use the layer
        self.reasons = [0] * len(self.layer_bytes)  #: for which the layer is wanted (`wanted`)
        self.kept = bytearray(len(self.layer_bytes))  #: `retention`: layers that should stay
        self.kept_for: tuple[PlanState, int] | None = None  #: the plan and share that chose them

    def largest(self, plan: Plan) -> int:
        """The layer that decides what the plan reserves."""
        return max((*plan.order, *plan.beside), key=lambda layer: self.charges[layer])

    def due(self, layer: int) -> int:
        """When the layer is expected to be asked for next, by whoever comes first (`plans`)."""
        soonest = NEVER
        for plan in self.plans.values():
            route = plan.route
            if plan.cyclic and layer in route.only:
                steps = route.only[layer] - plan.position
                if steps <= 0:
                    steps += route.length
                due = plan.compute_ns * steps - plan.last_ns
            else:
                due = plan.due(layer)
            if due < soonest:
                soonest = due
        return soonest

    # -------------------------------------------------------------------------------------- plans

    def order_of(self, layers: Sequence[int]) -> Order:
        """The order that a new plan follows, shared with all that follow the same."""
        key = tuple(layers)
        order = self.orders.get(key)
        if order is None:
            self.orders[key] = order = Order(key)
            for layer, bits in order.bits.items():
                slot = self.slots[layer]
                if self.kept[layer]:
                    order.passing &= ~bits
                if slot is None:
                    order.missing |= bits if layer not in self.failed else 0
                    continue
                order.present |= bits
                if slot.evictable:
                    order.put_idle(bits, small=slot.place.shared)
        return order

    def add_plan(self, client: int, plan: PlanState) -> None:
        self.plans[client] = plan
        plan.route.plans += 1
        for layer in plan.route.indices:
            self.users[layer] += 1
        if plan.reuse is not None:
            plan.reuse.clients += 1

    def drop_plan(self, client: int) -> None:
        plan = self.plans.pop(client)
        plan.route.plans -= 1
        if not plan.route.plans:
            del self.orders[plan.order]
        for layer in plan.route.indices:
            self.users[layer] -= 1
        if plan.reuse is not None:
            plan.reuse.clients -= 1

    def reuse_of_layers(self) -> Reuse:
        """What is known of past uses, for open plans; from now on."""
        if self.reuse is None:
            self.reuse = Reuse(len(self.slots))
            for layer, slot in enumerate(self.slots):
                if slot is not None:
                    self.reuse.resident(layer)
        return self.reuse

    def keep(self, layers: Iterable[int]) -> None:
        """These should stay in memory, the others pass."""
        self.kept = bytearray(len(self.slots))
        for layer in layers:
            self.kept[layer] = 1
        for order in self.orders.values():
            order.passing = 0
            for layer, bits in order.bits.items():
                if not self.kept[layer]:
                    order.passing |= bits
        self.version += 1

    # ----------------------------------------------------------------------------------- residency

    def put(self, slot: Slot) -> None:
        """A slot is going to hold its layer, or does."""
        assert slot.key is not None
        layer = slot.key.layer
        self.slots[layer] = slot
        self.missing -= 1
        self.charged += self.charges[layer]
        self.version += 1
        for order in self.orders.values():
            bits = order.bits.get(layer, 0)
            order.missing &= ~bits
            order.present |= bits
        if self.reuse is not None:
            self.reuse.resident(layer)

    def drop(self, slot: Slot) -> None:
        """The layer's slot is empty."""
        assert slot.key is not None
        layer = slot.key.layer
        self.slots[layer] = None
        self.missing += 1
        self.charged -= self.charges[layer]
        self.version += 1
        for order in self.orders.values():
            bits = order.bits.get(layer, 0)
            order.take_idle(bits)
            order.present &= ~bits
            if layer not in self.failed:
                order.missing |= bits

    def forgive(self, layer: int) -> None:
        """The layer is worth a read again, though its last one failed."""
        self.failed.discard(layer)
        if self.slots[layer] is None:
            self.version += 1
            for order in self.orders.values():
                order.missing |= order.bits.get(layer, 0)

    def idle(self, slot: Slot) -> None:
        """The slot is evictable now."""
        assert slot.key is not None
        small = slot.place.shared
        for order in self.orders.values():
            order.put_idle(order.bits.get(slot.key.layer, 0), small=small)

    def busy(self, slot: Slot) -> None:
        """The slot is not evictable any more."""
        assert slot.key is not None
        for order in self.orders.values():
            order.take_idle(order.bits.get(slot.key.layer, 0))
