"""Whether an index can be true: every rule of FORMAT.md that needs no shard to check.

A tensor that passes here can be handed to a kernel: its arrays lie inside its layer and have the
lengths that shape, dtype and codec demand. All arithmetic is on Python integers, which do not wrap.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from tierd_layouts.errors import (
    AliasInvalid,
    ArrayAcrossExtents,
    ArrayMisaligned,
    ArrayOutOfRange,
    ArraysOverlap,
    DuplicateName,
    ExtentMisaligned,
    ExtentOutOfRange,
    ExtentsOverlap,
    FieldInvalid,
    HashCountWrong,
    LayerSizeWrong,
)
from tierd_layouts.names import check_file_name, check_layer_name, check_tensor_name
from tierd_layouts.records import (
    ARRAY_ALIGNMENT,
    PAGE_BYTES,
    block_count,
    stored_name,
)
from tierd_layouts.tensor_rules import check_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tierd_layouts.records import Extent, Layer, Shard


def check_pack(
    shards: Sequence[Shard], layers: Sequence[Layer], aliases: Mapping[str, str], where: str
) -> None:
    """Raises the FormatError of the first rule that is broken."""
    for shard in shards:
        check_file_name(shard.file)
    _refuse_duplicates((shard.file for shard in shards), f"{where}: shard")
    for layer in layers:
        check_layer(layer, where)
    _refuse_duplicates((layer.name for layer in layers), f"{where}: layer")
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    _refuse_duplicates((tensor.name for tensor in tensors), f"{where}: tensor")
    _refuse_duplicates(
        (stored_name(tensor.name, array) for tensor in tensors for array in tensor.arrays),
        f"{where}: stored array",
    )
    _check_extents(shards, layers, where)
    _check_aliases(aliases, {tensor.name for tensor in tensors}, where)


def check_layer(layer: Layer, where: str) -> None:
    """Raises for anything wrong inside one layer; its extents' places need the shards."""
    check_layer_name(layer.name)
    where = f"{where}: layer {layer.name!r}"
    total = sum(extent.nbytes for extent in layer.extents)
    if layer.nbytes != total or not layer.extents:
        raise LayerSizeWrong(
            f"{where} has {layer.nbytes} bytes, its {len(layer.extents)} extents have {total}"
        )
    places: list[tuple[int, int, str]] = []
    for tensor in layer.tensors:
        check_tensor(tensor, where)
        for name, array in tensor.arrays.items():
            label = f"{where}: array {stored_name(tensor.name, name)!r}"
            end = array.offset + array.nbytes
            if array.offset % ARRAY_ALIGNMENT:
                raise ArrayMisaligned(
                    f"{label} starts at {array.offset}, not a multiple of {ARRAY_ALIGNMENT}"
                )
            if array.offset < 0 or array.nbytes < 0 or end > layer.nbytes:
                raise ArrayOutOfRange(
                    f"{label} is [{array.offset}, {end}), the layer [0, {layer.nbytes})"
                )
            if array.nbytes:
                places.append((array.offset, end, label))
    ends = list(accumulate(extent.nbytes for extent in layer.extents))
    for begin, end, label in places:
        boundary = ends[bisect_right(ends, begin)]
        if end > boundary:
            raise ArrayAcrossExtents(f"{label} is [{begin}, {end}), an extent ends at {boundary}")
    for left, right in pairwise(sorted(places)):
        if left[1] > right[0]:
            raise ArraysOverlap(f"{left[2]} ends at {left[1]}, {right[2]} starts at {right[0]}")


def _check_extents(shards: Sequence[Shard], layers: Sequence[Layer], where: str) -> None:
    places: list[tuple[int, int, int, str]] = []
    for layer in layers:
        for i, extent in enumerate(layer.extents):
            label = f"{where}: layer {layer.name!r}: extent {i}"
            _check_extent(extent, shards, label)
            places.append((extent.shard, extent.offset, extent.offset + extent.nbytes, label))
    for left, right in pairwise(sorted(places)):
        if left[0] == right[0] and left[2] > right[1]:
            raise ExtentsOverlap(f"{left[3]} ends at {left[2]}, {right[3]} starts at {right[1]}")


def _check_extent(extent: Extent, shards: Sequence[Shard], label: str) -> None:
    if extent.offset % PAGE_BYTES or extent.nbytes % PAGE_BYTES or extent.nbytes <= 0:
        raise ExtentMisaligned(
            f"{label}: {extent.nbytes} bytes at {extent.offset}, both must be multiples of "
            f"{PAGE_BYTES} and not empty"
        )
    if not 0 <= extent.shard < len(shards):
        raise ExtentOutOfRange(f"{label}: shard {extent.shard} of {len(shards)}")
    shard = shards[extent.shard]
    end = extent.offset + extent.nbytes
    if extent.offset < PAGE_BYTES or end > shard.nbytes:
        raise ExtentOutOfRange(
            f"{label}: [{extent.offset}, {end}) is not inside [{PAGE_BYTES}, {shard.nbytes}) of "
            f"{shard.file}"
        )
    needed = block_count(extent.nbytes)
    if len(extent.xxh3) != needed:
        raise HashCountWrong(
            f"{label}: {len(extent.xxh3)} hashes, {extent.nbytes} bytes need {needed}"
        )
    if not all(0 <= value < 1 << 64 for value in extent.xxh3):
        raise FieldInvalid(f"{label}: a hash is not in [0, 2^64)")


def _check_aliases(aliases: Mapping[str, str], tensors: set[str], where: str) -> None:
    for alias, target in aliases.items():
        check_tensor_name(alias)
        if alias in tensors:
            raise AliasInvalid(f"{where}: alias {alias!r} is also a stored tensor")
        if target not in tensors:
            raise AliasInvalid(
                f"{where}: alias {alias!r} points to {target!r}, which is not stored"
            )


def _refuse_duplicates(names: Iterable[str], label: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DuplicateName(f"{label} {name!r} appears twice")
        seen.add(name)
