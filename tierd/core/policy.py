"""What to fetch next and what to evict for it. Chooses only: the machine acts.

The four rules of Cao, Felten, Karlin and Li (1995) over the merged order of all plans: fetch the
next missing layer; evict the one whose next use is furthest; never evict what is needed before what
is fetched; do it at the first opportunity. Two additions keep the bytes read per pass low: at most
`moving_layers` of a client's passing layers are in memory at once unless memory is free (else a
fast device would turn every layer over in every pass), and inside the model that gives way a layer
passes rather than one of those that should stay (`retention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.plans import NEVER
from tierd.core.residency import SlotState
from tierd.core.retention import layers_to_keep, moving_layers

if TYPE_CHECKING:
    from tierd.core.leases import Ledger
    from tierd.core.memory import Memory
    from tierd.core.model import LayerKey
    from tierd.core.plans import PlanState
    from tierd.core.residency import ModelState, Slot


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer that some plan will need and that is not in memory."""

    due: int
    client: int
    key: LayerKey
    distance: int
    may_evict: bool  #: else it is fetched into free memory only


@dataclass(frozen=True, slots=True)
class Victim:
    slot: Slot
    due: int


class Policy:
    """Reads the machine's books; owns nothing but the order of what no plan uses."""

    def __init__(self, memory: Memory, ledger: Ledger, models: dict[int, ModelState]) -> None:
        self._memory = memory
        self._ledger = ledger
        self._models = models
        #: slots with a layer that no plan uses, least recently used first
        self._unplanned: dict[int, Slot] = {}

    # ---------------------------------------------------------------------- told by the machine

    def resident(self, slot: Slot) -> None:
        """The slot became resident, or was used."""
        if slot.key is not None and not self._models[slot.key.model].users[slot.key.layer]:
            self._unplanned.pop(slot.id, None)
            self._unplanned[slot.id] = slot

    def evicted(self, slot: Slot) -> None:
        self._unplanned.pop(slot.id, None)

    def plans_changed(self, model: ModelState) -> None:
        """A plan over this model came or went."""
        for layer, slot in enumerate(model.slots):
            if slot is not None:
                if model.users[layer]:
                    self._unplanned.pop(slot.id, None)
                elif slot.id not in self._unplanned and slot.state is SlotState.RESIDENT:
                    self._unplanned[slot.id] = slot
        planned = [other for other in self._models.values() if other.plans]
        share = self._memory.budget // max(len(planned), 1)
        for other in planned:
            plan = next(iter(other.plans.values()))
            if other.kept_for != (plan, share):
                other.kept_for = (plan, share)
                self._choose_kept(other, plan, share)

    # ----------------------------------------------------------------------------------- victims

    def victims(self, shortfall: int, needed_due: int | None, now_ns: int) -> list[Victim] | None:
        """Residents whose eviction frees `shortfall` granules, or None.

        `needed_due`: only layers that are due later than this may go; None where somebody waits.
        """
        chosen: dict[int, Victim] = {}
        gone: dict[tuple[int, int], int] = {}
        while shortfall > 0:
            victim = self._furthest(chosen)
            if victim is None or (needed_due is not None and victim.due <= needed_due):
                return None
            victim = self._passing_instead(victim, chosen, needed_due, now_ns)
            place = victim.slot.place
            granule = (place.range.arena, place.range.start)
            shortfall -= self._memory.frees(place, gone.get(granule, 0))
            if place.shared:
                gone[granule] = gone.get(granule, 0) + 1
            chosen[victim.slot.id] = victim
        return list(chosen.values())

    def victim(self, needed_due: int | None, now_ns: int) -> Victim | None:
        """One resident to evict for its slot number alone; `needed_due` as in `victims`."""
        victim = self._furthest({})
        if victim is None or (needed_due is not None and victim.due <= needed_due):
            return None
        return self._passing_instead(victim, {}, needed_due, now_ns)

    def _furthest(self, chosen: dict[int, Victim]) -> Victim | None:
        """The evictable slot with the furthest next use; shared granules go last."""
        for slot in self._unplanned.values():
            if slot.evictable and slot.id not in chosen:
                return Victim(slot, NEVER)
        best: Victim | None = None
        for shared in (False, True):
            for model in self._models.values():
                victim = self._furthest_of(model, chosen, shared=shared, passing=False)
                if victim is not None and (best is None or victim.due > best.due):
                    best = victim
            if best is not None:
                return best
        return None

    def _furthest_of(
        self, model: ModelState, chosen: dict[int, Victim], *, shared: bool, passing: bool
    ) -> Victim | None:
        """The furthest next use in one model.

        Behind each client's position layers get nearer the further back one looks, so the first
        evictable one behind each client is all that matters.
        """
        best: Victim | None = None
        for plan in model.plans.values():
            order = plan.order
            length = len(order)
            for back in range(length):
                layer = order[(plan.position - back) % length]
                slot = model.slots[layer]
                if (
                    slot is None
                    or not slot.evictable
                    or slot.place.shared is not shared
                    or (passing and model.kept[layer])
                    or slot.id in chosen
                ):
                    continue
                distance = plan.distance(layer)
                if distance is not None and distance != length - back:
                    continue  # the order has this layer again, nearer
                due = model.due(layer)
                if best is None or due > best.due:
                    best = Victim(slot, due)
                break
        return best

    def _passing_instead(
        self, victim: Victim, chosen: dict[int, Victim], needed_due: int | None, now_ns: int
    ) -> Victim:
        """A passing layer of the same model, if the victim should stay and the other is far enough.

        Far enough: at least half as far away. What was just fetched ahead is not.
        """
        key = victim.slot.key
        if key is None or victim.due == NEVER or victim.slot.place.shared:
            return victim
        model = self._models[key.model]
        if not model.kept[key.layer]:
            return victim
        other = self._furthest_of(model, chosen, shared=False, passing=True)
        if (
            other is None
            or (needed_due is not None and other.due <= needed_due)
            or 2 * (other.due + now_ns) < victim.due + now_ns
        ):
            return victim
        return other

    # ------------------------------------------------------------------------------------ fetches

    def candidates(self) -> list[Candidate]:
        """The next missing layer of every client with a plan, the one needed soonest first."""
        found = [
            candidate
            for model in self._models.values()
            if model.missing and not model.removed
            for client in model.plans
            if (candidate := self._next_missing(model, client)) is not None
        ]
        found.sort(key=lambda candidate: (candidate.due, candidate.client))
        return found

    def _next_missing(self, model: ModelState, client: int) -> Candidate | None:
        plan = model.plans[client]
        held = self._ledger[client].layers
        room = moving_layers(plan.lookahead)
        moving = sum(1 for key in held if key.model != model.id or not model.kept[key.layer])
        for distance in range(1, len(plan.order) + 1):
            layer = plan.ahead(distance)
            if layer is None:
                break
            slot = model.slots[layer]
            key = model.keys[layer]
            if slot is not None:
                if not model.kept[layer] and key not in held:
                    moving += 1
                    if moving >= room and self._memory.free <= 0:
                        break
            elif key not in held and layer not in model.failed:
                return Candidate(
                    plan.step_ns * distance - plan.last_ns, client, key, distance, moving < room
                )
        return None

    # ---------------------------------------------------------------------------------- retention

    def _choose_kept(self, model: ModelState, plan: PlanState, share: int) -> None:
        model.kept = bytearray(len(model.slots))
        for layer in layers_to_keep(
            plan.layers(),
            model.charges,
            model.layer_bytes,
            self._memory.granule_bytes,
            share,
            moving_layers(plan.lookahead),
        ):
            model.kept[layer] = 1
