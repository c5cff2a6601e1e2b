"""What an index says: shards, layers, extents, tensors and arrays, as plain records."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tierd_layouts.dtypes import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT_NAME = "tierd-pack"
FORMAT_VERSION = 1
INDEX_FILE = "tierd.json"
BLOCK_BYTES = 4 << 20  #: one hash each
PAGE_BYTES = 4096  #: O_DIRECT: extents start and end on it
ARRAY_ALIGNMENT = 256  #: widest load of any kernel, GPU memory transactions included


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous part of a layer: `nbytes` at `offset` of the shard FILE.

    xxh3: xxh3_64 (seed 0) of every 4 MiB block, counted from the extent's start; the last is short.
    """

    shard: int
    offset: int
    nbytes: int
    xxh3: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Array:
    """A stored array: `nbytes` at `offset` of the LAYER's bytes, and therefore of its slot."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named weight. `shape` and `dtype` are those of the weight, whatever the codec stores.

    nnz: elements that are stored: those with a bit in the bitmap, all where there is none.
    source, slice: the checkpoint's parameter and the part of it (None = all of it).
    group: columns that share a scale, for codecs that have scales.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    order: str
    tile: tuple[int, int] | None
    nnz: int
    arrays: Mapping[str, Array]
    source: str
    slice: tuple[int, ...] | None = None
    group: int | None = None

    @property
    def dense_bytes(self) -> int:
        """Bytes of the whole weight in `dtype`."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layer:
    """The unit that moves between tiers. Its bytes are its extents' bytes, one after the other."""

    name: str
    nbytes: int
    extents: tuple[Extent, ...]
    tensors: tuple[Tensor, ...]

    @property
    def dense_bytes(self) -> int:
        """Bytes of all its weights uncompressed."""
        return sum(tensor.dense_bytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the pack and its exact size."""

    file: str
    nbytes: int


def block_count(nbytes: int) -> int:
    """Returns how many hashes an extent of `nbytes` has."""
    return -(-nbytes // BLOCK_BYTES)


def stored_name(tensor_name: str, array_name: str) -> str:
    """Returns the name of an array inside a shard: dense data keeps the tensor's own name."""
    return tensor_name if array_name == "data" else f"{tensor_name}.{array_name}"
