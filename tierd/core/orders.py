"""An order of layers, and which of its places are missing, passing or idle: sets of bits.

All clients of a model that declare the same order share one `Order`. A set of places is one integer
with a bit for each, so "the next missing layer behind this place" and "how many passing layers lie
between" cost a few operations on 64 bits each for every 64 layers, instead of a walk.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Order:
    """The places of one order, and what is known of the layers there."""

    __slots__ = (
        "bits", "idle", "idle_small", "indices", "layers", "length", "missing", "only", "passing",
        "plans", "present",
    )  # fmt: skip

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.length = len(self.layers)
        self.indices: dict[int, list[int]] = {}  #: by layer, ascending
        self.bits: dict[int, int] = {}  #: by layer: its places
        for index, layer in enumerate(self.layers):
            self.indices.setdefault(layer, []).append(index)
            self.bits[layer] = self.bits.get(layer, 0) | 1 << index
        #: the place of each layer that has only one
        self.only = {layer: found[0] for layer, found in self.indices.items() if len(found) == 1}
        self.plans = 0  #: how many follow it
        self.missing = 0  #: not in memory nor on its way, and worth a read
        self.idle = 0  #: evictable, alone in its granules
        self.idle_small = 0  #: evictable, beside other slots in its granule
        self.present = 0  #: in memory or on its way
        self.passing = (1 << self.length) - 1  #: not among those that should stay

    def put_idle(self, bits: int, *, small: bool) -> None:
        if small:
            self.idle_small |= bits
        else:
            self.idle |= bits

    def take_idle(self, bits: int) -> None:
        self.idle &= ~bits
        if self.idle_small:
            self.idle_small &= ~bits

    def next(self, layer: int, position: int, *, cyclic: bool) -> int | None:
        """Steps from `position` to the next place of `layer`."""
        indices = self.indices.get(layer)
        if indices is None:
            return None
        at = bisect_right(indices, position)
        if at < len(indices):
            return indices[at] - position
        return indices[0] + self.length - position if cyclic else None


def first_after(places: int, position: int) -> int | None:
    """The first place behind `position` in a cycle that has its bit set; `position` comes last."""
    above = places >> (position + 1)
    if above:
        return position + (above & -above).bit_length()
    return (places & -places).bit_length() - 1 if places else None


def last_before(places: int, position: int) -> int | None:
    """The nearest place at `position` or before it in a cycle that has its bit set."""
    below = places & ((1 << (position + 1)) - 1)
    return (below or places).bit_length() - 1 if places else None


def between(places: int, position: int, place: int) -> int:
    """How many bits are set after `position` and before `place`, around the cycle."""
    if place > position:
        return (places >> (position + 1) & ((1 << (place - position - 1)) - 1)).bit_count()
    return (places >> (position + 1)).bit_count() + (places & ((1 << place) - 1)).bit_count()
