"""Runs of 8-byte words, one for each tile, of different lengths in one array.

Every tile's record starts on 16 bytes, and every part of a record on 8 bytes or, escapes, on 4.
So parts of a few hundred records are moved at once, between the array and rows of equal length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts.errors import BadMatrix, OffsetsWrong, ValuesWrong

if TYPE_CHECKING:
    import numpy.typing as npt

    from tierd_layouts.tile_grid import BoolArray, CountArray, TileGrid, U8Array, U32Array

RUN_ALIGNMENT = 16  #: every tile's run of values starts on it, and offsets count in it
MAX_RUN_UNITS = (1 << 32) - 1  #: offsets are uint32


def places(starts: CountArray, lengths: CountArray) -> CountArray:
    """Returns the positions `[start, start + length)` of all runs, one run after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    shift = np.repeat(starts - (ends - lengths), lengths)
    positions: CountArray = shift + np.arange(total)
    return positions


def firsts(lengths: CountArray, width: int) -> BoolArray:
    """Returns booleans [runs, width] of which the first `length` of each row are true."""
    mask: BoolArray = np.arange(width) < lengths[:, None]
    return mask


def take(
    items: npt.NDArray[Any], starts: CountArray, lengths: CountArray, width: int
) -> npt.NDArray[Any]:
    """Returns the runs as rows, [runs, width], filled up with zeros."""
    rows = np.zeros((len(lengths), width), items.dtype)
    rows[firsts(lengths, width)] = items[places(starts, lengths)]
    return rows


def put(
    items: npt.NDArray[Any], starts: CountArray, lengths: CountArray, rows: npt.NDArray[Any]
) -> None:
    """Writes the first `length` of each row to its run."""
    items[places(starts, lengths)] = rows[firsts(lengths, rows.shape[1])]


def units(record_bytes: CountArray) -> CountArray:
    """Returns how many units of 16 bytes each record takes."""
    return (record_bytes + (RUN_ALIGNMENT - 1)) // RUN_ALIGNMENT


def values_bytes(total_units: int) -> int:
    """Returns the bytes of so many units. Raises BadMatrix: more than the offsets can address."""
    nbytes = total_units * RUN_ALIGNMENT
    if total_units > MAX_RUN_UNITS:
        raise BadMatrix(
            f"{nbytes} bytes of values, offsets address {MAX_RUN_UNITS * RUN_ALIGNMENT}: split the "
            "matrix"
        )
    return nbytes


def make_offsets(record_bytes: CountArray) -> U32Array:
    """Returns uint32[records + 1]. Raises BadMatrix: more bytes than the offsets can address."""
    ends = np.cumsum(units(record_bytes))
    values_bytes(int(ends[-1]) if ends.size else 0)
    offsets = np.zeros(len(record_bytes) + 1, np.uint32)
    offsets[1:] = ends
    return offsets


def check_values(values: U8Array) -> None:
    """Raises ValuesWrong unless these are bytes that can be taken as whole words."""
    if values.dtype != np.uint8 or values.ndim != 1 or not values.flags.c_contiguous:
        raise ValuesWrong(
            f"values are {values.dtype}{list(values.shape)}, needs contiguous uint8 in 1 dimension"
        )


def check_offsets_form(offsets: U32Array, grid: TileGrid) -> None:
    """Raises OffsetsWrong for another dtype, another length, or a start that is not 0."""
    if offsets.dtype != np.uint32 or offsets.shape != (grid.offset_count,):
        raise OffsetsWrong(
            f"offsets are {offsets.dtype}{list(offsets.shape)}, [{grid.rows}, {grid.cols}] needs "
            f"uint32[{grid.offset_count}]"
        )
    if offsets[0] != 0:
        raise OffsetsWrong(f"offsets begin with {int(offsets[0])}, needs 0")


def check_offsets(offsets: U32Array, record_bytes: CountArray, values_bytes: int) -> None:
    """Raises OffsetsWrong, ValuesWrong unless every record has its exact place, and all fit.

    record_bytes: int64, of every tile, as bitmap, shape and heads demand.
    """
    found = np.diff(offsets.astype(np.int64))
    needed = units(record_bytes)
    wrong = np.flatnonzero(found != needed)
    if wrong.size:
        tile = int(wrong[0])
        raise OffsetsWrong(
            f"tile {tile} of {len(needed)}: offsets hold {int(found[tile])} units of "
            f"{RUN_ALIGNMENT} bytes, its {int(record_bytes[tile])} bytes need {int(needed[tile])}"
        )
    expected_bytes = int(offsets[-1]) * RUN_ALIGNMENT
    if values_bytes != expected_bytes:
        raise ValuesWrong(f"values have {values_bytes} bytes, offsets end at {expected_bytes}")
