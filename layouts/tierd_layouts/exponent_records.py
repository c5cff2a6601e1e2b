"""The records of codec `exponent-packed`: how large their parts are, written and read.

Tiles of a piece are moved together, as rows of 4096 elements: the kept ones in order, then zeros.
Nothing is judged here but what reading itself needs; the rules are in `exponent_packed`.
Source: FORMAT.md, section "exponent-packed".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts import runs
from tierd_layouts.errors import EscapesWrong
from tierd_layouts.tile_grid import TILE_ELEMENTS

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import BitsArray, BoolArray, CountArray, Piece, U8Array, U32Array

MAX_PLANES = 8
ESCAPE_BYTES = 4
_BYTE_WORDS = TILE_ELEMENTS // 8  # words of a whole byte plane
_BIT_WORDS = TILE_ELEMENTS // 64  # words of a whole bit plane


@dataclass(frozen=True, slots=True)
class Records:
    """Where each tile's record and its parts are; int64, one entry for each tile, in words.

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
    first: int = 0  #: the number of the first of these tiles

    @classmethod
    def of(cls, kept: CountArray, heads: U32Array, item_bytes: int) -> Records:
        """Returns the places of records that lie one after the other from 0."""
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

    def part(self, piece: Piece) -> Records:
        """Returns the entries of the piece's tiles."""
        names = ("kept", "base", "planes", "escapes", "byte_words", "bit_words", "start")
        return Records(
            **{name: getattr(self, name)[piece.tiles] for name in names},
            item_bytes=self.item_bytes,
            first=piece.first,
        )

    @property
    def planes_start(self) -> CountArray:
        """Where the bit planes begin."""
        return self.start + (self.item_bytes - 1) * self.byte_words

    @property
    def escapes_start(self) -> CountArray:
        """In words; escapes are half a word each."""
        return self.planes_start + self.planes * self.bit_words

    @property
    def nbytes(self) -> CountArray:
        """Bytes of every record, before it is filled up to 16."""
        return (self.escapes_start - self.start) * 8 + self.escapes * ESCAPE_BYTES


@dataclass(frozen=True, slots=True)
class Content:
    """The records of one piece, one row of 4096 for each tile: element i of the kept at place i."""

    kept: BoolArray
    rotated: BitsArray  #: elements, zero after the kept
    codes: U8Array  #: 0 after the kept
    escape_tile: CountArray
    escape_ordinal: CountArray
    escapes: U32Array  #: as they are stored


def rotate_left(bits: BitsArray) -> Any:
    return bits << 1 | bits >> (bits.itemsize * 8 - 1)


def rotate_right(rotated: BitsArray) -> Any:
    return rotated >> 1 | rotated << (rotated.itemsize * 8 - 1)


def top_bytes(rotated: BitsArray) -> U8Array:
    tops: U8Array = (rotated >> (rotated.itemsize * 8 - 8)).astype(np.uint8)
    return tops


def choose_heads(tops: U8Array, kept: CountArray) -> U32Array:
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


def write_records(rotated: BitsArray, records: Records) -> U8Array:
    """Returns the values of one piece."""
    words = np.zeros(int(runs.units(records.nbytes).sum()) * 2, np.uint64)
    low_bytes = rotated.view(np.uint8).reshape(*rotated.shape, rotated.itemsize)
    for plane in range(rotated.itemsize - 1):
        rows = np.ascontiguousarray(low_bytes[:, :, plane]).view(np.uint64)
        start = records.start + plane * records.byte_words
        runs.put(words, start, records.byte_words, rows)
    kept = runs.firsts(records.kept, TILE_ELEMENTS)
    distance = top_bytes(rotated) - records.base.astype(np.uint8)[:, None]  # wraps below base
    inside = distance < (1 << records.planes).astype(np.uint16)[:, None]
    codes = distance * (inside & kept)
    for plane in range(int(records.planes.max(initial=0))):
        rows = np.packbits(codes >> plane & 1, axis=1, bitorder="little").view(np.uint64)
        lengths = records.bit_words * (records.planes > plane)
        runs.put(words, records.planes_start + plane * records.bit_words, lengths, rows)
    tile, ordinal = np.nonzero(kept & ~inside)
    entries = ordinal | top_bytes(rotated)[tile, ordinal].astype(np.int64) << 16
    halves = words.view(np.uint32)
    halves[runs.places(records.escapes_start * 2, records.escapes)] = entries
    return words.view(np.uint8)


def read_records(values: U8Array, records: Records) -> Content:
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
            f"tile {records.first + int(tile[place])}: escape of element {int(ordinal[place])}, "
            f"the tile keeps {int(records.kept[tile[place]])}"
        )
    tops[tile, ordinal] = entries >> 16 & 0xFF
    fields[:, :, item_bytes - 1] = tops
    kept = runs.firsts(records.kept, TILE_ELEMENTS)
    return Content(kept, rotated, codes, tile, ordinal, entries)
