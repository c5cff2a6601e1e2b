"""Codec `raw`: a matrix as bitmap, offsets and the packed bits of its non-zeros.

All work is done in pieces of a few MiB, so that a matrix of any size needs no large temporaries.
Source: FORMAT.md, section "raw".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts import runs
from tierd_layouts.errors import BadMatrix, GapNotZero, ValuesWrong, ZeroStored
from tierd_layouts.runs import RUN_ALIGNMENT
from tierd_layouts.tile_grid import (
    TILE,
    TILE_ELEMENTS,
    BitsArray,
    TileGrid,
    U32Array,
    U64Array,
    check_bitmap,
    check_nnz,
    kept_counts,
    make_bitmap,
)

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import BoolArray, CountArray

__all__ = [
    "RUN_ALIGNMENT",
    "TILE",
    "TILE_ELEMENTS",
    "BitsArray",
    "TileGrid",
    "U32Array",
    "U64Array",
    "decode",
    "encode",
    "validate",
]


def encode(matrix_bits: BitsArray) -> tuple[U64Array, U32Array, BitsArray]:
    """Returns (bitmap, offsets, values) of a matrix.

    matrix_bits: uint16 or uint32 [rows, cols], any strides: the elements' raw bits.
    bitmap: uint64[tiles * 64].   offsets: uint32[tiles + 1], in units of 16 bytes.
    values: like matrix_bits, 1-D; a multiple of 16 bytes.
    Raises BadMatrix: not 2-D, another dtype, or more than 64 GiB of values.
    """
    item_bytes = _check_matrix(matrix_bits)
    grid = TileGrid(*matrix_bits.shape)
    bitmap = make_bitmap(matrix_bits, grid)
    counts = kept_counts(bitmap, grid)
    offsets = runs.make_offsets(counts * item_bytes)
    per_unit = RUN_ALIGNMENT // item_bytes
    values = np.empty(int(offsets[-1]) * per_unit, matrix_bits.dtype)
    for piece in grid.pieces():
        tiles = piece.gather(matrix_bits).reshape(-1, TILE_ELEMENTS)
        padded, mask = _with_gaps(tiles, tiles != 0, counts[piece.tiles], per_unit)
        begin, end = int(offsets[piece.first]), int(offsets[piece.end])
        values[begin * per_unit : end * per_unit] = padded[mask]
    return bitmap, offsets, values


def decode(
    bitmap: U64Array, offsets: U32Array, values: BitsArray, rows: int, cols: int
) -> BitsArray:
    """Returns the raw bits of the matrix, [rows, cols]; elements without a bit are zero bits.

    Raises BitmapWrong, OffsetsWrong, ValuesWrong, BitsOutsideShape before it touches a value.
    """
    grid = TileGrid(rows, cols)
    counts = _check_structure(bitmap, offsets, values, grid)
    per_unit = RUN_ALIGNMENT // values.dtype.itemsize
    matrix = np.empty((rows, cols), values.dtype)
    for piece in grid.pieces():
        padded, mask = _with_gaps(
            np.zeros((piece.end - piece.first, TILE_ELEMENTS), values.dtype),
            piece.kept(bitmap),
            counts[piece.tiles],
            per_unit,
        )
        begin, end = int(offsets[piece.first]), int(offsets[piece.end])
        padded[mask] = values[begin * per_unit : end * per_unit]
        piece.scatter(padded[:, :TILE_ELEMENTS], matrix)
    return matrix


def validate(
    bitmap: U64Array, offsets: U32Array, values: BitsArray, rows: int, cols: int, nnz: int
) -> None:
    """Raises the TileError of the first rule of FORMAT.md that the arrays break.

    Arrays that pass are exactly those that `encode` gives for `decode`'s result, with `nnz` bits.
    """
    grid = TileGrid(rows, cols)
    counts = _check_structure(bitmap, offsets, values, grid)
    check_nnz(counts, nnz)
    per_unit = RUN_ALIGNMENT // values.dtype.itemsize
    for piece in grid.pieces():
        begin, end = int(offsets[piece.first]), int(offsets[piece.end])
        stored = values[begin * per_unit : end * per_unit]
        piece_counts = counts[piece.tiles]
        units = runs.units(piece_counts * values.dtype.itemsize)
        # Where each tile's values end and its gap begins, in elements of this piece.
        run_ends = np.cumsum(units) * per_unit
        gaps = units * per_unit - piece_counts
        in_gap = np.zeros(stored.size + 1, np.int8)
        np.add.at(in_gap, run_ends - gaps, 1)
        np.add.at(in_gap, run_ends, -1)
        is_gap = np.cumsum(in_gap[:-1], dtype=np.int8).astype(np.bool_)
        wrong = np.flatnonzero((stored == 0) != is_gap)
        if wrong.size:
            place = int(wrong[0])
            tile = piece.first + int(np.searchsorted(run_ends, place, side="right"))
            where = f"tile {tile} of {grid.tiles}, element {begin * per_unit + place} of values"
            if is_gap[place]:
                raise GapNotZero(f"{where}: {int(stored[place]):#x} in the gap after the run")
            raise ZeroStored(f"{where}: a bit is set for zero bits")


# --------------------------------------------------------------------------------------------------


def _check_matrix(matrix_bits: BitsArray) -> int:
    if matrix_bits.ndim != 2 or matrix_bits.dtype not in (np.uint16, np.uint32):
        raise BadMatrix(
            f"{matrix_bits.dtype} with {matrix_bits.ndim} dimensions, needs uint16 or uint32 with 2"
        )
    return matrix_bits.dtype.itemsize


def _check_structure(
    bitmap: U64Array, offsets: U32Array, values: BitsArray, grid: TileGrid
) -> CountArray:
    """Returns the popcount of every tile, once dtypes, lengths, offsets and edges agree."""
    if values.dtype not in (np.uint16, np.uint32) or values.ndim != 1:
        raise ValuesWrong(
            f"values are {values.dtype}{list(values.shape)}, needs uint16 or uint32 in 1 dimension"
        )
    check_bitmap(bitmap, grid)
    counts = kept_counts(bitmap, grid)
    runs.check_offsets_form(offsets, grid)
    runs.check_offsets(offsets, counts * values.dtype.itemsize, values.nbytes)
    return counts


def _with_gaps(
    tiles: BitsArray,
    mask: BoolArray,
    counts: CountArray,
    per_unit: int,
) -> tuple[Any, BoolArray]:
    """Returns tiles and mask, each row extended by zeros that the mask selects as the run's gap.

    So one boolean index moves all runs of a piece with their gaps, in either direction.
    """
    padded = np.zeros((len(tiles), TILE_ELEMENTS + per_unit - 1), tiles.dtype)
    padded[:, :TILE_ELEMENTS] = tiles
    selected = np.empty(padded.shape, np.bool_)
    selected[:, :TILE_ELEMENTS] = mask
    gaps = -counts % per_unit
    selected[:, TILE_ELEMENTS:] = np.arange(per_unit - 1) < gaps[:, None]
    return padded, selected
