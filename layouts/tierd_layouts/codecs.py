"""The codecs by name: which arrays each one stores, in which order, and how large they can be."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE
from tierd_layouts.tile_grid import TILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tierd_layouts.tile_grid import TileGrid

#: In stored order. A matrix codec but `raw` may come without `bitmap`: dense form.
ARRAYS_OF_CODEC: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dense": ("data",),
        "raw": ("bitmap", "offsets", "values"),
        "exponent-packed": ("bitmap", "offsets", "heads", "values"),
        "int8": ("bitmap", "offsets", "scales", "values"),
        "int4": ("bitmap", "offsets", "scales", "values"),
    }
)
ALWAYS_MASKED = frozenset({"raw"})
#: The largest |q| of the codecs that store small integers times a scale for each group.
LEVEL_LIMITS: Mapping[str, int] = MappingProxyType({"int8": 127, "int4": 7})

_DTYPE_OF_ARRAY = {"bitmap": "U64", "offsets": "U32", "heads": "U32", "scales": "U16"}


class Range(NamedTuple):
    """Bytes, both ends included."""

    fewest: int
    most: int


def array_names(codec: str, *, masked: bool) -> tuple[str, ...]:
    """Returns the arrays of a codec that is known, in stored order."""
    names = ARRAYS_OF_CODEC[codec]
    return names if masked or codec in ALWAYS_MASKED else tuple(n for n in names if n != "bitmap")


def stored_dtype(codec: str, dtype: str, array_name: str) -> str:
    """Returns the dtype of an array of a `dtype` weight; `data` has the weight's own."""
    if array_name == "data":
        return dtype
    if array_name == "values":
        return RAW_VALUES_DTYPE[dtype] if codec == "raw" else "U8"
    return _DTYPE_OF_ARRAY[array_name]


def fixed_bytes(codec: str, grid: TileGrid, *, masked: bool, group: int = 0) -> dict[str, int]:
    """Returns the bytes of each array of a matrix but `values`: shape and group decide them."""
    entries = {
        "bitmap": grid.bitmap_words,
        "offsets": grid.offset_count,
        "heads": grid.tiles,
        "scales": grid.scale_count(group) if group else 0,
    }
    return {
        name: entries[name] * ITEM_BYTES[_DTYPE_OF_ARRAY[name]]
        for name in array_names(codec, masked=masked)
        if name != "values"
    }


def values_range(codec: str, dtype: str, grid: TileGrid, nnz: int, *, masked: bool) -> Range:
    """Returns the fewest and the most bytes that `values` can have, as far as the index tells.

    Dense form: the tiles' sizes are known. Masked: `nnz` elements may lie in any tiles.
    """
    if not masked:
        return _dense_form_range(codec, dtype, grid)
    item_bytes = ITEM_BYTES[dtype]
    used = min(nnz, grid.tiles)  # tiles that may have a record, and so a gap after it
    match codec:
        case "raw":
            return Range(nnz * item_bytes, nnz * item_bytes + used * (16 - item_bytes))
        case "int8":
            return Range(nnz, nnz + used * 15)
        case "int4":
            return Range(-(-nnz // 2), (nnz + used * 31) // 2)
        case _:
            low = item_bytes - 1  # byte planes; then at most 8 bit planes, and escapes of 4 bytes
            return Range(low * nnz, (low + 5) * nnz + used * (5 * low + 73))


def _dense_form_range(codec: str, dtype: str, grid: TileGrid) -> Range:
    """Whole tiles, tiles of the right and of the lower edge, and the corner."""
    tall, rest_rows = divmod(grid.rows, TILE)
    wide, rest_cols = divmod(grid.cols, TILE)
    low = ITEM_BYTES[dtype] - 1
    fewest = most = 0
    for kept, tiles in (
        (TILE * TILE, tall * wide),
        (TILE * rest_cols, tall),
        (rest_rows * TILE, wide),
        (rest_rows * rest_cols, 1),
    ):
        match codec:
            case "int8":
                record = (kept, kept)
            case "int4":
                record = (-(-kept // 2), -(-kept // 2))
            case _:
                planes = low * 8 * -(-kept // 8)
                record = (planes, planes + 64 * -(-kept // 64) + 4 * kept)
        fewest += tiles * 16 * -(-record[0] // 16)
        most += tiles * 16 * -(-record[1] // 16)
    return Range(fewest, most)
