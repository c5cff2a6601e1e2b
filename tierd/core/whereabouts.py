"""Where one layer is, who has it, who waits for it, and who needs it next: what `why` answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.model import CERTAIN_PPM
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.books import Books
    from tierd.core.model import LayerKey
    from tierd.core.plans import PlanState
    from tierd.core.story import Decision


@dataclass(frozen=True, slots=True)
class Need:
    """The next use that a client's plan or hint announces."""

    client: int
    steps: int
    in_ns: int  #: expected; 0 when it is due
    probability_ppm: int  #: millionths; a plan is certain


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """One layer between two events."""

    key: LayerKey
    nbytes: int
    state: str  #: "absent", "making room", "reading" or "resident"
    demanded: bool  #: in flight because somebody waits for it, not ahead of the need
    leased_by: tuple[int, ...]  #: clients, each once
    quarantined: bool  #: processes of an earlier daemon still read it
    waiting: tuple[int, ...]  #: clients whose accepted requests wait for it
    planned_by: tuple[int, ...]  #: clients whose plans have it
    kept: bool  #: the policy wants it to stay while others of its model pass through
    pinned: bool  #: the operator wants it to stay
    failed: bool  #: its last read failed
    next_use: Need | None
    story: tuple[Decision, ...]


def whereabouts_of(books: Books, key: LayerKey, now_ns: int) -> Whereabouts | None:
    """None for a layer that the machine does not know."""
    model = books.models.get(key.model)
    if model is None or not 0 <= key.layer < len(model.slots):
        return None
    slot = model.slots[key.layer]
    needs = [
        need
        for client, plan in model.plans.items()
        if (need := _need(client, plan, key.layer, now_ns)) is not None
    ]
    return Whereabouts(
        key,
        model.layer_bytes[key.layer],
        "absent" if slot is None else _STATES[slot.state],
        slot is not None and slot.demanded,
        tuple(c.id for c in books.clients.values() if slot in c.leases.values()) if slot else (),
        slot is not None and bool(slot.holders),
        tuple(dict.fromkeys(request.client for request in books.waiting.get(key, ()))),
        tuple(client for client, plan in model.plans.items() if key.layer in plan.order),
        bool(model.kept[key.layer]),
        key in books.pins,
        key.layer in model.failed,
        min(needs, key=lambda need: (need.in_ns, need.client), default=None),
        tuple(books.story.about(key)),
    )


_STATES = {
    SlotState.CLAIMED: "making room",
    SlotState.READING: "reading",
    SlotState.RESIDENT: "resident",
}


def _need(client: int, plan: PlanState, layer: int, now_ns: int) -> Need | None:
    steps, ppm = plan.distance(layer), CERTAIN_PPM
    if steps is None:
        at, ppm = plan.hints.get(layer, (0, 0))
        steps = at - plan.steps
        if steps <= 0:
            return None
    return Need(client, steps, max(steps * plan.step_ns - (now_ns - plan.last_ns), 0), ppm)
