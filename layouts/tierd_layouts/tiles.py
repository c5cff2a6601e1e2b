"""The tile layout: a matrix as bitmap, offsets and packed non-zeros. This is the specification.

A matrix is cut into 64 x 64 tiles in row-major order. Every kernel is tested against `decode`.
All work is done in pieces of a few MiB, so that a matrix of any size needs no large temporaries.
Source: FORMAT.md, section "Tile layout".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tierd_layouts.errors import (
    BadMatrix,
    BitmapWrong,
    BitsOutsideShape,
    GapNotZero,
    OffsetsWrong,
    ValuesWrong,
    ZeroStored,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

TILE = 64
TILE_ELEMENTS = TILE * TILE
RUN_ALIGNMENT = 16  #: every tile's run of values starts on it, and offsets count in it
MAX_RUN_UNITS = (1 << 32) - 1  #: offsets are uint32
#: 512 tiles are 4 MiB of 16-bit elements: temporaries stay near the processor's caches.
_PIECE_TILES = 512

U16Array = npt.NDArray[np.uint16]
U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
BitsArray = U16Array | U32Array


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of a matrix `[rows, cols]`."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 0 or self.cols < 0:
            raise BadMatrix(f"shape [{self.rows}, {self.cols}] has a dimension below 0")

    @property
    def tile_rows(self) -> int:
        return -(-self.rows // TILE)

    @property
    def tile_cols(self) -> int:
        return -(-self.cols // TILE)

    @property
    def tiles(self) -> int:
        return self.tile_rows * self.tile_cols

    @property
    def bitmap_words(self) -> int:
        """uint64 words: one for each row of each tile."""
        return self.tiles * TILE

    @property
    def offset_count(self) -> int:
        """uint32 offsets: one for each tile, and the end."""
        return self.tiles + 1


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tiles `[first, end)`: whole tile rows, or a part of one, so that they are consecutive."""

    first: int
    end: int
    rows: slice
    cols: slice
    tile_rows: int
    tile_cols: int


def encode(matrix_bits: BitsArray) -> tuple[U64Array, U32Array, BitsArray]:
    """Returns (bitmap, offsets, values) of a matrix.

    matrix_bits: uint16 or uint32 [rows, cols], any strides: the elements' raw bits.
    bitmap: uint64[tiles * 64].   offsets: uint32[tiles + 1], in units of 16 bytes.
    values: like matrix_bits, 1-D; a multiple of 16 bytes.
    Raises BadMatrix: not 2-D, another dtype, or more than 64 GiB of values.
    """
    item_bytes = _check_matrix(matrix_bits)
    grid = TileGrid(*matrix_bits.shape)
    bitmap = np.empty(grid.bitmap_words, np.uint64)
    for piece in _pieces(grid):
        mask = _gather(matrix_bits, piece) != 0
        packed = np.packbits(mask, axis=-1, bitorder="little")
        bitmap[piece.first * TILE : piece.end * TILE] = packed.reshape(-1).view("<u8")
    counts = _popcounts(bitmap)
    units = _run_units(counts, item_bytes)
    ends = np.cumsum(units)
    if ends.size and int(ends[-1]) > MAX_RUN_UNITS:
        raise BadMatrix(
            f"{int(ends[-1]) * RUN_ALIGNMENT} bytes of values, offsets address "
            f"{MAX_RUN_UNITS * RUN_ALIGNMENT}: split the matrix"
        )
    offsets = np.zeros(grid.offset_count, np.uint32)
    offsets[1:] = ends
    per_unit = RUN_ALIGNMENT // item_bytes
    values = np.empty(int(offsets[-1]) * per_unit, matrix_bits.dtype)
    for piece in _pieces(grid):
        tiles = _gather(matrix_bits, piece).reshape(-1, TILE_ELEMENTS)
        padded, mask = _with_gaps(tiles, tiles != 0, counts[piece.first : piece.end], per_unit)
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
    for piece in _pieces(grid):
        words = np.ascontiguousarray(bitmap[piece.first * TILE : piece.end * TILE], dtype="<u8")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)
        padded, mask = _with_gaps(
            np.zeros((piece.end - piece.first, TILE_ELEMENTS), values.dtype),
            bits.reshape(-1, TILE_ELEMENTS),
            counts[piece.first : piece.end],
            per_unit,
        )
        begin, end = int(offsets[piece.first]), int(offsets[piece.end])
        padded[mask] = values[begin * per_unit : end * per_unit]
        band = (
            padded[:, :TILE_ELEMENTS]
            .reshape(piece.tile_rows, piece.tile_cols, TILE, TILE)
            .transpose(0, 2, 1, 3)
            .reshape(piece.tile_rows * TILE, piece.tile_cols * TILE)
        )
        target = matrix[piece.rows, piece.cols]
        target[...] = band[: target.shape[0], : target.shape[1]]
    return matrix


def validate(
    bitmap: U64Array, offsets: U32Array, values: BitsArray, rows: int, cols: int, nnz: int
) -> None:
    """Raises the TileError of the first rule of FORMAT.md that the arrays break.

    Arrays that pass are exactly those that `encode` gives for `decode`'s result, with `nnz` bits.
    """
    grid = TileGrid(rows, cols)
    counts = _check_structure(bitmap, offsets, values, grid)
    total = int(counts.sum())
    if total != nnz:
        raise BitmapWrong(f"bitmap has {total} bits set, nnz is {nnz}")
    per_unit = RUN_ALIGNMENT // values.dtype.itemsize
    for piece in _pieces(grid):
        begin, end = int(offsets[piece.first]), int(offsets[piece.end])
        runs = values[begin * per_unit : end * per_unit]
        piece_counts = counts[piece.first : piece.end]
        units = _run_units(piece_counts, values.dtype.itemsize)
        # Where each tile's values end and its gap begins, in elements of this piece.
        run_ends = np.cumsum(units) * per_unit
        gaps = units * per_unit - piece_counts
        in_gap = np.zeros(runs.size + 1, np.int8)
        np.add.at(in_gap, run_ends - gaps, 1)
        np.add.at(in_gap, run_ends, -1)
        is_gap = np.cumsum(in_gap[:-1], dtype=np.int8).astype(np.bool_)
        wrong = np.flatnonzero((runs == 0) != is_gap)
        if wrong.size:
            place = int(wrong[0])
            tile = piece.first + int(np.searchsorted(run_ends, place, side="right"))
            where = f"tile {tile} of {grid.tiles}, element {begin * per_unit + place} of values"
            if is_gap[place]:
                raise GapNotZero(f"{where}: {int(runs[place]):#x} in the gap after the run")
            raise ZeroStored(f"{where}: a bit is set for zero bits")


def max_values_bytes(nnz: int, item_bytes: int, grid: TileGrid) -> int:
    """Returns the most bytes that `nnz` values of `item_bytes` can take in a matrix."""
    return nnz * item_bytes + min(nnz, grid.tiles) * (RUN_ALIGNMENT - item_bytes)


# --------------------------------------------------------------------------------------------------


def _check_matrix(matrix_bits: BitsArray) -> int:
    if matrix_bits.ndim != 2 or matrix_bits.dtype not in (np.uint16, np.uint32):
        raise BadMatrix(
            f"{matrix_bits.dtype} with {matrix_bits.ndim} dimensions, needs uint16 or uint32 with 2"
        )
    return matrix_bits.dtype.itemsize


def _check_structure(
    bitmap: U64Array, offsets: U32Array, values: BitsArray, grid: TileGrid
) -> npt.NDArray[np.int64]:
    """Returns the popcount of every tile, once dtypes, lengths, offsets and edges agree."""
    if bitmap.dtype != np.uint64 or bitmap.shape != (grid.bitmap_words,):
        raise BitmapWrong(
            f"bitmap is {bitmap.dtype}{list(bitmap.shape)}, [{grid.rows}, {grid.cols}] needs "
            f"uint64[{grid.bitmap_words}]"
        )
    if offsets.dtype != np.uint32 or offsets.shape != (grid.offset_count,):
        raise OffsetsWrong(
            f"offsets are {offsets.dtype}{list(offsets.shape)}, [{grid.rows}, {grid.cols}] needs "
            f"uint32[{grid.offset_count}]"
        )
    if values.dtype not in (np.uint16, np.uint32) or values.ndim != 1:
        raise ValuesWrong(
            f"values are {values.dtype}{list(values.shape)}, needs uint16 or uint32 in 1 dimension"
        )
    counts = _popcounts(bitmap)
    if offsets[0] != 0:
        raise OffsetsWrong(f"offsets begin with {int(offsets[0])}, needs 0")
    found = np.diff(offsets.astype(np.int64))
    needed = _run_units(counts, values.dtype.itemsize)
    wrong = np.flatnonzero(found != needed)
    if wrong.size:
        tile = int(wrong[0])
        raise OffsetsWrong(
            f"tile {tile} of {grid.tiles}: offsets hold {int(found[tile])} units of "
            f"{RUN_ALIGNMENT} bytes, its {int(counts[tile])} non-zeros need {int(needed[tile])}"
        )
    expected_bytes = int(offsets[-1]) * RUN_ALIGNMENT
    if values.nbytes != expected_bytes:
        raise ValuesWrong(f"values have {values.nbytes} bytes, offsets end at {expected_bytes}")
    _check_edges(bitmap, grid)
    return counts


def _check_edges(bitmap: U64Array, grid: TileGrid) -> None:
    if not grid.tiles:
        return
    words = bitmap.reshape(grid.tile_rows, grid.tile_cols, TILE)
    below = grid.rows % TILE
    if below and words[-1, :, below:].any():
        raise BitsOutsideShape(f"bits are set in rows at and after {grid.rows}")
    beside = grid.cols % TILE
    if beside and (words[:, -1, :] >> np.uint64(beside)).any():
        raise BitsOutsideShape(f"bits are set in columns at and after {grid.cols}")


def _popcounts(bitmap: U64Array) -> npt.NDArray[np.int64]:
    rows = np.bitwise_count(bitmap).reshape(-1, TILE)
    counts: npt.NDArray[np.int64] = rows.sum(axis=1, dtype=np.int64)
    return counts


def _run_units(counts: npt.NDArray[np.int64], item_bytes: int) -> npt.NDArray[np.int64]:
    return (counts * item_bytes + (RUN_ALIGNMENT - 1)) // RUN_ALIGNMENT


def _pieces(grid: TileGrid) -> Iterator[_Piece]:
    if not grid.tiles:
        return
    tall = max(1, _PIECE_TILES // grid.tile_cols)
    wide = min(grid.tile_cols, _PIECE_TILES)
    for top in range(0, grid.tile_rows, tall):
        bottom = min(top + tall, grid.tile_rows)
        for left in range(0, grid.tile_cols, wide):
            right = min(left + wide, grid.tile_cols)
            first = top * grid.tile_cols + left
            yield _Piece(
                first=first,
                end=first + (bottom - top) * (right - left),
                rows=slice(top * TILE, min(bottom * TILE, grid.rows)),
                cols=slice(left * TILE, min(right * TILE, grid.cols)),
                tile_rows=bottom - top,
                tile_cols=right - left,
            )


def _gather(matrix_bits: BitsArray, piece: _Piece) -> BitsArray:
    """Returns the piece's tiles, [tiles, 64, 64]; edge tiles are filled up with zeros."""
    part = matrix_bits[piece.rows, piece.cols]
    height, width = piece.tile_rows * TILE, piece.tile_cols * TILE
    if part.shape != (height, width):
        whole = np.zeros((height, width), matrix_bits.dtype)
        whole[: part.shape[0], : part.shape[1]] = part
        part = whole
    tiles = part.reshape(piece.tile_rows, TILE, piece.tile_cols, TILE).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, TILE, TILE)


def _with_gaps(
    tiles: BitsArray,
    mask: npt.NDArray[np.bool_],
    counts: npt.NDArray[np.int64],
    per_unit: int,
) -> tuple[Any, npt.NDArray[np.bool_]]:
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
