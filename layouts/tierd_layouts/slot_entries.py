"""The entries of a slot table: their bytes, and what one says. Source: FORMAT.md, "Slot table"."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

MAGIC = b"TIERDSLT"
VERSION = 1
HEADER_BYTES = 64
SLOT_BYTES = 64
LEASE_BYTES = 32
KEY_BYTES = 16
DEFAULT_SLOTS = 16384
DEFAULT_LEASES = 65536

HEADER = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("slot_count", "<u4"),
        ("lease_count", "<u4"),
        ("holders", "<u4"),
        ("epoch", "<u8"),
        ("next_generation", "<u8"),
        ("next_lease", "<u8"),
        ("pressed", "<u4"),
        ("attention", "<u4"),
        ("reserved", "<u8"),
    ]
)
SLOT = np.dtype(
    [
        ("generation", "<u8"),
        ("offset", "<u8"),
        ("nbytes", "<u8"),
        ("arena", "<u4"),
        ("state", "<u4"),
        ("key", "<u8", (2,)),
        ("reserved", "<u8", (2,)),
    ]
)
LEASE = np.dtype(
    [
        ("lease", "<u8"),
        ("start_time", "<u8"),
        ("pid", "<u4"),
        ("slot", "<u4"),
        ("generation", "<u8"),
    ]
)


class SlotState(IntEnum):
    FREE = 0
    FILLING = 1  #: bytes are about to change or are changing: nobody may read
    RESIDENT = 2  #: bytes are verified and do not change


@dataclass(frozen=True, slots=True)
class SlotEntry:
    """One slot. `key` is `slot_key` of the layer that it holds; `offset` is in the arena."""

    slot: int
    generation: int
    offset: int
    nbytes: int
    arena: int
    state: SlotState
    key: bytes


@dataclass(frozen=True, slots=True)
class LeaseEntry:
    """One lease and its holder. `start_time` is field 22 of /proc/PID/stat, in clock ticks."""

    entry: int
    lease: int
    start_time: int
    pid: int
    slot: int
    generation: int


def table_bytes(slot_count: int = DEFAULT_SLOTS, lease_count: int = DEFAULT_LEASES) -> int:
    """Returns the size of a table."""
    return HEADER_BYTES + slot_count * SLOT_BYTES + lease_count * LEASE_BYTES


def slot_key(index_digest: str, layer_name: str) -> bytes:
    """Returns the 16 bytes that identify a layer of one exact pack.

    index_digest: `PackIndex.digest`. The same layer of a replaced pack has another key.
    """
    return xxhash.xxh3_128_digest(f"{index_digest}/{layer_name}".encode())
