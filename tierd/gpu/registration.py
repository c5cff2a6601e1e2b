"""Which host memory the GPUs reach directly, and who copies from it just now.

DRAM arenas are registered with the driver in pieces on a fixed grid, because one call has a limit
(512 GiB fail on driver 580) and takes 0.1 s for each GB, and only where memory exists: registering
a page makes it. A copy must not cross from one registration to another, or to memory that has
none, so it is cut there. A piece changes only while no copy uses it. Memory that is discarded while
it is registered would go on being read from its old pages: so that comes first, always.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.gpu.ranges import Ranges, added, removed, total
from tierd.gpu.registered import Registered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Host memory that one call may copy. pinned: without a detour through the driver's buffers."""

    address: int
    nbytes: int
    pinned: bool


@dataclass(slots=True)
class Piece:
    """One cell of an arena's grid; ranges are offsets in the arena."""

    exists: Ranges = field(default_factory=list)
    registered: Ranges = field(default_factory=list)  # each of them one call
    users: int = 0  # copies under way
    changing: bool = False  # being registered or unregistered; no copy may begin


@dataclass(slots=True)
class _Arena:
    address: int
    span_bytes: int
    pieces: dict[int, Piece] = field(default_factory=dict)


class Use:
    """A copy's right to read host memory by `spans`, until `end`."""

    def __init__(self, host: HostMemory, pieces: list[Piece], spans: list[Span]) -> None:
        self._host = host
        self._pieces = pieces
        self.spans = spans

    @property
    def unpinned_bytes(self) -> int:
        return sum(span.nbytes for span in self.spans if not span.pinned)

    def end(self) -> None:
        """Nothing reads the memory any more. Called once."""
        self._host.end(self._pieces)
        self._pieces = []


class HostMemory:
    """The DRAM arenas as the GPUs see them. Thread-safe."""

    def __init__(self, piece_bytes: int = PIECE_BYTES) -> None:
        self.piece_bytes = piece_bytes
        #: What `memfd` devices have registered: as with a driver, for all devices of a process.
        self.without_driver = Registered("memfd")
        self._arenas: dict[int, _Arena] = {}
        self._unsettled: dict[tuple[int, int], int] = {}  # (arena, cell): when it changed last
        self._changed = threading.Condition()

    def add_arena(self, arena: int, address: int, span_bytes: int) -> None:
        with self._changed:
            self._arenas[arena] = _Arena(address, span_bytes)

    def populated(self, arena: int, start: int, end: int) -> bool:
        """Memory exists at offsets [start, end), and stays until it is discarded. Returns whether
        that is news."""
        now_ns = time.monotonic_ns()
        news = False
        with self._changed:
            for number, begin, finish in self._cells(start, end):
                piece = self._arenas[arena].pieces.setdefault(number, Piece())
                exists = added(piece.exists, begin, finish)
                if exists != piece.exists:
                    piece.exists = exists
                    self._unsettled[arena, number] = now_ns
                    news = True
        return news

    # ---------------------------------------------------------------------------------- for copies

    def use(self, address: int, nbytes: int) -> Use:
        """Begin to copy from [address, address + nbytes). Waits while a piece of it changes."""
        with self._changed:
            found = self._find(address, nbytes)
            if found is None:
                return Use(self, [], [Span(address, nbytes, pinned=False)])
            arena, offset = found
            cells = [number for number, _, _ in self._cells(offset, offset + nbytes)]
            pieces = [arena.pieces.setdefault(number, Piece()) for number in cells]
            self._changed.wait_for(lambda: not any(piece.changing for piece in pieces))
            for piece in pieces:
                piece.users += 1
            return Use(self, pieces, list(_spans(arena.address, pieces, offset, offset + nbytes)))

    def end(self, pieces: list[Piece]) -> None:
        with self._changed:
            for piece in pieces:
                piece.users -= 1
            self._changed.notify_all()

    # ------------------------------------------------------------------------------ for registrars

    def claim(self, arena: int, start: int, end: int, patience_s: float) -> list[Piece] | None:
        """The pieces of [start, end) when no copy uses them; none begins until `give`. None when
        copies used them for all of that time."""
        with self._changed:
            cells = self._arenas[arena].pieces
            pieces = [cells[number] for number, _, _ in self._cells(start, end) if number in cells]
            for piece in pieces:
                piece.changing = True
            unused = self._changed.wait_for(
                lambda: not any(piece.users for piece in pieces), patience_s
            )
        if unused:
            return pieces
        self.give(pieces)
        return None

    def give(self, pieces: list[Piece]) -> None:
        """`claim` is over."""
        with self._changed:
            for piece in pieces:
                piece.changing = False
            self._changed.notify_all()

    def forget(self, arena: int, start: int, end: int) -> None:
        """No memory exists in [start, end), none of which is registered."""
        now_ns = time.monotonic_ns()
        with self._changed:
            cells = self._arenas[arena].pieces
            for number, begin, finish in self._cells(start, end):
                if number in cells:
                    cells[number].exists = removed(cells[number].exists, begin, finish)
                    self._unsettled[arena, number] = now_ns

    def unsettled(self, quiet_ns: int) -> list[tuple[int, int]]:
        """(arena, offset) of pieces that should be registered anew: full, or quiet for so long."""
        now_ns = time.monotonic_ns()
        with self._changed:
            return [
                (arena, cell * self.piece_bytes)
                for (arena, cell), changed_ns in self._unsettled.items()
                if now_ns - changed_ns >= quiet_ns or self._is_full(arena, cell)
            ]

    def _is_full(self, arena: int, cell: int) -> bool:
        whole = (cell * self.piece_bytes, (cell + 1) * self.piece_bytes)
        return self._arenas[arena].pieces[cell].exists == [whole]

    def settled(self, arena: int, offset: int) -> None:
        """What exists in that piece is registered from now on, or was tried to be."""
        with self._changed:
            self._unsettled.pop((arena, offset // self.piece_bytes), None)

    def unsettle(self, arena: int, offset: int) -> None:
        """What exists in that piece is to be registered, although it was `settled`."""
        with self._changed:
            self._unsettled[arena, offset // self.piece_bytes] = time.monotonic_ns()

    def is_registered(self, arena: int, start: int, end: int) -> bool:
        """Whether any of it is."""
        with self._changed:
            cells = self._arenas[arena].pieces
            return any(
                first < end and start < last
                for number, _, _ in self._cells(start, end)
                if number in cells
                for first, last in cells[number].registered
            )

    def waits(self) -> bool:
        """Whether any piece changed and was not registered since."""
        with self._changed:
            return bool(self._unsettled)

    def arenas(self) -> dict[int, tuple[int, int]]:
        """The address and span of each."""
        with self._changed:
            return {
                number: (arena.address, arena.span_bytes) for number, arena in self._arenas.items()
            }

    # -------------------------------------------------------------------------------------- counts

    @property
    def registered_bytes(self) -> int:
        return self._sum(lambda piece: total(piece.registered))

    @property
    def existing_bytes(self) -> int:
        return self._sum(lambda piece: total(piece.exists))

    def _sum(self, of: Callable[[Piece], int]) -> int:
        with self._changed:
            return sum(
                of(piece) for arena in self._arenas.values() for piece in arena.pieces.values()
            )

    def _find(self, address: int, nbytes: int) -> tuple[_Arena, int] | None:
        for arena in self._arenas.values():
            offset = address - arena.address
            if offset >= 0 and offset + nbytes <= arena.span_bytes:
                return arena, offset
        return None

    def _cells(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The grid's cells that [start, end) touches: number, and the part of the range in it."""
        for number in range(start // self.piece_bytes, -(-end // self.piece_bytes)):
            first = number * self.piece_bytes
            yield number, max(start, first), min(end, first + self.piece_bytes)


def _spans(base: int, pieces: list[Piece], start: int, end: int) -> Iterator[Span]:
    """[start, end) cut at the borders of what is registered in `pieces`, in order."""
    at = start
    for piece in pieces:
        for first, last in piece.registered:
            first, last = max(first, start), min(last, end)
            if first >= last:
                continue
            if at < first:
                yield Span(base + at, first - at, pinned=False)
            yield Span(base + first, last - first, pinned=True)
            at = last
    if at < end:
        yield Span(base + at, end - at, pinned=False)
