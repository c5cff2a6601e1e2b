"""Codecs `int8` and `int4`: small integers times a scale for each group of a row. Lossy.

Symmetric: a weight is q * scale, q in [-127, 127] or [-7, 7]. A group is `group` columns of one
row, so that a tile lies in one group. All arithmetic is float32 with one rounding (to nearest,
ties to even) for each operation, never fused, so that any encoder can give the same bytes:

    limit = 127 or 7
    amax  = max |w| of the group; 0: scale = +0 and all q = 0
    up(t) = the least bf16 >= t, at least the smallest positive one; if up(t) * limit is above the
            largest finite number of the matrix's dtype, the next smaller bf16 instead
    q(s)  = max(-limit, min(limit, rint(w / s)))

    int8: scale = up(amax / 127)
    int4: a = amax / 7; candidates s[k] = up(a * ((64 - 3 k) / 64)), k = 0..7; the one with the
          least e[k], of equals the one with the smallest k:
              d    = w / s[k] - q(s[k])
              lane[l] = d[l]^2 + d[16 + l]^2 + d[32 + l]^2 + ...   l = 0..15, added in this order
                      (elements after the last column count as w = 0)
              lane[l] += lane[l + 8], l < 8; then + 4, + 2, + 1: the sum is lane[0]
              r    = s[k] / s[0];  e[k] = lane[0] * (r * r)

Source: FORMAT.md, section "int8 and int4".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts import runs
from tierd_layouts.codecs import LEVEL_LIMITS
from tierd_layouts.errors import (
    BadGroup,
    BadMatrix,
    GapNotZero,
    LevelRefused,
    ScalesWrong,
    TileError,
    UnknownCodec,
    ZeroStored,
)
from tierd_layouts.packed_record import PackedMatrix, check_set
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

    from tierd_layouts.tile_grid import BitsArray, CountArray, Piece, U8Array, U16Array

    F32Array = npt.NDArray[np.float32]

DEFAULT_GROUP = 128
CANDIDATES = 8  #: scales that int4 tries for each group
_LANES = 16
_BAND_ELEMENTS = 1 << 20
#: The largest scales (bf16 bits) with which every product is finite and exact in float32.
_MAX_SCALE = {"int8": 0x7C01, "int4": 0x7E12}
_LARGEST = {
    "BF16": np.uint32(0x7F7F0000).view(np.float32),
    "F16": np.float32(65504),
    "F32": np.finfo(np.float32).max,
}


def encode(bits: BitsArray, dtype: str, *, codec: str, group: int, masked: bool) -> PackedMatrix:
    """Returns the matrix with the nearest q for every weight.

    bits: [rows, cols], uint16 of BF16 or F16, uint32 of F32; any strides.
    group: columns that share a scale, a multiple of 64.
    masked: keep the elements with q != 0; else keep all, without a bitmap.
    Raises UnknownCodec, BadGroup, BadMatrix: not 2-D, another dtype, not all finite, too large.
    """
    limit = _check_codec(codec, group)
    grid = check_matrix(bits, dtype)
    scales = _choose_scales(bits, dtype, codec, group, grid)
    bitmap = np.zeros(grid.bitmap_words, np.uint64) if masked else None
    counts = np.zeros(grid.tiles, np.int64)
    parts: list[U8Array] = []
    for piece in grid.pieces():
        divisors = _tile_scales(scales, grid, group, piece)
        divisors[divisors == 0] = 1  # all weights of the group are zero
        weights = floats(piece.gather(bits), dtype)
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
    decoded = np.empty((grid.rows, grid.cols), np.float32)
    for piece, tiles in _decoded_pieces(matrix, grid):
        piece.scatter(tiles, decoded)
    return decoded


def decode(matrix: PackedMatrix) -> BitsArray:
    """Returns the weights' raw bits, [rows, cols], rounded once, to nearest even.

    Raises UnknownCodec, BadGroup, BitmapWrong, BitsOutsideShape, ScalesWrong, OffsetsWrong,
    ValuesWrong before it touches a value.
    """
    grid = TileGrid(matrix.rows, matrix.cols)
    decoded: BitsArray = np.empty((grid.rows, grid.cols), bits_dtype(matrix.dtype))
    for piece, tiles in _decoded_pieces(matrix, grid):
        piece.scatter(_rounded(tiles, matrix.dtype), decoded)
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


def floats(bits: npt.NDArray[Any], dtype: str) -> F32Array:
    """Returns raw bits of BF16, F16 or F32 as float32, exact; a new array unless F32."""
    widened: F32Array
    if dtype == "BF16":
        widened = (bits.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F16":
        widened = bits.view(np.float16).astype(np.float32)
    else:
        widened = bits.view(np.float32)
    return widened


# --------------------------------------------------------------------------------------------------


def _check_codec(codec: str, group: int) -> int:
    if codec not in LEVEL_LIMITS:
        raise UnknownCodec(f"codec {codec!r}, quantised ones are {', '.join(LEVEL_LIMITS)}")
    if group <= 0 or group % TILE:
        raise BadGroup(f"group of {group} columns, needs a positive multiple of {TILE}")
    return LEVEL_LIMITS[codec]


def _levels(quotients: F32Array, limit: int) -> npt.NDArray[np.int8]:
    levels: npt.NDArray[np.int8] = np.clip(np.rint(quotients), -limit, limit).astype(np.int8)
    return levels


def _rounded(tiles: F32Array, dtype: str) -> BitsArray:
    rounded: BitsArray
    if dtype == "F32":
        rounded = tiles.view(np.uint32)
    elif dtype == "F16":
        with np.errstate(over="ignore"):  # infinity is what rounding to nearest gives
            rounded = tiles.astype(np.float16).view(np.uint16)
    else:
        bits = tiles.view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
    return rounded


def scale_floats(scales: U16Array) -> F32Array:
    """Returns bf16 bits as float32."""
    return floats(scales, "BF16")


def scale_count(grid: TileGrid, group: int) -> int:
    """Returns how many scales a matrix has: 64 for every group of every tile row."""
    return grid.tile_rows * -(-grid.cols // group) * TILE


def _tile_scales(scales: U16Array, grid: TileGrid, group: int, piece: Piece) -> F32Array:
    """Returns the scale of every row of the piece's tiles, [tiles, 64, 1]."""
    groups = -(-grid.cols // group)
    tile_row, tile_col = np.divmod(np.arange(piece.first, piece.end), max(1, grid.tile_cols))
    table = scales.reshape(grid.tile_rows, groups, TILE)
    return scale_floats(table[tile_row, tile_col * TILE // group])[:, :, None]


def _check_scales(matrix: PackedMatrix, grid: TileGrid) -> U16Array:
    scales = matrix.scales
    assert scales is not None  # `check_set`
    count = scale_count(grid, matrix.group)
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
    if below and scales.reshape(grid.tile_rows, -1, TILE)[-1, :, below:].any():
        raise ScalesWrong(f"a scale of a row at or after {grid.rows} is not 0")
    return scales


def _check_structure(matrix: PackedMatrix, grid: TileGrid) -> tuple[CountArray, U16Array]:
    """Returns kept counts and scales, once everything but the levels agrees."""
    check_set(matrix)
    _check_codec(matrix.codec, matrix.group)
    if matrix.bitmap is not None:
        check_bitmap(matrix.bitmap, grid)
    counts = kept_counts(matrix.bitmap, grid)
    scales = _check_scales(matrix, grid)
    runs.check_values(matrix.values)
    runs.check_offsets_form(matrix.offsets, grid)
    record_bytes = _record_bytes(counts, matrix.codec)
    runs.check_offsets(matrix.offsets, record_bytes, matrix.values.nbytes)
    return counts, scales


def _choose_scales(bits: BitsArray, dtype: str, codec: str, group: int, grid: TileGrid) -> U16Array:
    group = min(group, grid.tile_cols * TILE)  # the columns beyond would all be zeros
    groups = -(-grid.cols // group) if group else 0
    scales = np.zeros((grid.tile_rows, groups, TILE), np.uint16)
    choose = _least_error_scales if codec == "int4" else _amax_scales
    for rows, row_slice, columns, group_slice in _bands(grid, group):
        part = bits[row_slice, columns]
        whole = np.zeros(
            (len(rows) * TILE, (group_slice.stop - group_slice.start) * group), part.dtype
        )
        whole[: part.shape[0], : part.shape[1]] = part
        band = np.abs(floats(whole, dtype)).reshape(len(whole), -1, group)
        amax = band.max(axis=2)
        if not np.isfinite(amax).all():
            raise BadMatrix(f"a weight is not finite, codec {codec} cannot hold it")
        chosen = choose(band, amax, dtype).reshape(len(rows), TILE, -1)
        scales[rows.start : rows.stop, group_slice] = chosen.transpose(0, 2, 1)
    return scales.reshape(-1)


def _bands(grid: TileGrid, group: int) -> Iterator[tuple[range, slice, slice, slice]]:
    """Yields tile rows, rows, columns, groups: rectangles of whole groups, about 1 Mi elements."""
    groups = -(-grid.cols // group) if group else 0
    wide = max(1, min(groups, _BAND_ELEMENTS // (TILE * group)))
    tall = max(1, _BAND_ELEMENTS // (TILE * max(1, group) * wide))
    for top in range(0, grid.tile_rows, tall):
        rows = range(top, min(top + tall, grid.tile_rows))
        for left in range(0, groups, wide):
            right = min(left + wide, groups)
            yield (
                rows,
                slice(rows.start * TILE, min(rows.stop * TILE, grid.rows)),
                slice(left * group, min(right * group, grid.cols)),
                slice(left, right),
            )


def _amax_scales(band: F32Array, amax: F32Array, dtype: str) -> U16Array:
    return _scale_up(amax / np.float32(127), amax, 127, dtype)


def _least_error_scales(band: F32Array, amax: F32Array, dtype: str) -> U16Array:
    """band: |w|, [rows, groups, group]; the sign does not change the error."""
    step = amax / np.float32(7)
    best = _scale_up(step, amax, 7, dtype)
    widest = np.where(best == 0, np.float32(1), scale_floats(best))
    least = _error(band, widest, widest)
    for candidate in range(1, CANDIDATES):
        factor = np.float32((64 - 3 * candidate) / 64)
        bits = _scale_up(step * factor, amax, 7, dtype)
        error = _error(band, np.where(bits == 0, np.float32(1), scale_floats(bits)), widest)
        better = error < least
        best = np.where(better, bits, best)
        least = np.where(better, error, least)
    return best


def _scale_up(target: F32Array, amax: F32Array, limit: int, dtype: str) -> U16Array:
    bits = np.maximum(target.view(np.uint32) + 0xFFFF >> 16, 1).astype(np.uint16)
    with np.errstate(over="ignore"):  # infinity is above the largest, too
        too_large = scale_floats(bits) * np.float32(limit) > _LARGEST[dtype]
    bits -= too_large
    return np.where(amax == 0, np.uint16(0), bits)


def _error(band: F32Array, scale: F32Array, widest: F32Array) -> F32Array:
    quotients = band / scale[:, :, None]
    distances = quotients - np.minimum(np.rint(quotients), np.float32(7))
    distances *= distances
    steps = distances.reshape(*scale.shape, -1, _LANES)
    lanes = steps[:, :, 0].copy()
    for step in range(1, steps.shape[2]):
        lanes += steps[:, :, step]
    width = _LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :, :width] + lanes[:, :, width : 2 * width]
    ratio = scale / widest
    error: F32Array = lanes[:, :, 0] * (ratio * ratio)
    return error


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


def _decoded_pieces(matrix: PackedMatrix, grid: TileGrid) -> Iterator[tuple[Piece, F32Array]]:
    counts, scales = _check_structure(matrix, grid)
    for piece in grid.pieces():
        rows = _read(matrix.values, matrix.offsets[piece.first : piece.end + 1], matrix.codec)
        tiles: F32Array = np.zeros(rows.shape, np.float32)
        tiles[piece.kept(matrix.bitmap)] = rows[runs.firsts(counts[piece.tiles], TILE_ELEMENTS)]
        tiles = tiles.reshape(-1, TILE, TILE)
        tiles *= _tile_scales(scales, grid, matrix.group, piece)
        yield piece, tiles
