"""What a pack of a checkpoint will hold, decided before the first byte is written.

Order of the layers: embeddings (not numbered, and `embed`, `wte` or `wpe` in the name), then
numbered layers, by path and number, then the rest with the head last. That is the order in which a
decoder uses them, so a cycle over the index is a cycle over the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from tierd_layouts.codecs import ARRAYS_OF_CODEC
from tierd_layouts.dtypes import RAW_VALUES_DTYPE
from tierd_layouts.names import check_layer_name, check_tensor_name, layer_of
from tierd_layouts.records import stored_name
from tierd_tools import pack_encode
from tierd_tools.errors import CheckpointError
from tierd_tools.prune import magnitude
from tierd_tools.sparsity import is_linear, is_numbered, is_router

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tierd_tools.checkpoint import Checkpoint, SourceTensor
    from tierd_tools.pack_settings import Settings

#: a shard ends before the layer that would take it above this (in source bytes)
SHARD_BYTES = 4 << 30

_EMBEDDING = ("embed", "wte", "wpe")
_HEADS = frozenset(("lm_head", "embed_out", "output", "head", "score", "classifier"))
_SAMPLE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be stored."""

    source: SourceTensor
    codec: str  #: of Settings, to be used where it is smaller than dense; or `dense`
    sparsity: float  #: 0.0: not pruned


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
    def prunable(self) -> int:
        """How many tensors pruning can touch, whatever their sparsity."""
        tensors = (t.source for shard in self.shards for layer in shard for t in layer.tensors)
        return sum(may_be_compressed(tensor) and is_linear(tensor.name) for tensor in tensors)


def plan(checkpoint: Checkpoint, settings: Settings) -> PackPlan:
    """Reads the tensors that may be tied, and a sample of each matrix; nothing else.

    Raises BadSetting for a pattern that matches nothing, NameRefused or CheckpointError for names
    that a pack cannot hold.
    """
    settings.sparsities.refuse_unmatched(checkpoint.tensors)
    aliases = _tied(checkpoint)
    layers = [
        PlannedLayer(name, tuple(_planned(tensor, settings) for tensor in tensors))
        for name, tensors in _layers(checkpoint.tensors.values(), aliases)
    ]
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    _refuse_names(layers)
    return PackPlan(
        shards=_shards(layers),
        aliases=aliases,
        estimated_bytes=sum(_estimate(tensor, settings.group) for tensor in tensors),
    )


def may_be_compressed(tensor: SourceTensor) -> bool:
    """Whether codecs of matrices can hold the tensor and it is read through by a matmul."""
    return (
        len(tensor.shape) == 2
        and tensor.dtype in RAW_VALUES_DTYPE
        and is_numbered(layer_of(tensor.name))
    )


def is_prunable(tensor: SourceTensor) -> bool:
    """Whether pruning touches the tensor unasked: linear, in a numbered layer, no router."""
    return may_be_compressed(tensor) and is_linear(tensor.name) and not is_router(tensor.name)


def _planned(tensor: SourceTensor, settings: Settings) -> PlannedTensor:
    if not may_be_compressed(tensor):
        return PlannedTensor(tensor, "dense", 0.0)
    codec = settings.codec
    if settings.lossy_codec:
        lossy = is_prunable(tensor) and not settings.sparsities.keeps(tensor.name)
        codec = codec if lossy else "lossless"
    return PlannedTensor(tensor, codec, settings.sparsities.of(tensor.name))


def _refuse_names(layers: Iterable[PlannedLayer]) -> None:
    """Names are refused here and not when the tensor is written, hours later."""
    tensors: dict[str, PlannedTensor] = {}
    for layer in layers:
        check_layer_name(layer.name)
        for tensor in layer.tensors:
            tensors[check_tensor_name(tensor.source.name)] = tensor
    every = {array for arrays in ARRAYS_OF_CODEC.values() for array in arrays} - {"data"}
    for name, tensor in tensors.items():
        for array in every if tensor.codec != "dense" else ():
            if stored_name(name, array) in tensors:
                raise CheckpointError(
                    f"tensor {stored_name(name, array)!r} has the name that a pack gives to a part "
                    f"of tensor {name!r}"
                )


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


def _estimate(tensor: PlannedTensor, group: int) -> int:
    """Bytes in the pack, from a sample that is pruned and encoded as if it were a matrix."""
    source = tensor.source
    if tensor.codec == "dense" or not source.elements:
        return source.nbytes
    sample = source.sample_bits(_SAMPLE_BYTES)
    bits = sample[: max(64, sample.size // 64 * 64)].reshape(-1, min(64, sample.size))
    if tensor.sparsity:
        bits = magnitude(bits, source.dtype, tensor.sparsity)
    forms = pack_encode.forms_of(tensor.codec)
    if not pack_encode.all_finite(bits, source.dtype):
        forms = pack_encode.LOSSLESS
    least = min(pack_encode.encode(bits, source.dtype, form, group).nbytes for form in forms)
    return min(source.nbytes, least * source.elements // bits.size)
