"""Which host memory the GPUs reach directly, and who copies from it just now.

DRAM arenas are registered with the driver in blocks on a fixed grid, because one call has a limit
(512 GiB fail on driver 580) and takes 0.1 s for each GB, and only where memory exists: registering
a page makes it. A copy must not cross from one registration to another, or to memory that has
none, so it is cut there. A range changes only while no copy uses it. Memory that is discarded while
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

#: Memory of which a part is discarded is registered anew: 3 ms for a block.
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """Host memory that one call may copy. pinned: without a detour through the driver's buffers."""

    address: int
    nbytes: int
    pinned: bool


@dataclass(slots=True)
class _Block:
    """One cell of an arena's grid; ranges are offsets in the arena."""

    exists: Ranges = field(default_factory=list)
    registered: Ranges = field(default_factory=list)  # each of them one call, parts of `exists`
    restless: bool = False  # memory of it was discarded before


@dataclass(slots=True)
class _Arena:
    address: int
    span_bytes: int
    blocks: dict[int, _Block] = field(default_factory=dict)


class Use:
    """A copy's right to read host memory by `spans`, until `end`."""

    def __init__(self, host: HostMemory, first: int, last: int, spans: list[Span]) -> None:
        """[first, last): of addresses."""
        self._host = host
        self.first = first
        self.last = last
        self.spans = spans

    @property
    def unpinned_bytes(self) -> int:
        return sum(span.nbytes for span in self.spans if not span.pinned)

    def end(self) -> None:
        """Nothing reads the memory any more. Called once."""
        self._host.end(self)


class HostMemory:
    """The DRAM arenas as the GPUs see them. Thread-safe; one thread claims."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        #: What `memfd` devices have registered: as with a driver, for all devices of a process.
        self.without_driver = Registered("memfd")
        self._arenas: dict[int, _Arena] = {}
        self._unsettled: dict[tuple[int, int], int] = {}  # (arena, cell): when it changed last
        self._uses: set[Use] = set()
        self._claimed: tuple[int, int] | None = None  # addresses that no copy may begin to use
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
                block = self._arenas[arena].blocks.setdefault(number, _Block())
                exists = added(block.exists, begin, finish)
                if exists != block.exists:
                    block.exists = exists
                    self._unsettled[arena, number] = now_ns
                    news = True
        return news

    # ---------------------------------------------------------------------------------- for copies

    def use(self, address: int, nbytes: int) -> Use:
        """Begin to copy from [address, address + nbytes). Waits while any of it is claimed."""
        last = address + nbytes
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._claimed is None or self._claimed[1] <= address or last <= self._claimed[0]
                )
            )
            use = Use(self, address, last, list(self._spans(address, last)))
            self._uses.add(use)
            return use

    def end(self, use: Use) -> None:
        with self._changed:
            self._uses.remove(use)
            self._changed.notify_all()

    @property
    def uses(self) -> int:
        """Copies under way."""
        with self._changed:
            return len(self._uses)

    # ------------------------------------------------------------------------------ for registrars

    def claim(self, arena: int, start: int, end: int, patience_s: float) -> bool:
        """Wait until no copy uses [start, end); none begins to until `give`. False, and nothing
        claimed, when that took too long."""
        with self._changed:
            base = self._arenas[arena].address
            first, last = self._claimed = (base + start, base + end)
            unused = self._changed.wait_for(
                lambda: not any(use.first < last and first < use.last for use in self._uses),
                patience_s,
            )
            if not unused:
                self._claimed = None
                self._changed.notify_all()
            return unused

    def give(self) -> None:
        """What was claimed may be used again."""
        with self._changed:
            self._claimed = None
            self._changed.notify_all()

    def registrations(self, arena: int, start: int, end: int) -> Ranges:
        """Those of which a part lies in [start, end)."""
        with self._changed:
            blocks = self._arenas[arena].blocks
            return [
                (first, last)
                for number, _, _ in self._cells(start, end)
                if number in blocks
                for first, last in blocks[number].registered
                if first < end and start < last
            ]

    def missing(self, arena: int, offset: int) -> Ranges:
        """What of the block at `offset` exists and is not registered."""
        with self._changed:
            block = self._arenas[arena].blocks[offset // self.block_bytes]
            missing = block.exists
            for first, last in block.registered:
                missing = removed(missing, first, last)
            return missing

    def fragments(self, arena: int, offset: int) -> int:
        """By how many registrations the block at `offset` has more than it needs."""
        with self._changed:
            block = self._arenas[arena].blocks[offset // self.block_bytes]
            return len(block.registered) - len(block.exists)

    def registered(self, arena: int, start: int, end: int) -> None:
        """[start, end), of one block, was registered, in one call."""
        with self._changed:
            block = self._arenas[arena].blocks[start // self.block_bytes]
            block.registered = sorted([*block.registered, (start, end)])

    def unregistered(self, arena: int, start: int, end: int) -> None:
        """Undoes `registered`."""
        with self._changed:
            self._arenas[arena].blocks[start // self.block_bytes].registered.remove((start, end))

    def forget(self, arena: int, start: int, end: int) -> None:
        """No memory exists in [start, end), none of which is registered."""
        now_ns = time.monotonic_ns()
        with self._changed:
            blocks = self._arenas[arena].blocks
            for number, begin, finish in self._cells(start, end):
                if number in blocks:
                    blocks[number].exists = removed(blocks[number].exists, begin, finish)
                    blocks[number].restless = True
                    self._unsettled[arena, number] = now_ns

    def unsettled(self, quiet_ns: int) -> list[tuple[int, int]]:
        """(arena, offset) of blocks that should be registered: full, or quiet for so long, or those
        of which memory comes and goes: what is read there is copied at once."""
        now_ns = time.monotonic_ns()
        with self._changed:
            return [
                (arena, cell * self.block_bytes)
                for (arena, cell), changed_ns in self._unsettled.items()
                if now_ns - changed_ns >= quiet_ns or self._is_due(arena, cell)
            ]

    def _is_due(self, arena: int, cell: int) -> bool:
        block = self._arenas[arena].blocks[cell]
        whole = (cell * self.block_bytes, (cell + 1) * self.block_bytes)
        return block.restless or block.exists == [whole]

    def settled(self, arena: int, offset: int) -> None:
        """What exists in that block is registered from now on, or was tried to be."""
        with self._changed:
            self._unsettled.pop((arena, offset // self.block_bytes), None)

    def unsettle(self, arena: int, offset: int) -> None:
        """What exists in that block is to be registered, although it was `settled`."""
        with self._changed:
            self._unsettled[arena, offset // self.block_bytes] = time.monotonic_ns()

    def waits(self) -> bool:
        """Whether any block changed and was not registered since."""
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
        return self._sum(lambda block: total(block.registered))

    @property
    def existing_bytes(self) -> int:
        return self._sum(lambda block: total(block.exists))

    def _sum(self, of: Callable[[_Block], int]) -> int:
        with self._changed:
            return sum(
                of(block) for arena in self._arenas.values() for block in arena.blocks.values()
            )

    def _cells(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The grid's cells that [start, end) touches: number, and the part of the range in it."""
        for number in range(start // self.block_bytes, -(-end // self.block_bytes)):
            first = number * self.block_bytes
            yield number, max(start, first), min(end, first + self.block_bytes)

    def _spans(self, first: int, last: int) -> Iterator[Span]:
        """Addresses [first, last) cut at the borders of what is registered, in order."""
        at = first
        for begin, end in self._registered_at(first, last):
            if at < begin:
                yield Span(at, begin - at, pinned=False)
            yield Span(begin, end - begin, pinned=True)
            at = end
        if at < last:
            yield Span(at, last - at, pinned=False)

    def _registered_at(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The parts of registrations in addresses [first, last)."""
        for arena in self._arenas.values():
            base = arena.address
            if base <= first and last <= base + arena.span_bytes:
                for number, _, _ in self._cells(first - base, last - base):
                    for begin, end in (
                        arena.blocks[number].registered if number in arena.blocks else ()
                    ):
                        begin, end = max(base + begin, first), min(base + end, last)
                        if begin < end:
                            yield begin, end
