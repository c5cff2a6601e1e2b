"""The specification of the kernels, in numpy. Every faster kernel is tested against it.

The arrays were checked by `tierd_kernels.geometry`; their contents are checked here.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import RUN_UNIT, TILE, Bits, Dtype, Geometry, tiles_over

name: Final = "reference"


def expand(
    bitmap: NDArray[np.uint64],
    offsets: NDArray[np.uint32],
    values: Bits,
    out: Bits,
    geometry: Geometry,
    threads: int,
) -> None:
    """Write tile rows `geometry.first` to `.end` to `out`, zero where no bit is set.

    Bit `c` (LSB first) of word `r` of a tile is the element of row `r` and column `c` of the tile;
    its value is the next one of the tile's run.
    Raises KernelError for a tile whose offsets descend, leave `values` or do not fit its number of
    bits, and for one that has bits outside the matrix.
    """
    tile_cols = tiles_over(geometry.cols)
    for tile_row in range(geometry.first, geometry.end):
        above = (tile_row - geometry.first) * TILE
        for tile_col in range(tile_cols):
            left = tile_col * TILE
            block = out[above : above + TILE, left : left + TILE]
            block[...] = _tile(
                bitmap, offsets, values, tile_row * tile_cols + tile_col, block.shape
            )


def linear(
    bitmap: NDArray[np.uint64],
    offsets: NDArray[np.uint32],
    values: Bits,
    x: Bits,
    out: NDArray[np.float32],
    dtype: Dtype,
    threads: int,
) -> None:
    """Write x @ W.T to `out`, summed in double precision and rounded once.

    x: bits of `dtype`, [tokens, cols].   out: float32 [tokens, rows].
    Zeros of W count as in a dense product: with an infinite or NaN x they give NaN.
    """
    rows, cols = out.shape[1], x.shape[1]
    weights = np.empty((rows, cols), values.dtype)
    tile_rows = tiles_over(rows)
    expand(bitmap, offsets, values, weights, Geometry(cols, tile_rows, 0, tile_rows), threads)
    # An overflow of the rounding is an infinity in the result, as in every other kernel.
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = decode(x, dtype) @ decode(weights, dtype).T


def decode(bits: Bits, dtype: Dtype) -> NDArray[np.float64]:
    """Return the numbers that `bits` stand for, in double precision."""
    match dtype:
        case "BF16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        case "F16":
            return bits.view(np.float16).astype(np.float64)
        case "F32":
            return bits.view(np.float32).astype(np.float64)


def _tile(
    bitmap: NDArray[np.uint64],
    offsets: NDArray[np.uint32],
    values: Bits,
    tile: int,
    shape: tuple[int, ...],
) -> Bits:
    """Return the part of a tile that lies in the matrix, of `shape`."""
    rows, cols = shape
    words = np.ascontiguousarray(bitmap[tile * TILE : (tile + 1) * TILE], "<u8").view(np.uint8)
    bits = np.unpackbits(words.reshape(TILE, 8), axis=1, bitorder="little").astype(bool)
    count = int(bits.sum())
    if bits[rows:].any() or bits[:, cols:].any():
        raise KernelError(f"tile {tile}: bitmap has bits outside its {rows} rows, {cols} columns")
    begin, end = int(offsets[tile]), int(offsets[tile + 1])
    if end < begin:
        raise KernelError(f"tile {tile}: offsets {begin}..{end} descend")
    if end * RUN_UNIT > values.nbytes:
        raise KernelError(f"tile {tile}: offsets {begin}..{end} pass the end of values")
    if -(-count * values.itemsize // RUN_UNIT) != end - begin:
        raise KernelError(f"tile {tile}: offsets {begin}..{end} do not fit {count} set bits")
    start = begin * RUN_UNIT // values.itemsize
    full = np.zeros((TILE, TILE), values.dtype)
    full[bits] = values[start : start + count]
    return full[:rows, :cols]
