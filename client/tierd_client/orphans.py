"""Leases of a daemon that died, of layers in DRAM that this process still reads.

They are told to its successor when it is greeted, and again when they end: it keeps the slots until
then. What was leased on a GPU is of no successor's concern: that memory ended with the daemon.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from tierd_layouts.wire import DRAM_TIER

if TYPE_CHECKING:
    from tierd_client.connection import Connection

#: Every connection of this process that somebody still has.
connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def leases(path: str) -> list[int]:
    """Leases of earlier daemons at `path` that this process still reads: for the handshake."""
    return [
        lease
        for connection in list(connections)
        if connection.path == path and connection.lost and connection.tier == DRAM_TIER
        for lease in connection.held
    ]


def release(path: str, ended: list[int]) -> None:
    """Tell a successor of a dead daemon that this process stopped reading an old slot."""
    for successor in list(connections):
        if successor.path == path and successor.alive and successor.tier == DRAM_TIER:
            # One that started with an empty table counts from 1 again: its leases are its own.
            successor.release(
                lease
                for lease in ended
                if lease in successor.orphans and lease not in successor.held
            )
