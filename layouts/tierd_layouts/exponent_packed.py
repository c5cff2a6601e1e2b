"""Codec `exponent-packed`: sign and mantissa as they are, exponents as short codes, without loss.

The bits of an element are rotated left by one, so that the sign is the lowest bit and the top byte
is the exponent. The low bytes are stored as planes; the top byte minus the tile's `base` as a code
of P bits, in bit planes; the few top bytes outside `[base, base + 2^P)` as escapes.
Source: FORMAT.md, section "exponent-packed".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts import runs
from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.errors import EscapesWrong, GapNotZero, HeadsWrong, ZeroStored
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
    import numpy.typing as npt

    from tierd_layouts.tile_grid import BitsArray, CountArray, Piece, U8Array, U32Array

CODEC = "exponent-packed"
MAX_PLANES = 8
ESCAPE_BYTES = 4
_BYTE_WORDS = TILE_ELEMENTS // 8  # words of a whole byte plane
_BIT_WORDS = TILE_ELEMENTS // 64  # words of a whole bit plane


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
        rotated = _rotate_left(ordered)
        heads[piece.tiles] = _choose_heads(_top_bytes(rotated), kept)
        parts.append(_write(rotated, _Records.of(kept, heads[piece.tiles], bits.itemsize)))
    records = _Records.of(counts, heads, bits.itemsize)
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
        content = _read(matrix.values, records.part(piece))
        tiles = np.zeros((piece.end - piece.first, TILE_ELEMENTS), decoded.dtype)
        tiles[piece.kept(matrix.bitmap)] = _rotate_right(content.rotated)[content.kept]
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
        _check_content(matrix.values, part, _read(matrix.values, part), piece.first, matrix.masked)


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Records:
    """Where each tile's record and its parts are; int64, one entry for each tile, lengths in words.

    [start, +item_bytes-1 byte planes of byte_words, +planes bit planes of bit_words, +escapes)
    """

    kept: CountArray
    base: CountArray
    planes: CountArray
    escapes: CountArray
    byte_words: CountArray
    bit_words: CountArray
    start: CountArray  #: of the record, in words
    item_bytes: int

    @classmethod
    def of(cls, kept: CountArray, heads: U32Array, item_bytes: int) -> _Records:
        records = cls(
            kept=kept,
            base=(heads & 0xFF).astype(np.int64),
            planes=(heads >> 8 & 0xFF).astype(np.int64),
            escapes=(heads >> 16).astype(np.int64),
            byte_words=-(-kept // 8),
            bit_words=-(-kept // 64),
            start=np.zeros(len(kept), np.int64),
            item_bytes=item_bytes,
        )
        sizes = runs.units(records.nbytes) * 2
        records.start[1:] = np.cumsum(sizes)[:-1]
        return records

    def part(self, piece: Piece) -> _Records:
        names = ("kept", "base", "planes", "escapes", "byte_words", "bit_words", "start")
        return _Records(
            **{name: getattr(self, name)[piece.tiles] for name in names}, item_bytes=self.item_bytes
        )

    @property
    def planes_start(self) -> CountArray:
        return self.start + (self.item_bytes - 1) * self.byte_words

    @property
    def escapes_start(self) -> CountArray:
        """In words; escapes are half a word each."""
        return self.planes_start + self.planes * self.bit_words

    @property
    def nbytes(self) -> CountArray:
        """Bytes of every record, before it is filled up to 16."""
        return (self.escapes_start - self.start) * 8 + self.escapes * ESCAPE_BYTES


def _check_structure(matrix: PackedMatrix, grid: TileGrid) -> _Records:
    """Returns the places of all records, once everything but their content agrees."""
    check_set(matrix)
    assert matrix.heads is not None
    if matrix.bitmap is not None:
        check_bitmap(matrix.bitmap, grid)
    counts = kept_counts(matrix.bitmap, grid)
    _check_heads(matrix.heads, counts, grid)
    runs.check_values(matrix.values)
    records = _Records.of(counts, matrix.heads, ITEM_BYTES[matrix.dtype])
    runs.check_offsets_form(matrix.offsets, grid)
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


@dataclass(frozen=True, slots=True)
class _Content:
    """The records of one piece, one row of 4096 for each tile: element i of the kept at place i."""

    kept: npt.NDArray[np.bool_]
    rotated: BitsArray  #: elements, zero after the kept
    codes: U8Array  #: 0 after the kept
    escape_tile: CountArray
    escape_ordinal: CountArray


def _rotate_left(bits: BitsArray) -> Any:
    return bits << 1 | bits >> (bits.itemsize * 8 - 1)


def _rotate_right(rotated: BitsArray) -> Any:
    return rotated >> 1 | rotated << (rotated.itemsize * 8 - 1)


def _top_bytes(rotated: BitsArray) -> U8Array:
    tops: U8Array = (rotated >> (rotated.itemsize * 8 - 8)).astype(np.uint8)
    return tops


def _choose_heads(tops: U8Array, kept: CountArray) -> U32Array:
    """Returns the heads with the fewest record bytes: the smaller P, then the smaller base."""
    tiles = len(tops)
    bins = tops + np.arange(0, tiles * 256, 256)[:, None]
    counts = np.bincount(bins.reshape(-1), minlength=tiles * 256).reshape(tiles, 256)
    counts[:, 0] -= TILE_ELEMENTS - kept  # the places after the kept elements
    below = np.zeros((tiles, 257), np.int64)
    np.cumsum(counts, axis=1, out=below[:, 1:])
    heads = np.zeros(tiles, np.uint32)
    fewest = np.full(tiles, np.iinfo(np.int64).max)
    for planes in range(MAX_PLANES + 1):
        window = 1 << planes
        inside = below[:, window:] - below[:, : 257 - window]
        base = inside.argmax(axis=1)  # the first of equals
        escapes = kept - inside.max(axis=1)
        nbytes = planes * 8 * -(-kept // 64) + ESCAPE_BYTES * escapes
        better = nbytes < fewest
        fewest[better] = nbytes[better]
        heads[better] = (base | planes << 8 | escapes << 16)[better]
    return heads


def _write(rotated: BitsArray, records: _Records) -> U8Array:
    """Returns the values of one piece."""
    words = np.zeros(int(runs.units(records.nbytes).sum()) * 2, np.uint64)
    low_bytes = rotated.view(np.uint8).reshape(*rotated.shape, rotated.itemsize)
    for plane in range(rotated.itemsize - 1):
        rows = np.ascontiguousarray(low_bytes[:, :, plane]).view(np.uint64)
        start = records.start + plane * records.byte_words
        runs.put(words, start, records.byte_words, rows)
    kept = runs.firsts(records.kept, TILE_ELEMENTS)
    distance = _top_bytes(rotated) - records.base.astype(np.uint8)[:, None]  # wraps below base
    inside = distance < (1 << records.planes).astype(np.uint16)[:, None]
    codes = distance * (inside & kept)
    for plane in range(int(records.planes.max(initial=0))):
        rows = np.packbits(codes >> plane & 1, axis=1, bitorder="little").view(np.uint64)
        lengths = records.bit_words * (records.planes > plane)
        runs.put(words, records.planes_start + plane * records.bit_words, lengths, rows)
    tile, ordinal = np.nonzero(kept & ~inside)
    entries = ordinal | _top_bytes(rotated)[tile, ordinal].astype(np.int64) << 16
    halves = words.view(np.uint32)
    halves[runs.places(records.escapes_start * 2, records.escapes)] = entries
    return words.view(np.uint8)


def _read(values: U8Array, records: _Records) -> _Content:
    """Returns the content of one piece. Raises EscapesWrong for an ordinal that no element has."""
    words = values.view(np.uint64)
    tiles = len(records.kept)
    item_bytes = records.item_bytes
    rotated = np.zeros((tiles, TILE_ELEMENTS), np.uint16 if item_bytes == 2 else np.uint32)
    fields = rotated.view(np.uint8).reshape(tiles, TILE_ELEMENTS, item_bytes)
    for plane in range(item_bytes - 1):
        start = records.start + plane * records.byte_words
        rows = runs.take(words, start, records.byte_words, _BYTE_WORDS)
        fields[:, :, plane] = rows.view(np.uint8)
    codes = np.zeros((tiles, TILE_ELEMENTS), np.uint8)
    for plane in range(int(records.planes.max(initial=0))):
        lengths = records.bit_words * (records.planes > plane)
        start = records.planes_start + plane * records.bit_words
        rows = runs.take(words, start, lengths, _BIT_WORDS).view(np.uint8)
        codes |= np.unpackbits(rows, axis=1, bitorder="little") << np.uint8(plane)
    tops = codes + records.base.astype(np.uint8)[:, None]
    entries = values.view(np.uint32)[runs.places(records.escapes_start * 2, records.escapes)]
    tile = np.repeat(np.arange(tiles), records.escapes)
    ordinal = (entries & 0xFFFF).astype(np.int64)
    wrong = np.flatnonzero(ordinal >= records.kept[tile])
    if wrong.size:
        place = int(wrong[0])
        raise EscapesWrong(
            f"escape of element {int(ordinal[place])}, its tile keeps "
            f"{int(records.kept[tile[place]])}"
        )
    tops[tile, ordinal] = entries >> 16 & 0xFF
    fields[:, :, item_bytes - 1] = tops
    kept = runs.firsts(records.kept, TILE_ELEMENTS)
    return _Content(kept, rotated, codes, tile, ordinal)


def _check_content(
    values: U8Array, records: _Records, content: _Content, first: int, masked: bool
) -> None:
    """Raises GapNotZero, EscapesWrong, ZeroStored. first: the number of the first tile."""
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
    _check_escapes(values, records, content, first)
    if masked:
        zeros = np.argwhere((content.rotated == 0) & content.kept)
        if len(zeros):
            tile, ordinal = zeros[0].tolist()
            raise ZeroStored(f"tile {first + tile}, element {ordinal}: a bit is set for zero bits")


def _check_escapes(values: U8Array, records: _Records, content: _Content, first: int) -> None:
    tile, ordinal = content.escape_tile, content.escape_ordinal
    entries = values.view(np.uint32)[runs.places(records.escapes_start * 2, records.escapes)]
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
                f"tile {first + int(tile[place])}: the escape of element {int(ordinal[place])} "
                f"({int(entries[place]):#010x}) {rule}"
            )
