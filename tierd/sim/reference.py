"""MIN with bypass: the fewest bytes that anybody could have read, knowing the whole future.

Source: Belady (1966), furthest next use; with bypass, a layer that is read need not be kept, and
what is kept for a later use is chosen among everything, the layer just used included.

What it is exactly. Every byte is taken for a page of its own, all bytes of a layer are asked for
together. For pages of one size and one price, dropping those with the furthest next use is optimal
(keeping a byte from one use to the next is an interval, at most `capacity` of them overlap at any
time, and giving up the interval that ends last when there are too many is the optimal way to choose
them). So the result is

- the exact minimum when all layers have one size and the capacity is a multiple of it;
- else a lower bound: the optimum of the fractional (per byte) relaxation. A cache of whole layers
  may read more, none less. The whole-layer problem is NP-hard; `whole_layers` in
  `replay_policies` bounds it from above.

No real scheduler with this many bytes of memory, prefetching or not, reads less: what it did not
read for a use it has kept since the use before, in the same memory.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

K = TypeVar("K", bound="Hashable")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy makes of a sequence of references."""

    policy: str
    references: int
    hits: int  #: references that found the whole layer in memory
    asked_bytes: int  #: of all references
    read_bytes: int

    @property
    def hit_ratio(self) -> float:
        """The share of the bytes asked for that was in memory; of the references, if all layers
        have one size."""
        return 1 - self.read_bytes / self.asked_bytes if self.asked_bytes else 0.0


def next_uses(references: Sequence[K]) -> list[int]:
    """For each reference the index of the next one to the same layer; `len(references)` if none."""
    following: dict[K, int] = {}
    result = [len(references)] * len(references)
    for index in range(len(references) - 1, -1, -1):
        key = references[index]
        result[index] = following.get(key, len(references))
        following[key] = index
    return result


def min_with_bypass(
    references: Sequence[K],
    nbytes: Mapping[K, int],
    capacity_bytes: int,
    *,
    in_use_counts: bool = False,
) -> Outcome:
    """The least that can be read for these references in this memory.

    `references`: the merged order in which layers are needed. `nbytes`: the size of each.
    `in_use_counts`: the layer in use occupies memory too, as it does in tierd (a slot holds it);
    without it the layer just passes by, which is the usual MIN with bypass, and the lower bound.
    Raises ValueError when a layer in use is larger than the memory. Costs O(n log n).
    """
    following = next_uses(references)
    kept: dict[K, int] = {}
    #: heap of (-next use, layer), furthest first. Entries of uses that are past sink below all
    #: others and are never reached: what is kept has its next use ahead.
    due: list[tuple[int, K]] = []
    used = hits = asked = read = 0
    for index, key in enumerate(references):
        size = nbytes[key]
        if in_use_counts and size > capacity_bytes:
            raise ValueError(f"layer {key} needs {size} bytes, the memory has {capacity_bytes}")
        found = kept.pop(key, 0)
        hits += found == size
        asked += size
        read += size - found
        used -= found
        if in_use_counts:
            used -= _give_up(kept, due, used + size - capacity_bytes)
        if following[index] < len(references):
            kept[key] = size
            used += size
            heapq.heappush(due, (-following[index], key))
            used -= _give_up(kept, due, used - capacity_bytes)
    return Outcome("min", len(references), hits, asked, read)


def _give_up(kept: dict[K, int], due: list[tuple[int, K]], excess: int) -> int:
    """Drops `excess` bytes, those with the furthest next use first; the bytes that it dropped."""
    dropped = 0
    while dropped < excess:
        _, key = due[0]
        dropping = min(kept[key], excess - dropped)
        dropped += dropping
        kept[key] -= dropping
        if not kept[key]:
            del kept[key]
            heapq.heappop(due)
    return dropped
