"""Slots: what is where, and what each waits for."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.core.memory import Claim
    from tierd.core.model import LayerKey
    from tierd.core.placement import Place


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
    pinned: bool = False  #: an operator wants it to stay
    leases: int = 0
    spared: bool = False  #: not to be chosen once more as a victim, for a moment
    holders: dict[int, None] = field(
        default_factory=dict
    )  #: processes with an earlier daemon's lease

    @property
    def evictable(self) -> bool:
        return (
            self.state is SlotState.RESIDENT
            and not self.leases
            and not self.pinned
            and not self.holders
        )


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
