"""The specification of the kernels, in numpy. Every faster kernel is tested against it.

Sizes were checked by `tierd_kernels.geometry`; contents are checked here, tile by tile, before
anything follows them. Source: FORMAT.md, section "Tile layout".
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import ELEMENT, RUN_UNIT, TILE, Bits, tiles_over
from tierd_layouts.packed_matrix import PackedMatrix

name: Final = "reference"

U8 = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def expand(matrix: PackedMatrix, out: Bits, first: int, end: int, threads: int) -> None:
    """Write the bits of tile rows `first` to `end` to `out`, zero where nothing is kept.

    int8 and int4 are rounded to the matrix's dtype, once, to the nearest, of two to the even one.
    Raises KernelError for a tile whose offsets descend, leave `values` or do not fit its record,
    that has bits outside the matrix, an impossible head, or escapes that do not ascend.
    """
    for tile_row in range(first, end):
        above = (tile_row - first) * TILE
        for tile_col in range(tiles_over(matrix.cols)):
            left = tile_col * TILE
            block = out[above : above + TILE, left : left + TILE]
            if matrix.scales is None:
                block[...] = _bits(matrix, tile_row, tile_col)
            else:
                block[...] = _round(_levels(matrix, tile_row, tile_col), matrix.dtype)


def linear(matrix: PackedMatrix, x: Bits, out: NDArray[np.float32], threads: int) -> None:
    """Write x @ W.T to `out`, summed in double precision and rounded once.

    x: bits of the matrix's dtype, [tokens, cols].   out: float32 [tokens, rows].
    W: the matrix; for int8 and int4 level times scale, not rounded to its dtype.
    Zeros of W count as in a dense product: with an infinite or NaN x they give NaN.
    """
    # An overflow of the rounding is an infinity in the result, as in every other kernel.
    with np.errstate(over="ignore", invalid="ignore"):
        out[...] = decode(x, matrix.dtype) @ weights(matrix).T


def weights(matrix: PackedMatrix) -> NDArray[np.float64]:
    """Return the numbers that a product multiplies with, [rows, cols]. Raises as `expand` does."""
    found = np.empty((matrix.rows, matrix.cols))
    for tile_row in range(tiles_over(matrix.rows)):
        for tile_col in range(tiles_over(matrix.cols)):
            top, left = tile_row * TILE, tile_col * TILE
            found[top : top + TILE, left : left + TILE] = (
                decode(_bits(matrix, tile_row, tile_col), matrix.dtype)
                if matrix.scales is None
                else _levels(matrix, tile_row, tile_col)
            )
    return found


def decode(bits: Bits, dtype: str) -> NDArray[np.float64]:
    """Return the numbers that `bits` stand for, in double precision."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float64)


def _bits(matrix: PackedMatrix, tile_row: int, tile_col: int) -> Any:
    """Return the part of a lossless tile that lies in the matrix."""
    tile = tile_row * tiles_over(matrix.cols) + tile_col
    kept = _kept(matrix, tile_row, tile_col)
    record = _record(matrix, tile, int(kept.sum()))
    element = ELEMENT[matrix.dtype]
    bits = np.zeros(kept.shape, element)
    if matrix.codec == "raw":
        bits[kept] = record.view(element)
    else:
        bits[kept] = _unpacked(matrix, tile, record, int(kept.sum()))
    return bits


def _levels(matrix: PackedMatrix, tile_row: int, tile_col: int) -> NDArray[np.float32]:
    """Return level times scale of a quantised tile; exact, as both have 8 bits."""
    assert matrix.scales is not None
    kept = _kept(matrix, tile_row, tile_col)
    count = int(kept.sum())
    record = _record(matrix, tile_row * tiles_over(matrix.cols) + tile_col, count)
    if matrix.codec == "int4":
        nibbles = np.stack([record & 15, record >> 4], axis=1).reshape(-1)[:count]
        record = np.where(nibbles < 8, nibbles, nibbles | 0xF0)
    groups = -(-matrix.cols // matrix.group)
    first = (tile_row * groups + tile_col * TILE // matrix.group) * TILE
    scales = matrix.scales[first : first + len(kept)].astype(np.uint32) << 16
    scale_of_each = np.broadcast_to(scales.view(np.float32)[:, None], kept.shape)[kept]
    weights = np.zeros(kept.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        weights[kept] = record.view(np.int8) * scale_of_each
    return weights


def _round(numbers: NDArray[np.float32], dtype: str) -> Bits:
    """Return the bits of the nearest numbers of `dtype`."""
    if dtype == "F32":
        return numbers.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore"):
            return numbers.astype(np.float16).view(np.uint16)
    bits = numbers.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))
    # The carry of a NaN's payload must not reach its exponent.
    return (np.where(np.isnan(numbers), bits | 0x400000, rounded) >> 16).astype(np.uint16)


def _kept(matrix: PackedMatrix, tile_row: int, tile_col: int) -> Mask:
    """Return which elements a tile keeps, of the part that lies in the matrix.

    Bit `c` (LSB first) of word `r` of a tile is the element of row `r` and column `c` of the tile.
    """
    rows = min(TILE, matrix.rows - tile_row * TILE)
    cols = min(TILE, matrix.cols - tile_col * TILE)
    if matrix.bitmap is None:
        return np.ones((rows, cols), np.bool_)
    tile = tile_row * tiles_over(matrix.cols) + tile_col
    words = np.ascontiguousarray(matrix.bitmap[tile * TILE : (tile + 1) * TILE], "<u8")
    bits: Mask = (
        np.unpackbits(words.view(np.uint8).reshape(TILE, 8), axis=1, bitorder="little") != 0
    )
    if bits[rows:].any() or bits[:, cols:].any():
        raise KernelError(f"tile {tile}: bitmap has bits outside its {rows} rows, {cols} columns")
    return bits[:rows, :cols]


def _record(matrix: PackedMatrix, tile: int, count: int) -> U8:
    """Return the bytes that hold the `count` elements which a tile keeps, without their padding."""
    begin, end = int(matrix.offsets[tile]), int(matrix.offsets[tile + 1])
    if end < begin:
        raise KernelError(f"tile {tile}: offsets {begin}..{end} descend")
    if end * RUN_UNIT > matrix.values.nbytes:
        raise KernelError(f"tile {tile}: offsets {begin}..{end} pass the end of values")
    nbytes = _record_bytes(matrix, tile, count)
    if -(-nbytes // RUN_UNIT) != end - begin:
        raise KernelError(
            f"tile {tile}: offsets {begin}..{end} do not fit its record of {nbytes} bytes"
        )
    values: U8 = matrix.values.view(np.uint8)
    return values[begin * RUN_UNIT : begin * RUN_UNIT + nbytes]


def _record_bytes(matrix: PackedMatrix, tile: int, count: int) -> int:
    item_bytes = np.dtype(ELEMENT[matrix.dtype]).itemsize
    match matrix.codec:
        case "raw":
            return count * item_bytes
        case "int8":
            return count
        case "int4":
            return -(-count // 2)
    base, planes, escapes = _head(matrix, tile)
    sane = planes <= 8 and base + (1 << planes) <= 256 and escapes <= count
    if not (sane if count else base == planes == escapes == 0):
        raise KernelError(f"tile {tile}: head {base}, {planes}, {escapes} cannot be")
    return (item_bytes - 1) * _eight(count) + planes * _eight(-(-count // 8)) + 4 * escapes


def _head(matrix: PackedMatrix, tile: int) -> tuple[int, int, int]:
    """Return the base of the top byte, the number of bit planes, the number of escapes."""
    assert matrix.heads is not None
    head = int(matrix.heads[tile])
    return head & 0xFF, head >> 8 & 0xFF, head >> 16


def _unpacked(matrix: PackedMatrix, tile: int, record: U8, count: int) -> Any:
    """Return the elements of an exponent-packed record.

    Elements are rotated left by one bit: the top byte is an exponent. It is `base` plus a code in
    bit planes; the escapes say it for elements that it does not fit. The other bytes are planes.
    """
    base, planes, escapes = _head(matrix, tile)
    low_bytes = np.dtype(ELEMENT[matrix.dtype]).itemsize - 1
    at = low_bytes * _eight(count)
    top = np.full(count, base, np.uint32)
    for plane in range(planes):
        nbytes = _eight(-(-count // 8))
        code = np.unpackbits(record[at : at + nbytes], bitorder="little", count=count)
        top += code.astype(np.uint32) << plane
        at += nbytes
    escape = record[at : at + 4 * escapes].reshape(-1, 4).astype(np.int64)
    ordinals = escape[:, 0] | escape[:, 1] << 8
    if (np.diff(ordinals, append=count) <= 0).any() or escape[:, 3].any():
        raise KernelError(f"tile {tile}: escapes do not ascend within its {count} elements")
    top[ordinals] = escape[:, 2]
    turned = top << 8 * low_bytes
    for byte in range(low_bytes):
        plane_bytes = record[byte * _eight(count) :][:count]
        turned |= plane_bytes.astype(np.uint32) << 8 * byte
    return turned >> 1 | (turned & 1) << 8 * low_bytes + 7


def _eight(nbytes: int) -> int:
    """Planes are padded to a multiple of 8 bytes."""
    return -(-nbytes // 8) * 8
