"""The index of a pack, tierd.json: which layers there are, where, and how they are stored."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

from tierd_layouts import index_json, index_rules
from tierd_layouts.errors import LayerNotFound, TensorNotFound, UnsupportedVersion
from tierd_layouts.records import (
    ARRAY_ALIGNMENT,
    BLOCK_BYTES,
    FORMAT_NAME,
    FORMAT_VERSION,
    INDEX_FILE,
    PAGE_BYTES,
    Array,
    Extent,
    Layer,
    Shard,
    Tensor,
    block_count,
    stored_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ARRAY_ALIGNMENT",
    "BLOCK_BYTES",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "PAGE_BYTES",
    "Array",
    "Extent",
    "Layer",
    "PackIndex",
    "Shard",
    "Tensor",
    "block_count",
    "stored_name",
]


@dataclass(frozen=True, slots=True)
class PackIndex:
    """One pack. Every instance obeys FORMAT.md: the constructor checks, so nothing else has to.

    layers: in the order of the model: embedding, numbered layers, norm, head.
    aliases: tensor name -> stored tensor with equal bytes; a checkpoint may hold a weight twice.
    metadata: the source checkpoint's `__metadata__`.
    Raises a FormatError subclass, which names the first thing that is wrong.
    """

    version: int
    tool: str
    source_digest: str
    shards: tuple[Shard, ...]
    layers: tuple[Layer, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    where: InitVar[str] = INDEX_FILE  #: how errors name the pack
    _digest: str = field(default="", init=False, repr=False, compare=False)
    _layers: dict[str, Layer] = field(default_factory=dict, init=False, repr=False, compare=False)
    _tensors: dict[str, tuple[Layer, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self, where: str) -> None:
        if self.version != FORMAT_VERSION:
            raise UnsupportedVersion(f"format version {self.version}, known is {FORMAT_VERSION}")
        index_rules.check_pack(self.shards, self.layers, self.aliases, where)
        for layer in self.layers:
            self._layers[layer.name] = layer
            for tensor in layer.tensors:
                self._tensors[tensor.name] = (layer, tensor)

    @classmethod
    def parse(cls, text: bytes, *, where: str) -> PackIndex:
        """Returns the index in `text`, the content of tierd.json.

        where: how errors name the pack. Raises a FormatError subclass, and nothing else.
        """
        members, digest = index_json.load(text, where)
        shards = tuple(
            index_json.read_shard(item, f"{where}: shards[{i}]")
            for i, item in enumerate(members.items("shards"))
        )
        layers = tuple(
            index_json.read_layer(item, f"{where}: layers[{i}]")
            for i, item in enumerate(members.items("layers"))
        )
        tool = members.text("tool")
        source_digest = members.text("source_digest")
        aliases = members.texts("aliases")
        metadata = members.texts("metadata")
        members.finish()
        index = cls(
            version=FORMAT_VERSION,
            tool=tool,
            source_digest=source_digest,
            shards=shards,
            layers=layers,
            aliases=aliases,
            metadata=metadata,
            where=where,
        )
        object.__setattr__(index, "_digest", digest)
        return index

    def to_json(self) -> bytes:
        """Returns the content of tierd.json; `parse` gives back an equal index."""
        text, digest = index_json.dump(self._body())
        object.__setattr__(self, "_digest", digest)
        return text

    def _body(self) -> dict[str, Any]:
        return {
            "tool": self.tool,
            "source_digest": self.source_digest,
            "metadata": dict(self.metadata),
            "aliases": dict(self.aliases),
            "shards": [index_json.write_shard(shard) for shard in self.shards],
            "layers": [index_json.write_layer(layer) for layer in self.layers],
        }

    @property
    def digest(self) -> str:
        """16 hex digits that name this exact pack: they cover the hash of every stored byte."""
        if not self._digest:
            self.to_json()
        return self._digest

    @property
    def pack_bytes(self) -> int:
        """Bytes of all layers, which is what one pass over the model reads."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all stored weights uncompressed; aliases count once."""
        return sum(layer.dense_bytes for layer in self.layers)

    def layer(self, name: str) -> Layer:
        """Returns a layer. Raises LayerNotFound."""
        if name not in self._layers:
            raise LayerNotFound(f"the pack has no layer {name!r}; it has {len(self.layers)}")
        return self._layers[name]

    def tensor(self, name: str) -> tuple[Layer, Tensor]:
        """Returns a tensor and its layer, following an alias. Raises TensorNotFound."""
        stored = self.aliases.get(name, name)
        if stored not in self._tensors:
            raise TensorNotFound(f"the pack has no tensor {name!r}; it has {len(self._tensors)}")
        return self._tensors[stored]
