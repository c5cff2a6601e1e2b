"""What a model on a GPU asks of its leases besides: a look at the next one, a hold of them all."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from tierd_client.lease_hold import LeaseHold
from tierd_client.leasing import LayerLeases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_client.holdings import Held
    from tierd_client.lease import Lease


class DeviceLeases(LayerLeases):
    """The leases of one opened model, on whatever tier. Thread-safe."""

    @contextmanager
    def glimpse(self, layer: int) -> Iterator[Lease | None]:
        """The lease of `layer` if it is here without waiting for the daemon; nobody enters.

        What this thread gave the stream that is current at the end is fenced. Raises what
        `OpenedModel.acquire` raises.
        """
        held = self._use_if_here(layer)
        if held is None and self._collect(layer):
            held = self._use_if_here(layer)
        if held is None:
            yield None
            return
        try:
            yield held.lease
        finally:
            self._end_use(layer)

    def hold(self) -> LeaseHold | None:
        """The leases of all layers of the plan, if all are here, in use until the end of it."""
        with self._lock:
            found = {layer: self._holdings.get(layer) for layer in set(self.order)}
            if self._closed or any(held is None for held in found.values()):
                return None
            leases = {layer: held.lease for layer, held in found.items() if held is not None}
            for held in found.values():
                if held is not None:
                    held.users += 1
        return LeaseHold(leases, self._end_use)

    @contextmanager
    def frozen(self, hold: LeaseHold) -> Iterator[None]:
        """Inside, this thread's stream captures what it is given, and does not do it: nobody may
        ask for marks in it, and only layers that are held may be entered."""
        self._place.frozen = hold.layers
        try:
            yield
        finally:
            self._place.frozen = None

    def _use_if_here(self, layer: int) -> Held | None:
        with self._lock:
            held = self._holdings.get(layer)
            if held is not None:
                held.users += 1
            return held

    def _collect(self, layer: int) -> bool:
        """Take in the lease that was asked for ahead, if its grant has come and nobody asks."""
        if layer not in self._pending or not self._turn.acquire(blocking=False):
            return False
        try:
            with self._lock:
                pending = self._pending.get(layer)
                if pending is None or self._closed or not pending.granted:
                    return False
                del self._pending[layer]
                self._asking = layer
            try:
                lease = pending.resolve()
            finally:
                self._asking = None
            with self._lock:
                self._counters.leases += 1
                self._counters.ahead += 1
                self._holdings.add_wanted(layer, lease)
            return True
        finally:
            self._turn.release()
