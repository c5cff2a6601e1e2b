"""Whether one tensor of an index can be true: codec, dtype, shape, and the lengths of its arrays.

A tensor that passes has arrays of the lengths that shape, dtype and codec demand; what is in them
the codecs' `validate` judges. All arithmetic is on Python integers, which do not wrap.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from tierd_layouts.codecs import (
    ARRAYS_OF_CODEC,
    LEVEL_LIMITS,
    array_names,
    fixed_bytes,
    values_range,
)
from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE
from tierd_layouts.errors import (
    ArrayBytesWrong,
    ArraySetWrong,
    BadGroup,
    BadShape,
    BadTile,
    NnzWrong,
    SliceRefused,
    UnknownCodec,
    UnknownOrder,
    UnknownTensorDtype,
)
from tierd_layouts.excerpt import excerpt
from tierd_layouts.names import check_tensor_name
from tierd_layouts.runs import RUN_ALIGNMENT
from tierd_layouts.tile_grid import MAX_ELEMENTS, TILE, TileGrid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd_layouts.records import Tensor

MAX_DIMENSIONS = 64  #: numpy's limit
MAX_TENSOR_BYTES = (1 << 63) - 1  #: kernels count in signed 64-bit numbers
ORDERS = ("row-major",)


def check_tensor(tensor: Tensor, where: str) -> None:
    """Raises for anything wrong with one tensor, its arrays' places excepted."""
    check_tensor_name(tensor.name)
    where = f"{where}: tensor {tensor.name!r}"
    check_tensor_name(tensor.source)
    if tensor.codec not in ARRAYS_OF_CODEC:
        raise UnknownCodec(
            f"{where}: codec {excerpt(tensor.codec)}, known are {_list(ARRAYS_OF_CODEC)}"
        )
    if tensor.order not in ORDERS:
        raise UnknownOrder(f"{where}: order {excerpt(tensor.order)}, known are {_list(ORDERS)}")
    known = ITEM_BYTES if tensor.codec == "dense" else RAW_VALUES_DTYPE
    if tensor.dtype not in known:
        raise UnknownTensorDtype(
            f"{where}: dtype {excerpt(tensor.dtype)}, codec {tensor.codec} knows {_list(known)}"
        )
    if tensor.slice is not None:
        raise SliceRefused(f"{where}: slice {excerpt(tensor.slice)}, version 1 has none")
    if len(tensor.shape) > MAX_DIMENSIONS:
        raise BadShape(f"{where}: {len(tensor.shape)} dimensions, the limit is {MAX_DIMENSIONS}")
    # Zero-sized tensors too: 0 x 2^62 has no bytes, but its tile count would not fit anywhere.
    extent = prod(max(size, 1) for size in tensor.shape)
    most = MAX_TENSOR_BYTES // ITEM_BYTES[tensor.dtype] if tensor.codec == "dense" else MAX_ELEMENTS
    if min(tensor.shape, default=0) < 0 or extent > most:
        raise BadShape(
            f"{where}: shape {excerpt(list(tensor.shape))} has a dimension below 0 or is too large"
        )
    masked = "bitmap" in tensor.arrays
    expected = array_names(tensor.codec, masked=masked)
    if sorted(tensor.arrays) != sorted(expected):
        raise ArraySetWrong(
            f"{where}: arrays {_list(tensor.arrays)}, codec {tensor.codec} has {_list(expected)}"
        )
    _check_group(tensor, where)
    if tensor.codec == "dense":
        _check_dense(tensor, where)
    else:
        _check_matrix(tensor, where, masked=masked)


def _check_group(tensor: Tensor, where: str) -> None:
    group = tensor.group
    if tensor.codec not in LEVEL_LIMITS:
        if group is not None:
            raise BadGroup(f"{where}: group {group}, codec {tensor.codec} has none")
    elif group is None or group <= 0 or group % TILE:
        raise BadGroup(f"{where}: group {group}, needs a positive multiple of {TILE} columns")


def _check_dense(tensor: Tensor, where: str) -> None:
    if tensor.tile is not None:
        raise BadTile(f"{where}: tile {list(tensor.tile)}, codec dense has none")
    if tensor.nnz != prod(tensor.shape):
        raise NnzWrong(f"{where}: nnz {tensor.nnz}, dense stores all {prod(tensor.shape)} elements")
    _check_bytes(tensor, "data", tensor.dense_bytes, where)


def _check_matrix(tensor: Tensor, where: str, *, masked: bool) -> None:
    codec = tensor.codec
    if tensor.tile != (TILE, TILE):
        raise BadTile(f"{where}: tile {tensor.tile}, codec {codec} has ({TILE}, {TILE})")
    if len(tensor.shape) != 2:
        raise BadShape(
            f"{where}: shape {excerpt(list(tensor.shape))}, codec {codec} needs 2 dimensions"
        )
    elements = prod(tensor.shape)
    if tensor.nnz > elements or (tensor.nnz != elements and not masked):
        kept = "at most" if masked else "without a bitmap all"
        raise NnzWrong(f"{where}: nnz {tensor.nnz}, {kept} {elements} elements are stored")
    grid = TileGrid(*tensor.shape)
    lengths = fixed_bytes(codec, grid, masked=masked, group=tensor.group or 0)
    for name, needed in lengths.items():
        _check_bytes(tensor, name, needed, where)
    nbytes = tensor.arrays["values"].nbytes
    fewest, most = values_range(codec, tensor.dtype, grid, tensor.nnz, masked=masked)
    if nbytes % RUN_ALIGNMENT or not fewest <= nbytes <= most:
        raise ArrayBytesWrong(
            f"{where}: values have {nbytes} bytes, {tensor.nnz} elements in {grid.tiles} tiles of "
            f"codec {codec} need a multiple of {RUN_ALIGNMENT} in [{fewest}, {most}]"
        )


def _check_bytes(tensor: Tensor, array: str, needed: int, where: str) -> None:
    found = tensor.arrays[array].nbytes
    if found != needed:
        raise ArrayBytesWrong(
            f"{where}: array {array!r} has {found} bytes, shape {excerpt(list(tensor.shape))} of "
            f"{tensor.dtype} needs {needed}"
        )


def _list(names: Iterable[str]) -> str:
    return ", ".join(excerpt(name) for name in names)
