"""The leases of all layers of a model, held for a graph that has their addresses in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_client.errors import LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_client.lease import Lease


class LeaseHold:
    """Made by `LayerLeases.hold`. end_use: gives back the use of one layer."""

    def __init__(self, leases: dict[int, Lease], end_use: Callable[[int], None]) -> None:
        self._leases = leases
        self._end_use = end_use

    @property
    def layers(self) -> frozenset[int]:
        """The layers that are held."""
        return frozenset(self._leases)

    def check(self) -> None:
        """Raise LeaseLost when the slot of a layer changed since it was leased."""
        for lease in self._leases.values():
            if not lease.sound:
                raise LeaseLost(
                    f"the slot of {lease.where} changed from generation {lease.generation} while a "
                    "graph had it: what the graph computed is void"
                )

    def end(self) -> None:
        """Give all back, once. Raises what ending the last one that fails raises: LeaseLost,
        ViewStillAlive, and what a lost GPU raises."""
        leases, self._leases = self._leases, {}
        problem: Exception | None = None
        for layer in leases:
            try:
                self._end_use(layer)
            except Exception as error:
                problem = error
        if problem is not None:
            raise problem
