"""The arenas of one GPU tier that a connection reads, and what the daemon asks back of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from tierd_client.errors import DeviceFailed, ProtocolBroken
from tierd_client.gpu.chunk_map import ChunkMap
from tierd_client.gpu.kinds import make_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tierd_client.connection import Connection
    from tierd_client.gpu.chunk_map import ChunkMemory

    #: kind, number of bytes, bytes of a chunk, device, what it is called -> the memory
    MakeMemory = Callable[[str, int, int, torch.device, str], ChunkMemory]

#: Chunks that one request says were let go: a frame has room for no more than three times as many.
MOST_SAID = 4096


class GpuArenas:
    """Thread-safe. device: where tensors over these arenas are. Belongs to one connection."""

    def __init__(
        self, connection: Connection, device: torch.device, make: MakeMemory = make_memory
    ) -> None:
        self.device = device
        #: Whether somebody calls `attend` all the time, so that requests need not.
        self.attended = False
        self._connection = connection
        self._make = make
        self._lock = threading.Lock()
        self._maps: dict[int, ChunkMap] = {}
        self._seen: int | None = None  # `attention` when the daemon was last asked
        self._told = 0  # scratch bytes that the daemon knows of
        self._asked: list[tuple[int, int]] = []  # back, and not let go yet: arena, chunk
        self._unmapped: list[tuple[int, int]] = []  # let go, and not said yet
        self._kept = False

    def arena(self, arena: int, kind: str, span_bytes: int, chunk_bytes: int) -> ChunkMap:
        """The map of an arena, the same for all models in it. Raises ProtocolBroken, DeviceFailed,
        OSError."""
        if chunk_bytes <= 0 or chunk_bytes & (chunk_bytes - 1) or span_bytes < chunk_bytes:
            raise ProtocolBroken(f"arena {arena} of {span_bytes} bytes in chunks of {chunk_bytes}")
        with self._lock:
            chunks = self._maps.get(arena)
            if chunks is None:
                what = f"arena {arena} of {self._connection.tier}"
                memory = self._make(kind, span_bytes, chunk_bytes, self.device, what)
                chunks = ChunkMap(self._connection, arena, chunk_bytes, memory)
                self._maps[arena] = chunks
            return chunks

    def begin(self, attention: int) -> None:
        """Nothing was asked back yet, with `attention` in the slot table and no chunk mapped."""
        with self._lock:
            if self._seen is None:
                self._seen = attention

    def attend(self, attention: int, scratch_bytes: int = 0) -> None:
        """Let go of what the daemon takes back, if `attention` of the slot table changed; and tell
        it how much memory of the GPU this client uses for itself, if that did.

        Raises what `Connection.call` raises, DeviceFailed, OSError. What could not be said or let
        go is not forgotten: the next call tries again.
        """
        with self._lock:
            # What is mapped again, the daemon has given out again: only its answer was lost.
            self._unmapped = [(a, c) for a, c in self._unmapped if not self._has(a, c)]
            problem = self._let_go_of_asked()
            while attention != self._seen or scratch_bytes != self._told or self._unmapped:
                said = self._unmapped[:MOST_SAID]
                reply = self._connection.call(
                    "attend", unmapped=_grouped(said), scratch_bytes=scratch_bytes
                )
                del self._unmapped[: len(said)]
                unsaid = set(self._unmapped)
                self._asked = [one for one in self._asked_back(reply.fields) if one not in unsaid]
                self._seen, self._told = attention, scratch_bytes
                problem = self._let_go_of_asked()
            if problem is not None:
                raise problem

    def keep(self) -> None:
        """Keep what is mapped until it is collected: leases are about to end in which a thread may
        be computing."""
        with self._lock:
            self._kept = True

    def let_go(self) -> None:
        """Let go of everything. Nothing may be leased or viewed any more, nor ever be again: for a
        connection that ended, whose GPU's memory nobody gets as long as it is mapped here."""
        with self._lock:
            if self._kept:
                return
            for chunks in self._maps.values():
                chunks.let_go()

    def _has(self, arena: int, chunk: int) -> bool:
        return arena in self._maps and self._maps[arena].has(chunk)

    def _let_go_of_asked(self) -> DeviceFailed | OSError | None:
        """Unmap what was asked back; what fails stays asked. Returns the last problem."""
        problem: DeviceFailed | OSError | None = None
        failed = []
        for arena, chunk in self._asked:
            try:
                if arena in self._maps:
                    self._maps[arena].unmap(chunk)
                self._unmapped.append((arena, chunk))
            except (DeviceFailed, OSError) as error:
                problem = error
                failed.append((arena, chunk))
        self._asked = failed
        return problem

    def _asked_back(self, fields: dict[str, Any]) -> list[tuple[int, int]]:
        found = []
        for item in fields.get("unmap", ()):
            match item:
                case [int(arena), [*chunks]] if all(type(chunk) is int for chunk in chunks):
                    found += [(arena, chunk) for chunk in chunks]
                case _:
                    error = ProtocolBroken(f"attend reply asks back {item!r}")
                    self._connection.fail(error)
                    raise error
        return found


def _grouped(chunks: list[tuple[int, int]]) -> list[list[Any]]:
    """As the wire has them: [[arena, [chunks]]]."""
    by_arena: dict[int, list[int]] = {}
    for arena, chunk in chunks:
        by_arena.setdefault(arena, []).append(chunk)
    return [[arena, numbers] for arena, numbers in by_arena.items()]
