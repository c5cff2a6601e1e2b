"""Codecs `int8` and `int4`: small integers times a scale for each group of a row. Lossy.

A weight is q * scale, q in [-127, 127] or [-7, 7], one scale for `group` columns of one row; so a
tile lies in one group. How an encoder chooses the scales is in `scale_choice`.
Source: FORMAT.md, section "int8 and int4".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts import runs
from tierd_layouts.codecs import LEVEL_LIMITS
from tierd_layouts.errors import (
    BadGroup,
    GapNotZero,
    LevelRefused,
    ScalesWrong,
    TileError,
    UnknownCodec,
    ZeroStored,
)
from tierd_layouts.float_bits import rounded, widened
from tierd_layouts.packed_record import PackedMatrix, check_set
from tierd_layouts.scale_choice import choose_scales
from tierd_layouts.tile_grid import (
    TILE,
    TILE_ELEMENTS,
    TileGrid,
    bitmap_words,
    bits_dtype,
    check_bitmap,
    check_matrix,
    check_nnz,
    kept_counts,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from tierd_layouts.float_bits import F32Array
    from tierd_layouts.tile_grid import BitsArray, CountArray, Piece, U8Array, U16Array


#: The largest scales (bf16 bits) with which every product is finite and exact in float32.
_MAX_SCALE = {"int8": 0x7C01, "int4": 0x7E12}


def encode(bits: BitsArray, dtype: str, *, codec: str, group: int, masked: bool) -> PackedMatrix:
    """Returns the matrix with the nearest q for every weight.

    bits: [rows, cols], uint16 of BF16 or F16, uint32 of F32; any strides.
    group: columns that share a scale, a multiple of 64.
    masked: keep the elements with q != 0; else keep all, without a bitmap.
    Raises UnknownCodec, BadGroup, BadMatrix: not 2-D, another dtype, not all finite, too large.
    """
    limit = check_codec(codec, group)
    grid = check_matrix(bits, dtype)
    scales = choose_scales(bits, dtype, codec, group, grid)
    bitmap = np.zeros(grid.bitmap_words, np.uint64) if masked else None
    counts = np.zeros(grid.tiles, np.int64)
    parts: list[U8Array] = []
    for piece in grid.pieces():
        divisors = _tile_scales(scales, grid, group, piece)
        divisors[divisors == 0] = 1  # all weights of the group are zero
        weights = widened(piece.gather(bits), dtype)
        levels = _levels(weights / divisors, limit).reshape(-1, TILE_ELEMENTS)
        if bitmap is None:
            kept = piece.kept(None)
        else:
            kept = levels != 0
            bitmap[piece.first * TILE : piece.end * TILE] = bitmap_words(kept)
        counts[piece.tiles] = kept.sum(axis=1)
        parts.append(_write(levels[kept], counts[piece.tiles], codec))
    offsets = runs.make_offsets(_record_bytes(counts, codec))
    values = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    return PackedMatrix(
        codec, dtype, grid.rows, grid.cols, bitmap, offsets, values, scales=scales, group=group
    )


def weights(matrix: PackedMatrix) -> F32Array:
    """Returns q * scale, exact, float32 [rows, cols]. Raises what `decode` raises."""
    grid = TileGrid(matrix.rows, matrix.cols)
    checked = _check_structure(matrix, grid)
    decoded = np.empty((grid.rows, grid.cols), np.float32)
    for piece, tiles in _decoded_pieces(matrix, grid, *checked):
        piece.scatter(tiles, decoded)
    return decoded


def decode(matrix: PackedMatrix) -> BitsArray:
    """Returns the weights' raw bits, [rows, cols], rounded once, to nearest even.

    Raises UnknownCodec, BadGroup, BitmapWrong, BitsOutsideShape, ScalesWrong, OffsetsWrong,
    ValuesWrong before it touches a value.
    """
    grid = TileGrid(matrix.rows, matrix.cols)
    checked = _check_structure(matrix, grid)
    decoded: BitsArray = np.empty((grid.rows, grid.cols), bits_dtype(matrix.dtype))
    for piece, tiles in _decoded_pieces(matrix, grid, *checked):
        piece.scatter(rounded(tiles, matrix.dtype), decoded)
    return decoded


def validate(matrix: PackedMatrix, nnz: int) -> None:
    """Raises the error of the first rule of FORMAT.md that the arrays break.

    Arrays that pass are the only ones with these scales and these levels.
    """
    grid = TileGrid(matrix.rows, matrix.cols)
    counts, _ = _check_structure(matrix, grid)
    check_nnz(counts, nnz)
    limit = LEVEL_LIMITS[matrix.codec]
    for piece in grid.pieces():
        levels = _read(matrix.values, matrix.offsets[piece.first : piece.end + 1], matrix.codec)
        kept = runs.firsts(counts[piece.tiles], TILE_ELEMENTS)
        rules: list[tuple[type[TileError], str, npt.NDArray[np.bool_]]] = [
            (GapNotZero, "after the last element is not 0", (levels != 0) & ~kept),
            (LevelRefused, f"is below -{limit}", levels < -limit),
        ]
        if matrix.masked:
            rules.append((ZeroStored, "is 0 although its bit is set", (levels == 0) & kept))
        for error, rule, broken in rules:
            wrong = np.argwhere(broken)
            if len(wrong):
                tile, ordinal = wrong[0].tolist()
                raise error(f"tile {piece.first + tile} of {grid.tiles}: level {ordinal} {rule}")


# --------------------------------------------------------------------------------------------------


def check_codec(codec: str, group: int) -> int:
    if codec not in LEVEL_LIMITS:
        raise UnknownCodec(f"codec {codec!r}, quantised ones are {', '.join(LEVEL_LIMITS)}")
    if group <= 0 or group % TILE:
        raise BadGroup(f"group of {group} columns, needs a positive multiple of {TILE}")
    return LEVEL_LIMITS[codec]


def _levels(quotients: F32Array, limit: int) -> npt.NDArray[np.int8]:
    levels: npt.NDArray[np.int8] = np.clip(np.rint(quotients), -limit, limit).astype(np.int8)
    return levels


def _tile_scales(scales: U16Array, grid: TileGrid, group: int, piece: Piece) -> F32Array:
    """Returns the scale of every row of the piece's tiles, [tiles, 64, 1]."""
    groups = -(-grid.cols // group)
    tile_row, tile_col = np.divmod(np.arange(piece.first, piece.end), max(1, grid.tile_cols))
    table = scales.reshape(grid.tile_rows, groups, TILE)
    return widened(table[tile_row, tile_col * TILE // group], "BF16")[:, :, None]


def _check_scales(matrix: PackedMatrix, grid: TileGrid) -> U16Array:
    scales = matrix.scales
    assert scales is not None  # `check_set`
    count = grid.scale_count(matrix.group)
    if scales.dtype != np.uint16 or scales.shape != (count,):
        raise ScalesWrong(
            f"scales are {scales.dtype}{list(scales.shape)}, [{grid.rows}, {grid.cols}] in groups "
            f"of {matrix.group} needs uint16[{count}]"
        )
    wrong = np.flatnonzero(scales > _MAX_SCALE[matrix.codec])
    if wrong.size:
        place = int(wrong[0])
        raise ScalesWrong(
            f"scale {place} of {count} has the bits {int(scales[place]):#06x}, codec "
            f"{matrix.codec} has 0 to {_MAX_SCALE[matrix.codec]:#06x}"
        )
    below = grid.rows % TILE
    if count and below and scales.reshape(grid.tile_rows, -1, TILE)[-1, :, below:].any():
        raise ScalesWrong(f"a scale of a row at or after {grid.rows} is not 0")
    return scales


def _check_structure(matrix: PackedMatrix, grid: TileGrid) -> tuple[CountArray, U16Array]:
    """Returns kept counts and scales, once everything but the levels agrees."""
    check_set(matrix)
    check_codec(matrix.codec, matrix.group)
    runs.check_offsets_form(matrix.offsets, grid)  # first: from here on memory has its bounds
    if matrix.bitmap is not None:
        check_bitmap(matrix.bitmap, grid)
    counts = kept_counts(matrix.bitmap, grid)
    scales = _check_scales(matrix, grid)
    runs.check_values(matrix.values)
    record_bytes = _record_bytes(counts, matrix.codec)
    runs.check_offsets(matrix.offsets, record_bytes, matrix.values.nbytes)
    return counts, scales


def _record_bytes(counts: CountArray, codec: str) -> CountArray:
    return counts if codec == "int8" else (counts + 1) // 2


def _write(levels: npt.NDArray[np.int8], counts: CountArray, codec: str) -> U8Array:
    """Returns the values of one piece. levels: the kept ones of all its tiles, in order."""
    rows: npt.NDArray[Any] = np.zeros((len(counts), TILE_ELEMENTS), np.uint8)
    rows[runs.firsts(counts, TILE_ELEMENTS)] = levels.view(np.uint8)
    if codec == "int4":
        rows = rows[:, 0::2] & 0xF | rows[:, 1::2] << 4
    record_bytes = _record_bytes(counts, codec)
    sizes = runs.units(record_bytes) * 2
    words = np.zeros(int(sizes.sum()), np.uint64)
    runs.put(words, np.cumsum(sizes) - sizes, -(-record_bytes // 8), rows.view(np.uint64))
    return words.view(np.uint8)


def _read(values: U8Array, offsets: npt.NDArray[np.uint32], codec: str) -> npt.NDArray[np.int8]:
    """Returns 4096 levels for each tile, its whole units unpacked. offsets: tiles + 1."""
    starts = offsets.astype(np.int64) * 2
    width = TILE_ELEMENTS // (8 if codec == "int8" else 16)
    rows = runs.take(values.view(np.uint64), starts[:-1], np.diff(starts), width).view(np.int8)
    if codec == "int4":
        pairs = np.empty((*rows.shape, 2), np.int8)
        pairs[..., 0] = rows << 4 >> 4  # arithmetic shifts: the sign is bit 3
        pairs[..., 1] = rows >> 4
        rows = pairs.reshape(len(rows), TILE_ELEMENTS)
    return rows


def _decoded_pieces(
    matrix: PackedMatrix, grid: TileGrid, counts: CountArray, scales: U16Array
) -> Iterator[tuple[Piece, F32Array]]:
    for piece in grid.pieces():
        rows = _read(matrix.values, matrix.offsets[piece.first : piece.end + 1], matrix.codec)
        tiles: F32Array = np.zeros(rows.shape, np.float32)
        tiles[piece.kept(matrix.bitmap)] = rows[runs.firsts(counts[piece.tiles], TILE_ELEMENTS)]
        tiles = tiles.reshape(-1, TILE, TILE)
        tiles *= _tile_scales(scales, grid, matrix.group, piece)
        yield piece, tiles
