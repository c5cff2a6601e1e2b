"""A warm start: what systemd kept for us, checked, and the processes that may still read it.

Only two things outlive a daemon: the arenas (`arena-N.READERS`) and the slot table (`table`). They
are believed only together and only when everything fits; otherwise the start is cold, and the log
says why.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd import sdnotify
from tierd.access import AccessGroup
from tierd.core.model import AdoptedSlot, LayerKey
from tierd.errors import ArenaError
from tierd.io.arena import Arena
from tierd.io.process import open_pidfd, start_time
from tierd.slots import Slots
from tierd_layouts.errors import FormatError
from tierd_layouts.slot_entries import SlotState

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from tierd.io.pages import Pages
    from tierd.pack import Pack
    from tierd_layouts.slot_entries import LeaseEntry

log = logging.getLogger(__name__)

TABLE = "table"
_ARENA = re.compile(r"arena-(\d+)\.(\S+)")


class ColdStart(Exception):
    """Why nothing of the earlier daemon can be used."""


@dataclass(slots=True)
class Inheritance:
    """The table and the arenas of an earlier daemon."""

    slots: Slots
    arenas: list[tuple[AccessGroup, Arena]]

    def groups(self) -> Iterator[tuple[int, AccessGroup]]:
        """The readers of each arena, by id."""
        return ((arena.arena_id, group) for group, arena in self.arenas)


def arena_name(arena_id: int, group: AccessGroup) -> str:
    """The name under which systemd keeps an arena: its id, and who may read it."""
    return f"arena-{arena_id}.{group}"


def is_arena(name: str) -> bool:
    return name.startswith("arena-")


def inherit(kept: Mapping[str, list[int]], pages: Pages, *, mlock: bool) -> Inheritance | None:
    """What an earlier daemon left, or None when it left nothing or nothing usable.

    kept: descriptors by name, as systemd passed them. Those not used are closed.
    """
    names = [name for name in kept if name == TABLE or is_arena(name)]
    if not names:
        return None
    arenas: list[tuple[AccessGroup, Arena]] = []
    slots: Slots | None = None
    adopted: set[int] = set()
    try:
        if len(kept.get(TABLE, ())) != 1:
            raise ColdStart(f"{len(kept.get(TABLE, ()))} slot tables were kept, expected one")
        slots = Slots.adopt(kept[TABLE][0])
        adopted.add(kept[TABLE][0])
        for name in names:
            if name != TABLE:
                arenas.append(_adopt_arena(name, kept[name], pages, mlock))
                adopted.add(kept[name][0])
        _check_places(slots, {arena.arena_id: arena for _, arena in arenas})
    except (ColdStart, ArenaError, FormatError) as error:
        log.warning("cold start: what the earlier daemon left cannot be used: %s", error)
        for _, arena in arenas:
            arena.close()
        if slots is not None:
            slots.close()
        for name in names:
            sdnotify.fdstore_remove(name, environ=os.environ)
            for fd in kept[name]:
                if fd not in adopted:
                    os.close(fd)
        return None
    return Inheritance(slots, arenas)


def _adopt_arena(name: str, fds: list[int], pages: Pages, mlock: bool) -> tuple[AccessGroup, Arena]:
    match = _ARENA.fullmatch(name)
    group = AccessGroup.parse(match[2]) if match else None
    if match is None or group is None:
        raise ColdStart(f"{name!r} does not name an arena and its readers")
    if len(fds) != 1:
        raise ColdStart(f"{len(fds)} descriptors are named {name!r}, expected one")
    return group, Arena.adopt(int(match[1]), fds[0], pages=pages, mlock=mlock)


def _check_places(slots: Slots, arenas: Mapping[int, Arena]) -> None:
    for entry in slots.table.slots():
        arena = arenas.get(entry.arena)
        if arena is None:
            raise ColdStart(f"slot {entry.slot} lies in arena {entry.arena}, which was not kept")
        if entry.offset % 4096 or entry.offset + entry.nbytes > arena.span_bytes:
            raise ColdStart(
                f"slot {entry.slot} lies at [{entry.offset}, {entry.offset + entry.nbytes}) of "
                f"arena {entry.arena}, which has {arena.span_bytes} bytes"
            )


def living(slots: Slots) -> list[LeaseEntry]:
    """The leases whose holder is still the same process. The others are ended in the table."""
    held: list[LeaseEntry] = []
    for lease in list(slots.table.leases()):
        if _lives(lease):
            held.append(lease)
        else:
            slots.end(lease.lease)
    return held


def _lives(held: LeaseEntry) -> bool:
    try:
        return start_time(held.pid) == held.start_time
    except ProcessLookupError:
        return False


@dataclass(slots=True)
class Match:
    """The slots to go on with, and those to forget."""

    adopted: list[AdoptedSlot] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def ranges(self, page_bytes: int) -> dict[int, list[tuple[int, int]]]:
        """The whole pages [start, end) under the adopted slots, by arena."""
        found: dict[int, list[tuple[int, int]]] = {}
        for slot in self.adopted:
            start = slot.offset // page_bytes * page_bytes
            end = -(-(slot.offset + slot.nbytes) // page_bytes) * page_bytes
            found.setdefault(slot.arena, []).append((start, end))
        return found


def match(
    slots: Slots,
    packs: Iterable[Pack],
    arenas: Mapping[int, AccessGroup],
    held: Iterable[LeaseEntry],
) -> Match:
    """Recognise what the slots hold. A slot that nobody needs is forgotten: no pack has its layer
    (or it is in an arena with other readers than the pack's), and no living process reads it.

    The holders of an adopted slot are the ids of the leases on it.
    """
    keys = {
        (pack.access, key): LayerKey(pack.model, layer)
        for pack in packs
        for layer, key in enumerate(pack.keys)
    }
    holders: dict[int, list[int]] = {}
    for lease in held:
        holders.setdefault(lease.slot, []).append(lease.lease)
    found = Match()
    for entry in slots.table.slots():
        key = None
        if entry.state is SlotState.RESIDENT:
            key = keys.pop((arenas[entry.arena], entry.key), None)  # a layer is adopted once
        readers = tuple(holders.get(entry.slot, ()))
        if key is None and not readers:
            found.forgotten.append(entry.slot)
            continue
        found.adopted.append(
            AdoptedSlot(
                entry.slot,
                entry.arena,
                entry.offset,
                entry.nbytes,
                entry.generation,
                key,
                readers,
            )
        )
    return found


class Orphans:
    """Leases of the earlier daemon whose holders still live.

    Each ends once: when its process dies, says hello and does not list it, releases it, or closes
    every connection that listed it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        held: Iterable[LeaseEntry],
        ended: Callable[[int], None],
    ) -> None:
        self._loop = loop
        self._ended = ended
        self._leases: dict[int, tuple[int, int]] = {}  # lease -> process (pid, start time)
        self._processes: dict[tuple[int, int], int] = {}  # process -> its pidfd
        self._listed: dict[int, set[int]] = {}  # lease -> clients that listed it
        for lease in held:
            self._leases[lease.lease] = (lease.pid, lease.start_time)
        for process in sorted(set(self._leases.values())):
            self._watch(process)

    def __len__(self) -> int:
        return len(self._leases)

    def _watch(self, process: tuple[int, int]) -> None:
        pid, started = process
        try:
            pidfd = open_pidfd(pid)
        except ProcessLookupError:
            self._loop.call_soon(self._died, process)
            return
        self._processes[process] = pidfd
        self._loop.add_reader(pidfd, self._died, process)
        # The pid may have been reused before the descriptor existed; now it cannot be.
        try:
            same = start_time(pid) == started
        except ProcessLookupError:
            same = False
        if not same:
            self._loop.call_soon(self._died, process)

    def hello(self, client: int, process: tuple[int, int], held: Iterable[int]) -> list[int]:
        """`process` says that of all its old leases it holds only `held`. Returns those of them
        that are its own; they are in the hands of `client`."""
        claimed = set(held)
        mine = [lease for lease, holder in self._leases.items() if holder == process]
        kept = [lease for lease in mine if lease in claimed]
        for lease in kept:
            self._listed.setdefault(lease, set()).add(client)
        for lease in mine:
            if lease not in claimed:
                self._end(lease)
        self._unwatch_idle(process)
        return kept

    def release(self, process: tuple[int, int], lease: int) -> bool:
        """`process` reads an old lease no more. False when it is not one of its own."""
        if self._leases.get(lease) != process:
            return False
        self._end(lease)
        self._unwatch_idle(process)
        return True

    def client_gone(self, client: int) -> None:
        """A connection closed: what no other connection of its process listed is over."""
        for lease in [lease for lease, clients in self._listed.items() if client in clients]:
            self._listed[lease].discard(client)
            if not self._listed[lease]:
                self.release(self._leases[lease], lease)

    def close(self) -> None:
        """Stop watching. The leases stay in the table, for the next daemon."""
        for pidfd in self._processes.values():
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        self._processes = {}

    def _died(self, process: tuple[int, int]) -> None:
        for lease in [lease for lease, holder in self._leases.items() if holder == process]:
            self._end(lease)
        self._unwatch_idle(process)

    def _end(self, lease: int) -> None:
        del self._leases[lease]
        self._listed.pop(lease, None)
        self._ended(lease)

    def _unwatch_idle(self, process: tuple[int, int]) -> None:
        if process in self._processes and process not in self._leases.values():
            pidfd = self._processes.pop(process)
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
