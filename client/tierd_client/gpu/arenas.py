"""The arenas of one GPU tier that a connection reads, and what the daemon asks back of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from tierd_client.errors import ProtocolBroken
from tierd_client.gpu.chunk_map import ChunkMap
from tierd_client.gpu.kinds import make_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tierd_client.connection import Connection
    from tierd_client.gpu.chunk_map import ChunkMemory

    #: kind, number of bytes, bytes of a chunk, device, what it is called -> the memory
    MakeMemory = Callable[[str, int, int, torch.device, str], ChunkMemory]


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
        self._unmapped: list[list[Any]] = []  # not said yet: [arena, chunks]

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

        Raises what `Connection.call` raises; what was not said then is said the next time.
        """
        with self._lock:
            while attention != self._seen or scratch_bytes != self._told or self._unmapped:
                reply = self._connection.call(
                    "attend", unmapped=self._unmapped, scratch_bytes=scratch_bytes
                )
                self._seen, self._told, self._unmapped = attention, scratch_bytes, []
                for arena, chunks in self._asked_back(reply.fields):
                    if arena in self._maps:
                        self._maps[arena].unmap(chunks)
                    self._unmapped.append([arena, chunks])

    def _asked_back(self, fields: dict[str, Any]) -> list[tuple[int, list[int]]]:
        found = []
        for item in fields.get("unmap", ()):
            match item:
                case [int(arena), [*chunks]] if all(type(chunk) is int for chunk in chunks):
                    found.append((arena, chunks))
                case _:
                    error = ProtocolBroken(f"attend reply asks back {item!r}")
                    self._connection.fail(error)
                    raise error
        return found
