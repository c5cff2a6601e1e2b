"""Instructions of a warp: lanes that see each other's registers.

Arrays are [threads], whole warps one behind another; the translation sees to that.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import Undefined, UnknownPtx

LANES: Final = 32
_LANE: Final = np.arange(LANES)


def whole(threads: Any, membership: Any) -> None:
    """Raises Undefined unless all lanes of each warp are here, and UnknownPtx if fewer should be.

    membership: the instruction's mask.
    """
    if len(threads) % LANES or (threads.reshape(-1, LANES) % LANES != _LANE).any():
        raise Undefined(f"only {len(threads)} threads are here, not all lanes of a warp")
    if np.any(membership != 0xFFFFFFFF):
        raise UnknownPtx("an instruction for a part of a warp")


def shuffled(value: Any, how: str, by: Any, clamp: Any) -> tuple[Any, Any]:
    """`shfl`: the numbers of other lanes, and whether that lane was inside of the segment."""
    value = value.reshape(-1, LANES)
    by = np.broadcast_to(by, value.size).reshape(-1, LANES).astype(np.int64) & 31
    clamp = np.broadcast_to(clamp, value.size).reshape(-1, LANES).astype(np.int64)
    segment, clamp = clamp >> 8 & 31, clamp & 31
    least = _LANE & segment
    most = least | clamp & ~segment
    match how:
        case "up":
            lane = _LANE - by
            inside = lane >= most
        case "down":
            lane = _LANE + by
            inside = lane <= most
        case "bfly":
            lane = _LANE ^ by
            inside = lane <= most
        case _:
            lane = least | by & ~segment
            inside = lane <= most
    found = np.take_along_axis(value, np.where(inside, lane, _LANE), axis=1)
    return found.reshape(-1), inside.reshape(-1)


def reduced(value: Any, how: str) -> Any:
    """`redux`: one number for all lanes."""
    operation = {
        "min": np.minimum,
        "max": np.maximum,
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[how]
    return operation.reduce(value.reshape(-1, LANES), axis=1, dtype=value.dtype).repeat(LANES)


def voted(value: Any, how: str) -> Any:
    """`vote`: of predicates; the ballot is a word with a bit for each lane."""
    lanes = value.reshape(-1, LANES)
    match how:
        case "any":
            found = lanes.any(axis=1)
        case "all":
            found = lanes.all(axis=1)
        case "uni":
            found = lanes.all(axis=1) | ~lanes.any(axis=1)
        case _:
            found = np.packbits(lanes, axis=1, bitorder="little").view(np.uint32).reshape(-1)
    return found.repeat(LANES)
