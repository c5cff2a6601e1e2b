"""The leases that a model holds: in use, wanted next, or kept for the next pass.

A lease that nobody is in is *kept* while memory is not short: the next pass then finds it here and
asks the daemon for nothing. It is *wanted* when a thread expects to enter its layer next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierd_client.lease import Lease


@dataclass(slots=True)
class Held:
    """A lease and how many threads are inside its layer."""

    lease: Lease
    users: int
    wanted: bool = False
    left: int = 0  # larger for what was left later
    fresh: bool = False  # nobody has entered since it was granted


class Holdings:
    """At most one lease for each layer. Not thread-safe: the owner locks."""

    def __init__(self) -> None:
        self._held: dict[int, Held] = {}
        self._leaves = 0

    def __getitem__(self, layer: int) -> Held:
        return self._held[layer]

    def __contains__(self, layer: int) -> bool:
        return layer in self._held

    @property
    def users(self) -> int:
        """Entries that were not left, over all layers."""
        return sum(held.users for held in self._held.values())

    def add(self, layer: int, lease: Lease) -> Held:
        """A lease that was granted to a thread that enters."""
        held = self._held[layer] = Held(lease, users=1)
        return held

    def add_wanted(self, layer: int, lease: Lease) -> Held:
        """A lease that was granted before anybody enters."""
        held = self._held[layer] = Held(lease, users=0, wanted=True, fresh=True)
        return held

    def get(self, layer: int) -> Held | None:
        """What there is of a layer."""
        return self._held.get(layer)

    def join(self, layer: int) -> Held | None:
        """One more thread enters; None when there is no lease."""
        held = self._held.get(layer)
        if held is not None:
            held.wanted = False
            held.users += 1
        return held

    def leave(self, layer: int) -> Held:
        """One thread less."""
        held = self._held[layer]
        held.users -= 1
        self._leaves += 1
        held.left = self._leaves
        return held

    def want(self, layer: int) -> bool:
        """Have it stay for a thread that comes next; False when there is no lease."""
        held = self._held.get(layer)
        if held is not None:
            held.wanted = True
        return held is not None

    def unwant(self, layer: int) -> None:
        """The thread went elsewhere."""
        if layer in self._held:
            self._held[layer].wanted = False

    def remove(self, layer: int) -> Lease:
        """Take a lease out, to give it back."""
        return self._held.pop(layer).lease

    def take_kept(self) -> list[Lease]:
        """Take out what nobody is in and nobody wants."""
        return self._take([n for n, held in self._held.items() if not (held.users or held.wanted)])

    def take_idle(self) -> list[Lease]:
        """Take out what nobody is in."""
        return self._take([layer for layer, held in self._held.items() if not held.users])

    def _take(self, layers: list[int]) -> list[Lease]:
        """What was left last comes first: on a cycle it is needed last, and memory that a waiting
        daemon gets back bit by bit should be that."""
        layers.sort(key=lambda layer: self._held[layer].left, reverse=True)
        return [self._held.pop(layer).lease for layer in layers]
