"""A GPU that is played by the host: each chunk of its arena is a file in memory."""

from __future__ import annotations

import os

from tierd_client.errors import ProtocolBroken
from tierd_client.host_memory import HostMemory


class MemfdMemory(HostMemory):
    """The addresses of an arena. A chunk that is not mapped faults on any access."""

    def __init__(self, nbytes: int, chunk_bytes: int, what: str) -> None:
        super().__init__(nbytes, what)
        self._chunk_bytes = chunk_bytes

    def map(self, chunk: int, fd: int) -> None:
        """Show a chunk. Raises OSError, and ProtocolBroken when its file is too short (a read
        would be a SIGBUS)."""
        what = f"chunk {chunk} of {self.what}"
        size, needed = os.fstat(fd).st_size, self._bytes_of(chunk)
        if size < needed:
            raise ProtocolBroken(f"{what} has {size} bytes, a chunk has {needed}")
        self._show(fd, chunk * self._chunk_bytes, needed, what)
        self._touch(chunk * self._chunk_bytes, needed)

    def map_all(self, handle: bytes, nbytes: int) -> None:
        """Refuse: a file has a descriptor, no handle."""
        raise ProtocolBroken(f"{self.what} is a memfd device's, and came as a handle")

    def unmap(self, chunk: int) -> None:
        """Let go of a chunk. Its addresses fault again."""
        self._hide(chunk * self._chunk_bytes, self._bytes_of(chunk))

    def unmap_all(self) -> None:
        """Nothing was mapped whole."""

    def _bytes_of(self, chunk: int) -> int:
        return min(self._chunk_bytes, self.nbytes - chunk * self._chunk_bytes)
