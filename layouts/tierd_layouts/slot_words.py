"""Where the numbers of a slot table are: in units of their own size, from where the entry begins.

Words have 8 bytes, halves 4. Source: FORMAT.md, "Slot table"; the records are in `slot_entries`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierd_layouts import slot_entries as entries

if TYPE_CHECKING:
    import numpy as np


def _place(entry: np.dtype[Any], field: str) -> int:
    assert entry.fields is not None
    number, offset = entry.fields[field][:2]
    return int(offset) // number.base.itemsize


# Of the header: words, then halves.
MAGIC = _place(entries.HEADER, "magic")
EPOCH = _place(entries.HEADER, "epoch")
NEXT_GENERATION = _place(entries.HEADER, "next_generation")
NEXT_LEASE = _place(entries.HEADER, "next_lease")
VERSION = _place(entries.HEADER, "version")
SLOT_COUNT = _place(entries.HEADER, "slot_count")
LEASE_COUNT = _place(entries.HEADER, "lease_count")
HOLDERS = _place(entries.HEADER, "holders")
PRESSED = _place(entries.HEADER, "pressed")
ATTENTION = _place(entries.HEADER, "attention")

# Of a slot: words (the key is two of them), then halves.
GENERATION = _place(entries.SLOT, "generation")
OFFSET = _place(entries.SLOT, "offset")
NBYTES = _place(entries.SLOT, "nbytes")
KEY = _place(entries.SLOT, "key")
ARENA = _place(entries.SLOT, "arena")
STATE = _place(entries.SLOT, "state")

# Of a lease: words, then halves.
LEASE = _place(entries.LEASE, "lease")
START_TIME = _place(entries.LEASE, "start_time")
LEASE_GENERATION = _place(entries.LEASE, "generation")
PID = _place(entries.LEASE, "pid")
LEASE_SLOT = _place(entries.LEASE, "slot")
