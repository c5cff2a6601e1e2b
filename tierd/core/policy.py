"""What to fetch next and what to evict for it. Chooses only: the machine acts.

The four rules of Cao, Felten, Karlin and Li (1995) over the merged order of all plans: fetch the
next missing layer (`soonest`); evict the one whose next use is furthest (`furthest`); never evict
what is needed before what is fetched; do it at the first opportunity. Two additions keep the bytes
read per pass low: at most `moving_layers` of a client's layers are on their way through memory at
once unless memory is free (else a fast device would turn every layer over in every pass), what
gives way to a read ahead is due half as far ahead again (else two layers that are needed far
from now would replace each other in turn, and be gone when they are), and inside the model that
gives way a layer passes rather than one of those that should stay (`retention`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.furthest import Furthest, passing_behind
from tierd.core.plans import NEVER
from tierd.core.retention import layers_to_keep, moving_layers
from tierd.core.soonest import Candidate, Soonest

if TYPE_CHECKING:
    from tierd.core.leases import Ledger
    from tierd.core.memory import Memory
    from tierd.core.plans import PlanState
    from tierd.core.residency import Slot
    from tierd.core.served import ModelState


#: For a read ahead gives way what is due this many times as far ahead,
#: unless the client is about to ask for it.
FAR_ENOUGH = 8


@dataclass(frozen=True, slots=True)
class Victim:
    slot: Slot
    due: int


class Policy:
    """Reads the machine's books; owns the order of layers by next use."""

    def __init__(self, memory: Memory, ledger: Ledger, models: dict[int, ModelState]) -> None:
        self._memory = memory
        self._models = models
        self._furthest = Furthest(models)
        self._soonest = Soonest(memory, ledger, models)
        #: slots with a layer that no plan uses, least recently used first
        self._unplanned: dict[int, Slot] = {}

    # ---------------------------------------------------------------------- told by the machine

    def touched(self, client: int, plan: PlanState) -> None:
        """The client asked for a layer, or released one."""
        self._furthest.changed(client, plan)
        self._soonest.changed(client, plan)
        if plan.position == 0 and plan.kept_at != plan.steps:
            plan.kept_at = plan.steps
            self._choose_kept_again(self._models[plan.model], plan)

    def leased(self, slot: Slot) -> None:
        """The slot has its first lease."""
        if slot.key is not None:
            self._models[slot.key.model].busy(slot)

    def resident(self, slot: Slot) -> None:
        """The slot became resident, or was used."""
        if slot.key is None or not slot.evictable:
            return
        model = self._models[slot.key.model]
        model.idle(slot)
        if model.users[slot.key.layer]:
            self._furthest.evictable(model.id)
        else:
            self._unplanned.pop(slot.id, None)
            self._unplanned[slot.id] = slot

    def evicted(self, slot: Slot) -> None:
        """The slot is empty."""
        self._unplanned.pop(slot.id, None)
        if slot.key is not None:
            model = self._models[slot.key.model]
            model.drop(slot)
            self._soonest.missing(model, slot.key.layer)

    def worth_a_read_again(self, model: ModelState, layer: int) -> None:
        """Somebody demands a layer whose last read failed."""
        model.forgive(layer)
        self._soonest.missing(model, layer)

    def plan_over(self, client: int, plan: PlanState) -> None:
        self._furthest.forget(client, plan)
        self._soonest.forget(client)

    def plans_changed(self, model: ModelState) -> None:
        """A plan over this model came or went."""
        for layer, slot in enumerate(model.slots):
            if slot is not None:
                if model.users[layer]:
                    self._unplanned.pop(slot.id, None)
                elif slot.id not in self._unplanned and slot.evictable:
                    self._unplanned[slot.id] = slot
        for client, plan in model.plans.items():
            self._furthest.changed(client, plan)
            self._soonest.changed(client, plan)
        if model.plans:
            planned = sum(1 for other in self._models.values() if other.plans)
            share = self._memory.budget // planned
            self._choose_kept(model, next(iter(model.plans.values())), share)

    # ----------------------------------------------------------------------------------- victims

    def victims(self, shortfall: int, needed_due: int | None, now_ns: int) -> list[Victim] | None:
        """Residents whose eviction frees `shortfall` granules, or None.

        `needed_due`: only layers that are due well after this may go; None where somebody waits.
        """
        chosen: list[Victim] = []
        gone: dict[tuple[int, int], int] = {}
        while True:
            victim = self.victim(needed_due, now_ns)
            if victim is None:
                self._unspare(chosen)
                return None
            place = victim.slot.place
            granule = (place.range.arena, place.range.start)
            shortfall -= self._memory.frees(place, gone.get(granule, 0))
            chosen.append(victim)
            if shortfall <= 0:
                self._unspare(chosen)
                return chosen
            if place.shared:
                gone[granule] = gone.get(granule, 0) + 1
            self._spare(victim.slot)

    def victim(self, needed_due: int | None, now_ns: int) -> Victim | None:
        """One resident to evict; `needed_due` as in `victims`."""
        slot = self._least_recently_used()
        if slot is not None:
            return Victim(slot, NEVER)
        found = self._furthest.top() or self._furthest.top_small()
        if found is None:
            return None
        if needed_due is not None and found[1] <= needed_due:
            return None
        return self._passing_instead(Victim(*found), needed_due, now_ns)

    def _least_recently_used(self) -> Slot | None:
        """Of the slots that no plan uses; those in use meanwhile come back with their release."""
        found: Slot | None = None
        in_use: list[int] = []
        for slot in self._unplanned.values():
            if not slot.spared:
                if slot.evictable:
                    found = slot
                    break
                in_use.append(slot.id)
        for number in in_use:
            del self._unplanned[number]
        return found

    def _spare(self, slot: Slot) -> None:
        """Leaves the slot out of what may be chosen, for the rest of one choice."""
        slot.spared = True
        if slot.key is not None:
            self._models[slot.key.model].busy(slot)

    def _unspare(self, chosen: list[Victim]) -> None:
        for victim in chosen:
            slot = victim.slot
            if slot.spared:
                slot.spared = False
                if slot.key is not None:
                    model = self._models[slot.key.model]
                    model.idle(slot)
                    for client, plan in model.plans.items():
                        self._furthest.changed(client, plan)

    def _passing_instead(self, victim: Victim, needed_due: int | None, now_ns: int) -> Victim:
        """A passing layer of the same model, if the victim should stay and the other is far enough.

        Far enough: at least half as far away. What was just fetched ahead is not.
        """
        key = victim.slot.key
        if key is None or victim.due == NEVER or victim.slot.place.shared:
            return victim
        model = self._models[key.model]
        if not model.kept[key.layer]:
            return victim
        best: Victim | None = None
        for plan in model.plans.values():
            if plan.reuse is not None:
                continue  # an open plan has no order: nothing is behind anything
            layer = passing_behind(plan, key.layer)
            slot = None if layer is None else model.slots[layer]
            if layer is not None and slot is not None:
                due = model.due(layer)
                if best is None or due > best.due:
                    best = Victim(slot, due)
        if (
            best is None
            or (needed_due is not None and best.due <= needed_due)
            or 2 * (best.due + now_ns) < victim.due + now_ns
        ):
            return victim
        return best

    # ------------------------------------------------------------------------------------ fetches

    def soonest(self, limit: int, device: int) -> list[Candidate]:
        """The next missing layers on a device, of the `limit` clients that need them soonest."""
        return self._soonest.first(limit, device)

    def spared_until(self, candidate: Candidate, now_ns: int) -> int:
        """The due value up to which no layer may give way to this candidate."""
        if not candidate.may_evict:
            return -NEVER
        if candidate.due + now_ns <= candidate.urgent_ns:
            return candidate.due
        return FAR_ENOUGH * (candidate.due + now_ns) - now_ns

    # ---------------------------------------------------------------------------------- retention

    def _choose_kept_again(self, model: ModelState, plan: PlanState) -> None:
        """At the start of a pass: what should stay depends on the memory that the model has."""
        share = model.charged + max(self._memory.free, 0)
        if model.kept_for is None or next(iter(model.plans.values())) is not plan:
            return
        before = model.kept_for[1]
        most = max(model.charges, default=1) * moving_layers(plan.lookahead)
        if abs(share - before) > most:
            self._choose_kept(model, plan, share)

    def _choose_kept(self, model: ModelState, plan: PlanState, share: int) -> None:
        if model.kept_for == (plan, share):
            return
        model.kept_for = (plan, share)
        model.keep(
            layers_to_keep(
                plan.layers(),
                model.charges,
                model.layer_bytes,
                self._memory.granule_bytes,
                share,
                moving_layers(plan.lookahead),
            )
        )
