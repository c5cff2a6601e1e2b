"""Whether what a slot table says can be true."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from tierd_layouts.errors import LeaseInvalid, SlotInvalid

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from tierd_layouts.slot_entries import LeaseEntry, SlotEntry


def check_slots(slots: Collection[SlotEntry], next_generation: int) -> None:
    """Raises SlotInvalid for the first that cannot be true. slots: those that are not FREE."""
    for entry in slots:
        if not 1 <= entry.generation < next_generation:
            raise SlotInvalid(
                f"slot {entry.slot}: generation {entry.generation} is not in [1, {next_generation})"
            )
        if entry.nbytes == 0:
            raise SlotInvalid(f"slot {entry.slot}: state {entry.state.name} with 0 bytes")
    by_place = sorted(slots, key=lambda entry: (entry.arena, entry.offset))
    for left, right in pairwise(by_place):
        if left.arena == right.arena and left.offset + left.nbytes > right.offset:
            raise SlotInvalid(
                f"slots {left.slot} and {right.slot} overlap in arena {left.arena}: "
                f"[{left.offset}, {left.offset + left.nbytes}) and {right.offset}"
            )


def check_leases(
    leases: Iterable[LeaseEntry], slots: Mapping[int, SlotEntry], next_lease: int
) -> None:
    """Raises LeaseInvalid for the first that cannot be true."""
    seen: dict[int, int] = {}
    for held in leases:
        if held.lease >= next_lease:
            raise LeaseInvalid(
                f"lease entry {held.entry}: lease {held.lease} is not in [1, {next_lease})"
            )
        if held.lease in seen:
            raise LeaseInvalid(
                f"lease {held.lease} is in entries {seen[held.lease]} and {held.entry}"
            )
        seen[held.lease] = held.entry
        leased = slots.get(held.slot)
        if leased is None or leased.generation != held.generation:
            found = "no slot" if leased is None else f"generation {leased.generation}"
            raise LeaseInvalid(
                f"lease {held.lease} is on slot {held.slot}, generation {held.generation}; "
                f"the table has {found}"
            )
