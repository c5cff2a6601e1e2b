"""The files of a checkpoint that is to be written, before a byte of them is.

A weight becomes one piece, a safetensors tensor with its bytes as they are, or several; the pieces
of a weight lie in one shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.safetensors_file import Entry, build_header
from tierd_tools.checkpoint import SINGLE_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tierd_layouts.index import PackIndex, Tensor

#: Hugging Face's own limit: 5 GB
SHARD_BYTES = 5_000_000_000
_HEADER_ALIGNMENT = 8  # safetensors'


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece goes: `offset` in the shard file."""

    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The checkpoint's files."""

    files: tuple[str, ...]
    headers: tuple[bytes, ...]
    places: Mapping[str, Place]
    tensor_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.tensor_bytes + sum(len(header) for header in self.headers)

    def shard_index(self) -> bytes:
        """The content of model.safetensors.index.json."""
        weight_map = {name: self.files[place.shard] for name, place in sorted(self.places.items())}
        content = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": weight_map}
        return json.dumps(content, indent=2).encode() + b"\n"


def lay_out(weights: Iterable[Sequence[Piece]], metadata: Mapping[str, str]) -> Layout:
    """Cuts the weights, each given as its pieces, into shards in the order in which they come."""
    shards: list[list[Piece]] = []
    room = -1
    for pieces in weights:
        nbytes = sum(piece.nbytes for piece in pieces)
        if not shards or nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1] += pieces
        room -= nbytes
    headers: list[bytes] = []
    places: dict[str, Place] = {}
    for number, shard in enumerate(shards):
        entries: dict[str, Entry] = {}
        end = 0
        # As the safetensors library orders them, so that every tensor is aligned to its elements.
        for piece in sorted(shard, key=lambda piece: (-ITEM_BYTES[piece.dtype], piece.name)):
            begin, end = end, end + piece.nbytes
            entries[piece.name] = Entry(piece.dtype, piece.shape, begin, end)
        headers.append(build_header(entries, metadata, alignment=_HEADER_ALIGNMENT))
        for name, entry in entries.items():
            places[name] = Place(number, len(headers[-1]) + entry.begin)
    count = len(shards)
    files = tuple(f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))
    return Layout(
        files=files if count > 1 else (SINGLE_FILE,),
        headers=tuple(headers),
        places=places,
        tensor_bytes=sum(piece.nbytes for shard in shards for piece in shard),
    )


@dataclass(frozen=True, slots=True)
class Named:
    """A stored tensor and a name that it has in the checkpoint; tied ones have several."""

    name: str
    tensor: Tensor


def named_tensors(index: PackIndex) -> list[Named]:
    """Every tensor of the checkpoint; tied ones follow the one that is stored."""
    aliases: dict[str, list[str]] = {}
    for alias, stored in index.aliases.items():
        aliases.setdefault(stored, []).append(alias)
    return [
        Named(name, tensor)
        for layer in index.layers
        for tensor in layer.tensors
        for name in (tensor.source, *aliases.get(tensor.name, ()))
    ]
