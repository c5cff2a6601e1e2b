"""The tiles of a matrix: 64 x 64, in row-major order, taken a few MiB at a time.

What all codecs share: where a tile is, which of its elements are kept, and the bitmap that says so.
Source: FORMAT.md, section "Tile layout".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE
from tierd_layouts.errors import BadMatrix, BitmapWrong, BitsOutsideShape

if TYPE_CHECKING:
    from collections.abc import Iterator

TILE = 64
TILE_ELEMENTS = TILE * TILE
#: numpy counts bytes in 63 bits, also those of an array without any, and a weight may be a float32.
MAX_ELEMENTS = (1 << 61) - 1
#: 512 tiles are 4 MiB of 16-bit elements: temporaries stay near the processor's caches.
_PIECE_TILES = 512

U8Array = npt.NDArray[np.uint8]
U16Array = npt.NDArray[np.uint16]
U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
BitsArray = U16Array | U32Array
CountArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of a matrix `[rows, cols]`."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 0 or self.cols < 0:
            raise BadMatrix(f"shape [{self.rows}, {self.cols}] has a dimension below 0")
        if max(self.rows, 1) * max(self.cols, 1) > MAX_ELEMENTS:
            raise BadMatrix(
                f"shape [{self.rows}, {self.cols}] is above the limit of {MAX_ELEMENTS} elements"
            )

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

    def scale_count(self, group: int) -> int:
        """uint16 scales of groups of so many columns: 64 for every group of every tile row."""
        return self.tile_rows * -(-self.cols // group) * TILE

    def pieces(self) -> Iterator[Piece]:
        """Yields all tiles in order."""
        if not self.tiles:
            return
        tall = max(1, _PIECE_TILES // self.tile_cols)
        wide = min(self.tile_cols, _PIECE_TILES)
        for top in range(0, self.tile_rows, tall):
            bottom = min(top + tall, self.tile_rows)
            for left in range(0, self.tile_cols, wide):
                right = min(left + wide, self.tile_cols)
                first = top * self.tile_cols + left
                yield Piece(
                    first=first,
                    end=first + (bottom - top) * (right - left),
                    rows=slice(top * TILE, min(bottom * TILE, self.rows)),
                    cols=slice(left * TILE, min(right * TILE, self.cols)),
                    tile_rows=bottom - top,
                    tile_cols=right - left,
                )


@dataclass(frozen=True, slots=True)
class Piece:
    """Tiles `[first, end)`: whole tile rows, or a part of one, so that they are consecutive.

    rows, cols: of the matrix, inside its shape.
    """

    first: int
    end: int
    rows: slice
    cols: slice
    tile_rows: int
    tile_cols: int

    @property
    def tiles(self) -> slice:
        """The piece's tiles, to index arrays that have one entry for each tile."""
        return slice(self.first, self.end)

    def gather(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns the piece's tiles, [tiles, 64, 64]; edge tiles are filled up with zeros."""
        part = matrix[self.rows, self.cols]
        height, width = self.tile_rows * TILE, self.tile_cols * TILE
        if part.shape != (height, width):
            whole = np.zeros((height, width), matrix.dtype)
            whole[: part.shape[0], : part.shape[1]] = part
            part = whole
        tiles = part.reshape(self.tile_rows, TILE, self.tile_cols, TILE).transpose(0, 2, 1, 3)
        return tiles.reshape(-1, TILE, TILE)

    def scatter(self, tiles: npt.NDArray[Any], matrix: npt.NDArray[Any]) -> None:
        """Writes the piece's tiles, [tiles, 4096] or [tiles, 64, 64], to their places."""
        band = (
            tiles.reshape(self.tile_rows, self.tile_cols, TILE, TILE)
            .transpose(0, 2, 1, 3)
            .reshape(self.tile_rows * TILE, self.tile_cols * TILE)
        )
        target = matrix[self.rows, self.cols]
        target[...] = band[: target.shape[0], : target.shape[1]]

    def kept(self, bitmap: U64Array | None) -> BoolArray:
        """Returns which elements are kept, [tiles, 4096]; without a bitmap those in the shape."""
        if bitmap is not None:
            words = np.ascontiguousarray(bitmap[self.first * TILE : self.end * TILE], dtype="<u8")
            bits = np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_)
            return bits.reshape(-1, TILE_ELEMENTS)
        height = self.rows.stop - self.rows.start
        width = self.cols.stop - self.cols.start
        rows = (np.arange(self.tile_rows * TILE) < height).reshape(-1, 1, TILE, 1)
        cols = (np.arange(self.tile_cols * TILE) < width).reshape(1, -1, 1, TILE)
        inside: BoolArray = rows & cols
        return inside.reshape(-1, TILE_ELEMENTS)


def check_matrix(bits: npt.NDArray[Any], dtype: str) -> TileGrid:
    """Returns the grid of raw bits `[rows, cols]`. Raises BadMatrix: not 2-D, or not of `dtype`."""
    wanted = {"U16": np.uint16, "U32": np.uint32}.get(RAW_VALUES_DTYPE.get(dtype, ""))
    if wanted is None or bits.dtype != wanted or bits.ndim != 2:
        raise BadMatrix(
            f"{bits.dtype} with {bits.ndim} dimensions as bits of {dtype!r}, needs uint16 for BF16 "
            f"and F16, uint32 for F32, with 2"
        )
    return TileGrid(*bits.shape)


def bits_dtype(dtype: str) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """Returns numpy's unsigned dtype for the raw bits of BF16, F16 or F32."""
    return np.dtype(np.uint16) if ITEM_BYTES[dtype] == 2 else np.dtype(np.uint32)


def bitmap_words(kept: BoolArray) -> U64Array:
    """Returns the words of [tiles, 4096] booleans, uint64[tiles * 64]."""
    words: U64Array = np.packbits(kept, axis=-1, bitorder="little").reshape(-1).view("<u8")
    return words


def make_bitmap(matrix: npt.NDArray[Any], grid: TileGrid) -> U64Array:
    """Returns the bitmap of the elements that have any bit set."""
    bitmap = np.empty(grid.bitmap_words, np.uint64)
    for piece in grid.pieces():
        kept = (piece.gather(matrix) != 0).reshape(-1, TILE_ELEMENTS)
        bitmap[piece.first * TILE : piece.end * TILE] = bitmap_words(kept)
    return bitmap


def kept_counts(bitmap: U64Array | None, grid: TileGrid) -> CountArray:
    """Returns how many elements each tile keeps, int64[tiles]."""
    counts: CountArray
    if not grid.tiles:  # one of the dimensions may be 2^60, and must not be counted through
        counts = np.zeros(0, np.int64)
    elif bitmap is not None:
        rows = np.bitwise_count(bitmap).reshape(-1, TILE)
        counts = rows.sum(axis=1, dtype=np.int64)
    else:
        heights = np.minimum(TILE, grid.rows - TILE * np.arange(grid.tile_rows))
        widths = np.minimum(TILE, grid.cols - TILE * np.arange(grid.tile_cols))
        counts = np.multiply.outer(heights, widths).reshape(-1)
    return counts


def check_bitmap(bitmap: U64Array, grid: TileGrid) -> None:
    """Raises BitmapWrong, BitsOutsideShape."""
    if bitmap.dtype != np.uint64 or bitmap.shape != (grid.bitmap_words,):
        raise BitmapWrong(
            f"bitmap is {bitmap.dtype}{list(bitmap.shape)}, [{grid.rows}, {grid.cols}] needs "
            f"uint64[{grid.bitmap_words}]"
        )
    if not grid.tiles:
        return
    words = bitmap.reshape(grid.tile_rows, grid.tile_cols, TILE)
    below = grid.rows % TILE
    if below and words[-1, :, below:].any():
        raise BitsOutsideShape(f"bits are set in rows at and after {grid.rows}")
    beside = grid.cols % TILE
    if beside and (words[:, -1, :] >> np.uint64(beside)).any():
        raise BitsOutsideShape(f"bits are set in columns at and after {grid.cols}")


def check_nnz(counts: CountArray, nnz: int) -> None:
    """Raises BitmapWrong unless the tiles keep `nnz` elements together."""
    total = int(counts.sum())
    if total != nnz:
        raise BitmapWrong(f"{total} elements are kept, nnz is {nnz}")
