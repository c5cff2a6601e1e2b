"""Which chunks of a GPU's arena this connection has: fetched when a lease first touches them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

from tierd_client.errors import ProtocolBroken
from tierd_client.inbox import close_all
from tierd_client.memory import ArenaMemory
from tierd_layouts.wire import MAX_CHUNKS

if TYPE_CHECKING:
    from tierd_client.connection import Connection


class ChunkMemory(ArenaMemory, Protocol):
    """Reserved addresses of an arena, with memory behind the chunks that were mapped."""

    def map(self, chunk: int, fd: int) -> None:
        """Show the chunk behind a descriptor, which the caller closes, for reading.
        Raises ProtocolBroken, DeviceFailed, OSError."""

    def map_all(self, handle: bytes, nbytes: int) -> None:
        """Show the whole arena behind a handle. Raises ProtocolBroken, DeviceFailed."""

    def unmap(self, chunk: int) -> None:
        """Let go of a chunk. Nothing reads it: no lease is in it. Raises DeviceFailed, OSError."""

    def unmap_all(self) -> None:
        """Let go of what `map_all` showed; again does nothing. Raises DeviceFailed."""


class ChunkMap:
    """The chunks of one arena. Belongs to one connection: the daemon counts who has which chunk,
    and asks it back from that one. Thread-safe."""

    def __init__(
        self, connection: Connection, arena: int, chunk_bytes: int, memory: ChunkMemory
    ) -> None:
        self.memory = memory
        self._connection = connection
        self._arena = arena
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._mapped: set[int] = set()
        self._whole = False  # mapped by one handle

    def populate(self, offset: int, nbytes: int) -> None:
        """Have all chunks of a leased range mapped. Asks the daemon only for those that are not.
        Raises what `Connection.call` raises, DeviceFailed, OSError."""
        last = (offset + nbytes - 1) // self._chunk_bytes
        chunks = range(offset // self._chunk_bytes, last + 1)
        if self._whole or self._mapped.issuperset(chunks):
            return
        with self._lock:
            missing = [chunk for chunk in chunks if chunk not in self._mapped]
            while missing and not self._whole:
                self._fetch(missing[:MAX_CHUNKS])
                missing = missing[MAX_CHUNKS:]

    def has(self, chunk: int) -> bool:
        """Whether the chunk is mapped by itself."""
        return chunk in self._mapped

    def unmap(self, chunk: int) -> None:
        """Let go of a chunk that the daemon takes back; one that is not mapped is nothing.
        Raises DeviceFailed, OSError: then it is mapped still."""
        with self._lock:
            if chunk in self._mapped:
                self.memory.unmap(chunk)
                self._mapped.remove(chunk)

    def let_go(self) -> None:
        """Let go of the whole arena. Raises DeviceFailed, OSError."""
        for chunk in sorted(self._mapped):
            self.unmap(chunk)
        with self._lock:
            if self._whole:
                self.memory.unmap_all()
                self._whole = False

    def _fetch(self, chunks: list[int]) -> None:
        reply = self._connection.call("chunks", arena=self._arena, chunks=chunks)
        try:
            handle = reply.fields.get("handle")
            if handle is not None:
                self.memory.map_all(*_handle(reply.fields))
                self._whole = True
                return
            for chunk, fd in zip(chunks, reply.fds, strict=True):
                self.memory.map(chunk, fd)
                self._mapped.add(chunk)
        except ProtocolBroken as error:
            self._connection.fail(error)
            raise
        finally:
            close_all(reply.fds)


def _handle(fields: dict[str, Any]) -> tuple[bytes, int]:
    handle, nbytes = fields["handle"], fields.get("nbytes")
    if type(handle) is not bytes or type(nbytes) is not int:
        raise ProtocolBroken(f"chunks reply with handle {handle!r} of {nbytes!r} bytes")
    return handle, nbytes
