"""One arena's addresses on a GPU, and what stands behind each of its chunks."""

from __future__ import annotations

from typing import Generic, TypeVar

Backing = TypeVar("Backing")


class Span(Generic[Backing]):
    """Chunk `i` lies at `base + i * chunk_bytes`; `chunks[i]` is its memory, where there is any.

    `leftovers[i]` is memory of chunk `i` that the driver refused to take back so far.
    """

    def __init__(self, arena: int, base: int, span_bytes: int, chunk_bytes: int) -> None:
        self.arena = arena
        self.base = base
        self.span_bytes = span_bytes
        self.chunk_bytes = chunk_bytes
        self.chunks: dict[int, Backing] = {}
        self.leftovers: dict[int, Backing] = {}

    def missing(self, first: int, count: int) -> list[int]:
        """Chunks of [first, first + count) without memory."""
        return [chunk for chunk in self._numbers(first, count) if chunk not in self.chunks]

    def present(self, first: int, count: int) -> list[int]:
        """Chunks of [first, first + count) with memory."""
        return [chunk for chunk in self._numbers(first, count) if chunk in self.chunks]

    def left_over(self, first: int, count: int) -> list[int]:
        """Chunks of [first, first + count) with leftovers."""
        return [chunk for chunk in self._numbers(first, count) if chunk in self.leftovers]

    def address(self, chunk: int) -> int:
        return self.base + chunk * self.chunk_bytes

    def backing(self, chunk: int) -> Backing:
        """Raises ValueError when it has none."""
        if missing := self.missing(chunk, 1):
            raise ValueError(f"chunk {missing[0]} of arena {self.arena} has no memory")
        return self.chunks[chunk]

    def target(self, offset: int, nbytes: int) -> int:
        """The address of [offset, offset + nbytes), all of which has memory, else ValueError."""
        first, count = chunks_of(offset, nbytes, self.chunk_bytes)
        if missing := self.missing(first, count):
            raise ValueError(
                f"[{offset}, {offset + nbytes}) of arena {self.arena}: chunk {missing[0]} has no "
                "memory"
            )
        return self.base + offset

    def parts(self, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """(address, bytes) of [offset, offset + nbytes) cut at the borders of chunks."""
        address, end = self.target(offset, nbytes), offset + nbytes
        found = []
        while offset < end:
            border = min((offset // self.chunk_bytes + 1) * self.chunk_bytes, end)
            found.append((address, border - offset))
            address, offset = address + border - offset, border
        return found

    def _numbers(self, first: int, count: int) -> range:
        last = self.span_bytes // self.chunk_bytes
        if first < 0 or count <= 0 or first + count > last:
            raise ValueError(
                f"chunks [{first}, {first + count}) are not in arena {self.arena} of {last} chunks"
            )
        return range(first, first + count)


def chunks_of(offset: int, nbytes: int, chunk_bytes: int) -> tuple[int, int]:
    """The first chunk of [offset, offset + nbytes), and how many the range touches."""
    if offset < 0 or nbytes <= 0:
        raise ValueError(f"[{offset}, {offset + nbytes}) is no range of an arena")
    first = offset // chunk_bytes
    return first, -(-(offset + nbytes) // chunk_bytes) - first


class Spans(Generic[Backing]):
    """The arenas of one device by number."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._by_arena: dict[int, Span[Backing]] = {}

    def check_new(self, arena: int, span_bytes: int) -> None:
        """Raises ValueError when there can be no such arena beside the others."""
        if arena in self._by_arena:
            raise ValueError(f"arena {arena} exists already")
        if span_bytes <= 0 or span_bytes % self._chunk_bytes:
            raise ValueError(
                f"an arena spans whole chunks of {self._chunk_bytes} bytes, not {span_bytes} bytes"
            )

    def add(self, arena: int, base: int, span_bytes: int) -> None:
        self._by_arena[arena] = Span(arena, base, span_bytes, self._chunk_bytes)

    def remove(self, arena: int) -> None:
        """Whatever it had was given back."""
        del self._by_arena[arena]

    def __getitem__(self, arena: int) -> Span[Backing]:
        if arena not in self._by_arena:
            raise ValueError(f"there is no arena {arena}")
        return self._by_arena[arena]

    def __len__(self) -> int:
        return len(self._by_arena)

    def take_all(self) -> list[Span[Backing]]:
        """All of them, which are no arenas of the device any more."""
        spans = list(self._by_arena.values())
        self._by_arena.clear()
        return spans

    @property
    def backed_bytes(self) -> int:
        spans = list(self._by_arena.values())
        return sum(len(span.chunks) + len(span.leftovers) for span in spans) * self._chunk_bytes
