"""mbarrier: objects in shared memory that products of tensor memory arrive at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.gpu.ptx.errors import Undefined

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.shared import SharedMemory
    from tests.kernels.gpu.ptx.tensor_memory import TensorMemory


class Parked(Exception):
    """Threads wait for a phase that is not over: others go on."""


@dataclass(slots=True)
class _Barrier:
    """phase: that is under way.   left: arrivals until it is over.   products: that arrived."""

    count: int
    left: int
    phase: int = 0
    products: int = 0


class Mbarriers:
    """Of a program, by their addresses. What stands in their bytes is nobody's business."""

    def __init__(self, shared: SharedMemory, tensor: TensorMemory) -> None:
        self._shared = shared
        self._tensor = tensor
        self._all: dict[int, _Barrier] = {}

    def initialise(self, threads: Any, address: Any, count: int, where: Any) -> None:
        self._write(threads, address, where)
        for place in _chosen(address, where):
            self._all[place] = _Barrier(count, count)

    def invalidate(self, threads: Any, address: Any, where: Any) -> None:
        self._write(threads, address, where)
        for place in _chosen(address, where):
            self._find(place)
            del self._all[place]

    def commit(self, address: Any, where: Any) -> None:
        """tcgen05.commit: one arrival when the products until now are done; they are at once, but
        nobody knows before it has waited."""
        for place in _chosen(address, where):
            barrier = self._find(place)
            barrier.products += self._tensor.take_products()
            barrier.left -= 1
            if barrier.left == 0:
                barrier.phase, barrier.left = barrier.phase + 1, barrier.count

    def wait(self, threads: Any, address: Any, parity: Any) -> Any:
        """Predicates: that the phase of this parity is over. Raises Parked until it is."""
        self._shared.load(threads, address, 8)
        for place in _chosen(address, None):
            barrier = self._find(place)
            if barrier.phase & 1 == int(parity[0]) & 1:
                raise Parked
            if barrier.products:
                self._tensor.done()
                self._shared.unpin(threads, barrier.products)
                barrier.products = 0
        return np.ones(len(threads), np.bool_)

    def _find(self, place: int) -> _Barrier:
        if place not in self._all:
            raise Undefined(f"no mbarrier at {place:#x}")
        return self._all[place]

    def _write(self, threads: Any, address: Any, where: Any) -> None:
        self._shared.store(threads, address, np.zeros(len(threads), np.uint64), where)


def _chosen(address: Any, where: Any) -> list[int]:
    return [int(place) for place in np.unique(address if where is None else address[where])]
