"""What a pack of a checkpoint will hold, decided before the first byte is written.

Order of the layers: embeddings (not numbered, and `embed`, `wte` or `wpe` in the name), then
numbered layers, by path and number, then the rest with the head last. That is the order in which a
decoder uses them, so a cycle over the index is a cycle over the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE
from tierd_layouts.names import layer_of
from tierd_tools.sparsity import is_linear, is_numbered, is_router

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tierd_tools.checkpoint import Checkpoint, SourceTensor

#: a shard ends before the layer that would take it above this (in source bytes): what a stopped
#: run has to do again at most, and half of what the packer holds in memory
SHARD_BYTES = 512 << 20

_EMBEDDING = ("embed", "wte", "wpe")
_HEADS = frozenset(("lm_head", "embed_out", "output", "head", "score", "classifier"))
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be stored."""

    source: SourceTensor
    prune: bool
    raw: bool  #: stored as bitmap and values if that is smaller; otherwise, always dense


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A layer and its tensors, by name."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Layers in the order of the index, cut into shards."""

    shards: tuple[tuple[PlannedLayer, ...], ...]
    aliases: Mapping[str, str]  #: tensor that the checkpoint stores twice -> the stored one
    estimated_bytes: int

    @property
    def source_bytes(self) -> int:
        return sum(layer.source_bytes for shard in self.shards for layer in shard)

    @property
    def pruned(self) -> int:
        """How many tensors are to be pruned."""
        return sum(t.prune for shard in self.shards for layer in shard for t in layer.tensors)


def plan(checkpoint: Checkpoint, sparsity: float | None) -> PackPlan:
    """Reads the tensors that may be tied, and a sample of each matrix; nothing else."""
    aliases = _tied(checkpoint)
    layers = [
        PlannedLayer(name, tuple(_planned(tensor, sparsity) for tensor in tensors))
        for name, tensors in _layers(checkpoint.tensors.values(), aliases)
    ]
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    return PackPlan(
        shards=_shards(layers),
        aliases=aliases,
        estimated_bytes=sum(_estimate(tensor, sparsity or 0.0) for tensor in tensors),
    )


def may_be_raw(tensor: SourceTensor) -> bool:
    """Whether codec `raw` can hold the tensor and it is read through by a matmul."""
    return (
        len(tensor.shape) == 2
        and tensor.dtype in RAW_VALUES_DTYPE
        and is_numbered(layer_of(tensor.name))
    )


def is_prunable(tensor: SourceTensor) -> bool:
    """Whether pruning touches the tensor unasked: linear, in a numbered layer, no router."""
    return may_be_raw(tensor) and is_linear(tensor.name) and not is_router(tensor.name)


def _planned(tensor: SourceTensor, sparsity: float | None) -> PlannedTensor:
    prune = sparsity is not None and is_prunable(tensor)
    return PlannedTensor(tensor, prune, may_be_raw(tensor))


def _layers(
    tensors: Iterable[SourceTensor], aliases: Mapping[str, str]
) -> list[tuple[str, list[SourceTensor]]]:
    layers: dict[str, list[SourceTensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if tensor.name not in aliases:
            layers.setdefault(layer_of(tensor.name), []).append(tensor)
    return sorted(layers.items(), key=lambda item: _position(item[0]))


def _position(layer: str) -> tuple[int, str, int]:
    path, _, segment = layer.rpartition(".")
    if is_numbered(layer):
        return 1, path, int(segment)
    if segment in _HEADS:
        return 3, layer, 0
    if any(word in layer for word in _EMBEDDING):
        return 0, layer, 0
    return 2, layer, 0


def _tied(checkpoint: Checkpoint) -> dict[str, str]:
    """Matrices outside numbered layers that the checkpoint stores twice, byte for byte.

    Only those: two norms of ones are equal too, and nobody would want a layer that needs another.
    """
    alike: dict[tuple[str, tuple[int, ...]], list[SourceTensor]] = {}
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2 and tensor.nbytes and not is_numbered(layer_of(tensor.name)):
            alike.setdefault((tensor.dtype, tensor.shape), []).append(tensor)
    aliases: dict[str, str] = {}
    for tensors in alike.values():
        if len(tensors) == 1:
            continue
        stored: dict[bytes, str] = {}
        for tensor in sorted(tensors, key=lambda t: (_position(layer_of(t.name)), t.name)):
            content = xxhash.xxh3_128_digest(tensor.read().data)
            first = stored.setdefault(content, tensor.name)
            if first != tensor.name:
                aliases[tensor.name] = first
    return aliases


def _shards(layers: Sequence[PlannedLayer]) -> tuple[tuple[PlannedLayer, ...], ...]:
    shards: list[list[PlannedLayer]] = []
    room = -1
    for layer in layers:
        if not shards or layer.source_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(layer)
        room -= layer.source_bytes
    return tuple(tuple(shard) for shard in shards)


def _estimate(tensor: PlannedTensor, sparsity: float) -> int:
    """Bytes in the pack, from a sample of the matrix."""
    source = tensor.source
    if not tensor.raw or not source.elements:
        return source.nbytes
    sample = source.sample_bits(_SAMPLE_BYTES)
    zeros = 1.0 - int(np.count_nonzero(sample)) / sample.size
    if tensor.prune:
        zeros = max(zeros, sparsity)
    rows, cols = source.shape
    tiles = -(-rows // 64) * -(-cols // 64)
    kept = source.elements * (1.0 - zeros) * ITEM_BYTES[source.dtype]
    return min(source.nbytes, int(kept) + tiles * (512 + 8 + 4))
