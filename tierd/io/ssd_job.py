"""What is to be read: the extents of one layer, and the place where they go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.io.chunks import Chunk
from tierd.io.verified import VerifiedBlocks
from tierd_layouts.records import BLOCK_BYTES, block_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tierd_layouts.records import Layer, Shard


@dataclass(frozen=True, slots=True)
class ExtentRead:
    """A contiguous part of a layer in an open shard. `xxh3`: one hash for each 4 MiB block."""

    fd: int
    file: str
    offset: int
    nbytes: int
    xxh3: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ReadJob:
    """Fill `target` with the extents of one layer, one after the other.

    The target, and the descriptors, must stay until the outcome came: also after a failure of one
    chunk the others are still being written. device: any number, one for each device that may hang
    without disturbing the others. verified: who wants each block as soon as it is there follows it.
    """

    pack: str
    layer: str
    extents: tuple[ExtentRead, ...]
    target: memoryview
    device: int = 0
    verified: VerifiedBlocks = field(default_factory=VerifiedBlocks)

    def __post_init__(self) -> None:
        nbytes = sum(extent.nbytes for extent in self.extents)
        if nbytes != self.target.nbytes or nbytes == 0:
            raise ValueError(
                f"layer {self.layer!r} of pack {self.pack!r}: extents of {nbytes} bytes do not "
                f"fill a target of {self.target.nbytes} bytes"
            )
        for extent in self.extents:
            if len(extent.xxh3) != block_count(extent.nbytes):
                raise ValueError(
                    f"layer {self.layer!r} of pack {self.pack!r}: {len(extent.xxh3)} hashes "
                    f"for an extent of {extent.nbytes} bytes"
                )

    @classmethod
    def of_layer(
        cls,
        pack: str,
        layer: Layer,
        shards: Sequence[Shard],
        fds: Sequence[int],
        target: memoryview,
        device: int = 0,
        verified: VerifiedBlocks | None = None,
    ) -> ReadJob:
        """fds: the open shards, in the order of `shards`. verified: None = one of its own."""
        extents = extents_of(layer, shards, fds)
        return cls(pack, layer.name, extents, target, device, verified or VerifiedBlocks())

    def chunks(self, chunk_bytes: int) -> Iterator[Chunk]:
        """chunk_bytes: of all but an extent's last; whole blocks, because each has one hash."""
        blocks = max(1, chunk_bytes // BLOCK_BYTES)
        start = 0
        for extent in self.extents:
            for first in range(0, len(extent.xxh3), blocks):
                offset = first * BLOCK_BYTES
                nbytes = min(blocks * BLOCK_BYTES, extent.nbytes - offset)
                yield Chunk(
                    fd=extent.fd,
                    offset=extent.offset + offset,
                    target=self.target[start : start + nbytes],
                    start=start,
                    xxh3=extent.xxh3[first : first + blocks],
                    pack=self.pack,
                    layer=self.layer,
                    file=extent.file,
                    index=first,
                    count=len(extent.xxh3),
                )
                start += nbytes


def extents_of(layer: Layer, shards: Sequence[Shard], fds: Sequence[int]) -> tuple[ExtentRead, ...]:
    """fds: the open shards, in the order of `shards`."""
    return tuple(
        ExtentRead(
            fds[extent.shard], shards[extent.shard].file,
            extent.offset, extent.nbytes, extent.xxh3,
        )
        for extent in layer.extents
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A layer was read and verified. duration_ns: from submission, so with time in the queue."""

    nbytes: int
    duration_ns: int
