"""Which layers of a cycle should stay resident.

On a cycle longer than the memory some layers stay and the others pass through. How many bytes can
stay is given; which ones is a choice, and furthest-next-use leaves it open (any victim that was
just used is as good as any other, as long as it is always the same). Two things make it matter:

- A large layer (embedding, head) that passes through needs its own size in moving room; a small one
  needs less. So the largest layers stay.
- While the client computes with resident layers the device can read ahead only as much as there is
  moving room. Were the passing layers side by side, the device would idle through all the others,
  then the client would wait. So those that stay are spread evenly over the cycle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def moving_layers(lookahead: int) -> int:
    """Layers that pass through at once: the one in use and those ahead, at least one."""
    return max(2, lookahead + 1)


def layers_to_keep(
    order: Sequence[int],
    charges: Sequence[int],
    nbytes: Sequence[int],
    granule: int,
    share: int,
    moving: int,
) -> list[int]:
    """The layers of a cycle that should stay resident in `share` granules.

    `order`: each layer once, in order of use. `moving`: how many of the others need room at once.
    """
    small = [layer for layer in order if nbytes[layer] < granule]
    large = [layer for layer in order if nbytes[layer] >= granule]
    room = share - -(-sum(nbytes[layer] for layer in small) // granule)
    total = sum(charges[layer] for layer in large)
    if total <= room:
        return [*small, *large]
    # Smallest size `passing` such that everything larger can stay beside the moving room.
    kept_total = total
    passing = 0
    for size in sorted({charges[layer] for layer in large}):
        kept_total -= sum(charges[layer] for layer in large if charges[layer] == size)
        if kept_total + moving * size <= room:
            passing = size
            break
    else:
        return []
    kept = [layer for layer in large if charges[layer] > passing]
    rest = [layer for layer in large if charges[layer] <= passing]
    room -= kept_total + moving * passing
    rest_total = sum(charges[layer] for layer in rest)
    left = room
    error = 0  # of the kept share of `rest` so far, times rest_total
    for layer in rest:
        error += charges[layer] * room
        if 2 * error >= rest_total * charges[layer] and charges[layer] <= left:
            kept.append(layer)
            left -= charges[layer]
            error -= rest_total * charges[layer]
    return [*small, *kept]
