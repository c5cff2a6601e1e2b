"""How soon a layer of an open plan is expected again, when nobody says so: from its past uses.

Each use counts `2 ** (n / half)` with `n` the number of all uses so far, so that older uses count
less than newer ones without being touched again: the order of two layers changes only with a use
of one of them (Lee et al., LRFU, 2001: between LFU, half -> infinity, and LRU, half -> 0). The sum
relative to the weight of a use now, times ln 2 / half, estimates the layer's probability per use.

Integers only: the same events give the same decisions on every machine.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HALF_LIVES = 16  #: uses of as many layers as there are, times this, halve what a use counts
_ONE = 1 << 16
_TOO_MANY_HALVES = 64
_SHORTEST_HALF = 32


class Reuse:
    """The decayed frequency of each layer of one model, over all clients with open plans."""

    __slots__ = ("_half", "_heap", "_listed", "_uses", "clients", "weights")

    def __init__(self, layers: int) -> None:
        self._half = max(HALF_LIVES * layers, _SHORTEST_HALF)
        self._uses = 0
        self.clients = 0  #: with an open plan over the model
        self.weights = [0] * layers  #: by layer: larger is worth more
        self._heap: list[tuple[int, int]] = []  #: (weight or less, layer) of layers in memory
        self._listed = bytearray(layers)

    def used(self, layer: int) -> None:
        self._uses += 1
        if self._uses >= _TOO_MANY_HALVES * self._half:
            self._age()
        self.weights[layer] += self._weight_now()

    def expected_steps(self, layer: int) -> int:
        """Steps of one client until the layer is asked for, on average, if nothing changes."""
        # 1 / probability = half / ln 2 * (weight of a use now) / (sum of the layer's weights)
        uses = self._half * self._weight_now() * 100 // (69 * max(self.weights[layer], 1))
        return max(min(uses, 64 * self._half) // max(self.clients, 1), 1)

    def resident(self, layer: int) -> None:
        if not self._listed[layer]:
            self._listed[layer] = 1
            heapq.heappush(self._heap, (self.weights[layer], layer))

    def least(
        self, evictable: Callable[[int], bool], resident: Callable[[int], bool]
    ) -> int | None:
        """The layer in memory that is worth least and may go; costs O(log layers) a use."""
        heap = self._heap
        spared: list[tuple[int, int]] = []
        found: int | None = None
        while heap:
            weight, layer = heap[0]
            if not resident(layer):
                self._listed[layer] = 0
                heapq.heappop(heap)
            elif weight < self.weights[layer]:
                heapq.heapreplace(heap, (self.weights[layer], layer))
            elif evictable(layer):
                found = layer
                break
            else:
                spared.append(heapq.heappop(heap))
        for item in spared:
            heapq.heappush(heap, item)
        return found

    def _weight_now(self) -> int:
        halves, rest = divmod(self._uses, self._half)
        return ((_ONE << halves) * (self._half + rest)) // self._half

    def _age(self) -> None:
        """Halves all weights as often as the uses since the last time did."""
        self._uses %= self._half
        self.weights = [weight >> _TOO_MANY_HALVES for weight in self.weights]
        self._heap = [(self.weights[layer], layer) for _, layer in self._heap]
        heapq.heapify(self._heap)
