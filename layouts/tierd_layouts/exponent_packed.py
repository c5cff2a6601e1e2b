"""Codec `exponent-packed`: sign and mantissa as they are, exponents as short codes, without loss.

The bits of an element are rotated left by one, so that the sign is the lowest bit and the top byte
is the exponent. The low bytes are stored as planes; the top byte minus the tile's `base` as a code
of P bits, in bit planes; the few top bytes outside `[base, base + 2^P)` as escapes.
Source: FORMAT.md, section "exponent-packed".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tierd_layouts import runs
from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.errors import EscapesWrong, GapNotZero, HeadsWrong, ZeroStored
from tierd_layouts.exponent_records import (
    MAX_PLANES,
    Content,
    Records,
    choose_heads,
    read_records,
    rotate_left,
    rotate_right,
    top_bytes,
    write_records,
)
from tierd_layouts.packed_record import PackedMatrix, check_set
from tierd_layouts.tile_grid import (
    TILE_ELEMENTS,
    TileGrid,
    bits_dtype,
    check_bitmap,
    check_matrix,
    check_nnz,
    kept_counts,
    make_bitmap,
)

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import BitsArray, CountArray, U8Array, U32Array

CODEC = "exponent-packed"


def encode(bits: BitsArray, dtype: str, *, masked: bool) -> PackedMatrix:
    """Returns the matrix with each tile's P and base chosen for the fewest bytes.

    bits: [rows, cols], uint16 of BF16 or F16, uint32 of F32; any strides.
    masked: keep the elements that have any bit set; else keep all, without a bitmap.
    Raises BadMatrix: not 2-D, another dtype, or more than 64 GiB of values.
    """
    grid = check_matrix(bits, dtype)
    bitmap = make_bitmap(bits, grid) if masked else None
    counts = kept_counts(bitmap, grid)
    heads = np.zeros(grid.tiles, np.uint32)
    parts: list[U8Array] = []
    for piece in grid.pieces():
        kept = counts[piece.tiles]
        ordered = np.zeros((len(kept), TILE_ELEMENTS), bits.dtype)
        ordered[runs.firsts(kept, TILE_ELEMENTS)] = piece.gather(bits).reshape(ordered.shape)[
            piece.kept(bitmap)
        ]
        rotated = rotate_left(ordered)
        heads[piece.tiles] = choose_heads(top_bytes(rotated), kept)
        parts.append(write_records(rotated, Records.of(kept, heads[piece.tiles], bits.itemsize)))
    records = Records.of(counts, heads, bits.itemsize)
    offsets = runs.make_offsets(records.nbytes)
    values = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    return PackedMatrix(CODEC, dtype, grid.rows, grid.cols, bitmap, offsets, values, heads=heads)


def decode(matrix: PackedMatrix) -> BitsArray:
    """Returns the raw bits, [rows, cols]; elements without a bit are zero bits.

    Raises BitmapWrong, BitsOutsideShape, HeadsWrong, OffsetsWrong, ValuesWrong before it touches a
    value, EscapesWrong before it follows an escape.
    """
    grid = TileGrid(matrix.rows, matrix.cols)
    records = _check_structure(matrix, grid)
    decoded: BitsArray = np.empty((grid.rows, grid.cols), bits_dtype(matrix.dtype))
    for piece in grid.pieces():
        content = read_records(matrix.values, records.part(piece))
        tiles = np.zeros((piece.end - piece.first, TILE_ELEMENTS), decoded.dtype)
        tiles[piece.kept(matrix.bitmap)] = rotate_right(content.rotated)[content.kept]
        piece.scatter(tiles, decoded)
    return decoded


def validate(matrix: PackedMatrix, nnz: int) -> None:
    """Raises the TileError of the first rule of FORMAT.md that the arrays break.

    Given P and base of each head, arrays that pass are those of `decode`'s result and no others.
    """
    grid = TileGrid(matrix.rows, matrix.cols)
    records = _check_structure(matrix, grid)
    check_nnz(records.kept, nnz)
    for piece in grid.pieces():
        part = records.part(piece)
        _check_content(matrix.values, part, matrix.masked)


# --------------------------------------------------------------------------------------------------


def _check_structure(matrix: PackedMatrix, grid: TileGrid) -> Records:
    """Returns the places of all records, once everything but their content agrees."""
    check_set(matrix)
    assert matrix.heads is not None
    runs.check_offsets_form(matrix.offsets, grid)  # first: from here on memory has its bounds
    if matrix.bitmap is not None:
        check_bitmap(matrix.bitmap, grid)
    counts = kept_counts(matrix.bitmap, grid)
    _check_heads(matrix.heads, counts, grid)
    runs.check_values(matrix.values)
    records = Records.of(counts, matrix.heads, ITEM_BYTES[matrix.dtype])
    runs.check_offsets(matrix.offsets, records.nbytes, matrix.values.nbytes)
    return records


def _check_heads(heads: U32Array, counts: CountArray, grid: TileGrid) -> None:
    if heads.dtype != np.uint32 or heads.shape != (grid.tiles,):
        raise HeadsWrong(
            f"heads are {heads.dtype}{list(heads.shape)}, [{grid.rows}, {grid.cols}] needs "
            f"uint32[{grid.tiles}]"
        )
    base, planes = heads & 0xFF, heads >> 8 & 0xFF
    escapes = heads >> 16
    wrong = np.flatnonzero(
        (planes > MAX_PLANES)
        | (base + (1 << np.minimum(planes, MAX_PLANES)) > 256)
        | (escapes > counts)
        | ((counts == 0) & (heads != 0))
    )
    if wrong.size:
        tile = int(wrong[0])
        raise HeadsWrong(
            f"tile {tile} of {grid.tiles}: head {int(heads[tile]):#x}: {int(planes[tile])} planes "
            f"from base {int(base[tile])} and {int(escapes[tile])} escapes for {int(counts[tile])} "
            f"elements; at most {MAX_PLANES}, base + 2^planes at most 256, an empty tile's is 0"
        )


def _check_content(values: U8Array, records: Records, masked: bool) -> None:
    """Raises EscapesWrong, GapNotZero, ZeroStored. records: of one piece."""
    content = read_records(values, records)
    first = records.first
    low = (1 << (records.item_bytes - 1) * 8) - 1
    after = (content.codes != 0) | (content.rotated & low != 0)
    wrong = np.argwhere(after & ~content.kept)
    if len(wrong):
        raise GapNotZero(f"tile {first + int(wrong[0, 0])}: a plane goes on after its last element")
    ends = records.escapes_start * 2 + records.escapes
    gaps = (records.start + runs.units(records.nbytes) * 2) * 2 - ends
    filled = np.flatnonzero(values.view(np.uint32)[runs.places(ends, gaps)])
    if filled.size:
        tile = int(np.searchsorted(np.cumsum(gaps), filled[0], side="right"))
        raise GapNotZero(f"tile {first + tile}: bytes after the record are not zero")
    _check_escapes(records, content)
    if masked:
        zeros = np.argwhere((content.rotated == 0) & content.kept)
        if len(zeros):
            tile, ordinal = zeros[0].tolist()
            raise ZeroStored(f"tile {first + tile}, element {ordinal}: a bit is set for zero bits")


def _check_escapes(records: Records, content: Content) -> None:
    tile, ordinal, entries = content.escape_tile, content.escape_ordinal, content.escapes
    distance = (entries >> 16 & 0xFF).astype(np.int64) - records.base[tile]
    unordered = np.zeros(len(tile), np.bool_)
    unordered[1:] = (tile[1:] == tile[:-1]) & (ordinal[1:] <= ordinal[:-1])
    rules = {
        "is not after the one before it": unordered,
        "has a last byte that is not 0": entries >> 24 != 0,
        "has a top byte inside the window": (distance >= 0)
        & (distance < 1 << records.planes[tile]),
        "has a code that is not 0": content.codes[tile, ordinal] != 0,
    }
    for rule, broken in rules.items():
        wrong = np.flatnonzero(broken)
        if wrong.size:
            place = int(wrong[0])
            raise EscapesWrong(
                f"tile {records.first + int(tile[place])}: the escape of element "
                f"{int(ordinal[place])} ({int(entries[place]):#010x}) {rule}"
            )
