"""Layers out of a pack: bytes with the promised hashes, and the arrays and weights in them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tierd_layouts.codecs import stored_dtype
from tierd_layouts.dtypes import ITEM_BYTES, UNSIGNED
from tierd_layouts.errors import (
    ChecksumMismatch,
    PaddingNotZero,
    ShardTruncated,
    TileError,
    UnknownCodec,
)
from tierd_layouts.pack_reader import Folder, open_shard, pack_folder
from tierd_layouts.packed_matrix import PackedMatrix, decode, validate
from tierd_layouts.records import BLOCK_BYTES, Array

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_layouts.index import PackIndex
    from tierd_layouts.records import Extent, Layer, Tensor

_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB - 4 KiB at once


def read_layer(
    pack_dir_fd: Folder, index: PackIndex, layer: Layer, *, where: str = "pack"
) -> bytes:
    """Returns the layer's bytes, verified. Raises ChecksumMismatch and what `open_shard` raises."""
    pieces: list[bytes] = []
    with pack_folder(pack_dir_fd) as folder:
        for extent in layer.extents:
            fd = open_shard(folder, index.shards[extent.shard], where=where)
            try:
                begin = extent.offset
                end = extent.offset + extent.nbytes
                while begin < end:
                    piece = os.pread(fd, min(end - begin, _READ_BYTES), begin)
                    if not piece:
                        raise ShardTruncated(_truncated(where, index, extent, begin))
                    pieces.append(piece)
                    begin += len(piece)
            finally:
                os.close(fd)
    content = b"".join(pieces)  # one piece is not copied
    check_layer_bytes(content, index, layer, where=where)
    return content


def check_layer_bytes(
    content: bytes | memoryview, index: PackIndex, layer: Layer, *, where: str = "pack"
) -> None:
    """Raises ChecksumMismatch unless `content`, the layer's bytes, has the promised hashes."""
    begin = 0
    with memoryview(content) as view:
        for extent in layer.extents:
            part = view[begin : begin + extent.nbytes]
            for number in range(len(extent.xxh3)):
                block = part[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
                found = xxhash.xxh3_64_intdigest(block)
                _check_block(where, index, layer, extent, number, found)
            begin += extent.nbytes


def verify_layer(
    pack_dir_fd: Folder,
    index: PackIndex,
    layer: Layer,
    *,
    where: str = "pack",
    on_block: Callable[[int], object] | None = None,
) -> None:
    """Reads a layer block by block and checks every hash, in 4 MiB of memory.

    on_block: called with the bytes of each block that was right. Raises like `read_layer`.
    """
    buffer = bytearray(BLOCK_BYTES)
    with pack_folder(pack_dir_fd) as folder, memoryview(buffer) as view:
        for extent in layer.extents:
            fd = open_shard(folder, index.shards[extent.shard], where=where)
            try:
                for number in range(len(extent.xxh3)):
                    begin = number * BLOCK_BYTES
                    nbytes = min(BLOCK_BYTES, extent.nbytes - begin)
                    filled = 0
                    while filled < nbytes:
                        position = extent.offset + begin + filled
                        count = os.preadv(fd, [view[filled:nbytes]], position)
                        if not count:
                            raise ShardTruncated(_truncated(where, index, extent, position))
                        filled += count
                    found = xxhash.xxh3_64_intdigest(view[:nbytes])
                    _check_block(where, index, layer, extent, number, found)
                    if on_block is not None:
                        on_block(nbytes)
            finally:
                os.close(fd)


def layer_array(layer_bytes: bytes | memoryview, array: Array, dtype: Any) -> np.ndarray[Any, Any]:
    """Returns a stored array as a 1-D view of the layer's bytes; `dtype` is numpy's."""
    item_bytes = np.dtype(dtype).itemsize
    return np.frombuffer(layer_bytes, dtype, count=array.nbytes // item_bytes, offset=array.offset)


def tensor_bits(layer_bytes: bytes | memoryview, tensor: Tensor) -> np.ndarray[Any, Any]:
    """Returns a whole weight as unsigned integers of its element size, in its shape.

    Dense tensors are views of `layer_bytes`, others are decoded. Raises TileError.
    """
    item = UNSIGNED[ITEM_BYTES[tensor.dtype]]
    if tensor.codec == "dense":
        return layer_array(layer_bytes, tensor.arrays["data"], item).reshape(tensor.shape)
    return decode(packed_matrix(layer_bytes, tensor))


def packed_matrix(layer_bytes: bytes | memoryview, tensor: Tensor) -> PackedMatrix:
    """Returns a matrix that is not dense, its arrays as views of the layer's bytes; unchecked.

    Raises UnknownCodec for a dense tensor.
    """
    if tensor.codec == "dense":
        raise UnknownCodec(f"tensor {tensor.name!r} has codec dense, which has no packed form")
    rows, cols = tensor.shape
    arrays = {
        name: layer_array(
            layer_bytes, array, UNSIGNED[ITEM_BYTES[stored_dtype(tensor.codec, tensor.dtype, name)]]
        )
        for name, array in tensor.arrays.items()
    }
    return PackedMatrix(
        codec=tensor.codec,
        dtype=tensor.dtype,
        rows=rows,
        cols=cols,
        bitmap=arrays.get("bitmap"),
        offsets=arrays["offsets"],
        values=arrays["values"],
        heads=arrays.get("heads"),
        scales=arrays.get("scales"),
        group=tensor.group or 0,
    )


def validate_layer(layer_bytes: bytes | memoryview, layer: Layer) -> None:
    """Raises PaddingNotZero, or the TileError of the first rule that a packed tensor breaks.

    A right checksum says that the bytes are those that were written; this says they are weights.
    """
    _check_padding(layer_bytes, layer)
    for tensor in layer.tensors:
        if tensor.codec == "dense":
            continue
        try:
            validate(packed_matrix(layer_bytes, tensor), tensor.nnz)
        except TileError as error:
            text = f"layer {layer.name!r}: tensor {tensor.name!r}: {error}"
            raise type(error)(text) from error


# --------------------------------------------------------------------------------------------------


def _check_padding(layer_bytes: bytes | memoryview, layer: Layer) -> None:
    content = np.frombuffer(layer_bytes, np.uint8)
    arrays = [array for tensor in layer.tensors for array in tensor.arrays.values()]
    begin = 0
    for array in [*sorted(arrays, key=lambda array: array.offset), Array(layer.nbytes, 0)]:
        wrong = np.flatnonzero(content[begin : array.offset])
        if wrong.size:
            place = begin + int(wrong[0])
            raise PaddingNotZero(
                f"layer {layer.name!r}: byte {place} belongs to no array and is "
                f"{int(content[place]):#x}, not 0"
            )
        begin = max(begin, array.offset + array.nbytes)


def _check_block(
    where: str, index: PackIndex, layer: Layer, extent: Extent, number: int, found: int
) -> None:
    if found != extent.xxh3[number]:
        raise ChecksumMismatch(
            f"{where}: layer {layer.name!r}: block {number} of {len(extent.xxh3)}, at "
            f"{extent.offset + number * BLOCK_BYTES} of {index.shards[extent.shard].file}: xxh3 is "
            f"{found:016x}, the index says {extent.xxh3[number]:016x}"
        )


def _truncated(where: str, index: PackIndex, extent: Extent, position: int) -> str:
    end = extent.offset + extent.nbytes
    return f"{where}/{index.shards[extent.shard].file}: ends at {position}, its extent at {end}"
