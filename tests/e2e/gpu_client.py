"""A client on a GPU tier that speaks raw frames: it maps what it is handed, and nothing helps it.

For the `memfd` device: each chunk of the arena is a file of its own, mapped read-only on its own.
"""

from __future__ import annotations

import mmap
import os
import select
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from tests.daemon.conftest import RawClient
from tierd_layouts.records import BLOCK_BYTES
from tierd_layouts.slot_table import SlotTable
from tierd_layouts.wire import MAX_FDS, PROTOCOL_VERSION

if TYPE_CHECKING:
    from tierd_layouts.index import Layer

Grant = dict[str, Any]

ATTEND_S = 0.02  # how long a client that waits for a grant looks away


def damaged_blocks(data: bytes | memoryview, layer: Layer) -> list[int]:
    """The numbers of the layer's 4 MiB blocks whose bytes have another hash than the pack says."""
    damaged, number, offset = [], 0, 0
    for extent in layer.extents:
        for begin, expected in zip(range(0, extent.nbytes, BLOCK_BYTES), extent.xxh3, strict=True):
            end = min(begin + BLOCK_BYTES, extent.nbytes)
            if xxhash.xxh3_64_intdigest(data[offset + begin : offset + end]) != expected:
                damaged.append(number)
            number += 1
        offset += extent.nbytes
    return damaged


@dataclass
class GpuModel:
    """A model that was opened on a GPU tier, and the chunks of its arena that are mapped here."""

    client: GpuClient
    model_id: int
    arena: int
    kind: str
    chunk_bytes: int
    table: SlotTable
    chunks: dict[int, mmap.mmap] = field(default_factory=dict)
    attended: int = 0  #: the attention that was answered last

    def plan(self, layers: int, **fields: Any) -> dict[str, Any]:
        return self.client.call("plan", model_id=self.model_id, order=list(range(layers)), **fields)

    def acquire(self, layer: int, **fields: Any) -> Grant:
        """A lease. What the daemon wants back meanwhile is unmapped: the grant may wait for it."""
        request = self.client.send("acquire", model_id=self.model_id, layer=layer, **fields)
        while not self.client.replied(request, ATTEND_S):
            self.attend()
        return self.client.receive(request)

    def release(self, *grants: Grant) -> None:
        self.client.call("release", leases=[grant["lease"] for grant in grants])

    def chunks_of(self, grant: Grant) -> list[int]:
        first = grant["offset"] // self.chunk_bytes
        return list(range(first, -(-(grant["offset"] + grant["bytes"]) // self.chunk_bytes)))

    def send_chunks(self, chunks: list[int]) -> int:
        return self.client.send("chunks", arena=self.arena, chunks=chunks)

    def map_received(self, request: int, chunks: list[int]) -> None:
        self.client.receive(request)
        for chunk, fd in zip(chunks, self.client.take_fds(), strict=True):
            self.chunks[chunk] = mmap.mmap(fd, self.chunk_bytes, prot=mmap.PROT_READ)
            os.close(fd)

    def map(self, grant: Grant) -> None:
        """Map the chunks of a lease that are not mapped yet."""
        missing = [chunk for chunk in self.chunks_of(grant) if chunk not in self.chunks]
        for first in range(0, len(missing), MAX_FDS):
            some = missing[first : first + MAX_FDS]
            self.map_received(self.send_chunks(some), some)

    def bytes_of(self, grant: Grant) -> bytes:
        """The bytes under a lease whose chunks are mapped."""
        begin, end = grant["offset"], grant["offset"] + grant["bytes"]
        parts = []
        for chunk in self.chunks_of(grant):
            base = chunk * self.chunk_bytes
            parts.append(self.chunks[chunk][max(begin - base, 0) : end - base])
        return b"".join(parts)

    def read(self, layer: int) -> bytes:
        """A whole lease: taken, mapped, read, given back."""
        grant = self.acquire(layer)
        self.map(grant)
        data = self.bytes_of(grant)
        self.release(grant)
        return data

    def unmap(self, chunks: list[int]) -> None:
        for chunk in chunks:
            self.chunks.pop(chunk).close()

    def attend(self) -> list[int]:
        """Where attention was raised: unmaps what is wanted back, says so, returns the chunks."""
        if self.table.attention == self.attended:
            return []
        self.attended = self.table.attention
        unmapped: list[int] = []
        wanted = self.client.attend()
        while mine := [c for arena, chunks in wanted if arena == self.arena for c in chunks]:
            self.unmap(mine)
            unmapped += mine
            wanted = self.client.attend([[self.arena, mine]])
        return unmapped


class GpuClient(RawClient):
    """A connection on one GPU tier."""

    def send_hello(self, tier: str = "gpu:0", held: tuple[int, ...] = ()) -> int:
        fields: dict[str, Any] = {"version": PROTOCOL_VERSION, "client": "gpu-test", "held": held}
        return self.send("hello", capabilities=[], tier=tier, **fields)

    def greet(self, tier: str = "gpu:0", held: tuple[int, ...] = ()) -> dict[str, Any]:
        return self.receive(self.send_hello(tier, held))

    def count_on_from(self, request: int) -> None:
        """The id of the next request, after ids that were sent by hand."""
        self._next_id = request

    def open_gpu(self, model: str) -> GpuModel:
        return self.opened(self.send("open", model=model))

    def opened(self, request: int) -> GpuModel:
        """What the reply to an `open` brought: control files and the slot table, no arena."""
        reply = self.receive(request)
        fds = self.take_fds()
        assert len(fds) == len(reply["files"]) + 1, "control files and the slot table"
        memory = mmap.mmap(fds[-1], reply["table"]["bytes"], prot=mmap.PROT_READ)
        for fd in fds:
            os.close(fd)
        table = SlotTable(memory)
        self._maps.append((memory, table))
        arena = reply["arena"]
        model = GpuModel(
            self, reply["model_id"], arena["arena"], arena["kind"], arena["chunk_bytes"], table
        )
        self._opened.append(model)
        return model

    def attend(self, unmapped: list[list[Any]] | None = None) -> list[list[Any]]:
        wanted: list[list[Any]]
        wanted = self.call("attend", unmapped=unmapped or [], scratch_bytes=0)["unmap"]
        return wanted

    def take_fds(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    def replied(self, request: int, seconds: float) -> bool:
        """Whether the reply to `request` is there, or comes within `seconds`."""
        if request not in self._replies and select.select([self.sock], [], [], seconds)[0]:
            self._replies.update((reply["id"], reply) for reply in self._more())
        return request in self._replies

    def wait_readable(self, seconds: float = 20.0) -> None:
        """Something is there to be received, and stays unreceived."""
        assert select.select([self.sock], [], [], seconds)[0], f"nothing came in {seconds} s"

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._opened: list[GpuModel] = []

    def close(self) -> None:
        for model in self._opened:
            model.unmap(list(model.chunks))
        super().close()
