"""One tile of a packed matrix, decoded by a Triton program: what all kernels for GPUs share.

A lane has half a row: 32 columns, a word of the bitmap. The rank of its first kept element among
those of the tile is found by one scan, those of its *octets*, 8 columns each, by counting on. What
an octet keeps are then at most 8 neighbours in the record: a *window* of it, words that are read
and shifted into place; a window of a bit plane holds those of all four octets. `spread.py` takes
them from there to their columns, four bytes an instruction.

Contents are hostile: a tile's record, as its bitmap and head say it must be, is compared with its
offsets and with the size of `values`, which the host knows, before anything follows it. A rank is
below the number of elements that was compared, as both are sums of the same registers. Windows
read whole words without asking, except in tiles near the end of `values`. Source: FORMAT.md,
section "Tile layout"; `reference.py` says the same in numpy.

Interpreted, Python's `min` and `max` are wrong in a kernel: `tl.minimum` and `tl.maximum`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from tierd_kernels.faults import REASONS
from tierd_kernels.gpu.escapes import escapes_are_wrong
from tierd_kernels.gpu.levels import numbers_of
from tierd_kernels.gpu.octets import (
    bits_inside,
    eight_bytes,
    gathered,
    halves,
    halves_of,
    octet,
    pairs,
    rows_of,
    window,
)
from tierd_kernels.gpu.planes import packed
from tierd_kernels.gpu.spread import spread_bytes, spread_nibbles

VARIANTS: Final = ("gather", "window", "masked")
"""How elements are fetched. Which is faster is measured on the card.

window: a few words for each octet, read without asking but near the end of `values`.
masked: the same words, each with a mask: more to do, but no branch, so that Triton can read those
of the next tile while this one is decoded (stages).
gather: raw elements of 2 bytes one by one. Those of 4 always are; all else knows windows only.
"""

NO_REASON = tl.constexpr(len(REASONS))
"""Of a tile in which nothing is wrong; the others are numbers of REASONS."""
_BITS = tl.constexpr(0)
_HEAD = tl.constexpr(1)
_OFFSETS = tl.constexpr(2)
_ESCAPES = tl.constexpr(3)
_MORE = tl.constexpr(8192 // 16 + 1)
"""Units of 16 bytes. Windows begin inside a record, or in 8 bit planes of 512 bytes after it."""


@triton.jit
def decode_tile(
    bitmap,
    offsets,
    heads,
    values,
    values_bytes,
    tiles,
    most_escapes,
    tile,
    height,
    width,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Return (elements [64, 64] of DTYPE, reason): the tile, zero where nothing is kept.

    bitmap, offsets, heads, values: pointers to uint8, the bytes of the arrays (absent: None);
    each starts on a multiple of 4 bytes.
    values_bytes: the size of `values`.   tiles: of the matrix, `tile` is below it.
    height, width: of the part of the tile that lies in the matrix, 1 to 64.
    DTYPE: of the matrix, as tl.bfloat16; for int8 and int4 any: levels are exact in all of them.
    The caller multiplies them by the scales.
    PLANES, most_escapes: as `TorchMatrix.most_planes` and `most_escapes`.
    VARIANT: one of VARIANTS.
    reason: NO_REASON, or what is wrong with the tile (a number of REASONS); it is zeros then.
    """
    elements, reasons = decode_lanes(
        bitmap,
        offsets,
        heads,
        values,
        values_bytes,
        tiles,
        most_escapes,
        tile,
        height,
        width,
        bits_inside(height, width),
        CODEC,
        DTYPE,
        MASKED,
        PLANES,
        VARIANT,
    )
    return elements, tl.min(reasons, axis=0)


@triton.jit
def decode_lanes(
    bitmap,
    offsets,
    heads,
    values,
    values_bytes,
    tiles,
    most_escapes,
    tile,
    height,
    width,
    allowed,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """As `decode_tile`, but the reason is int32 [128], the same in all lanes.

    A program with many tiles takes the smallest once, not for each of them. And `allowed`, the
    `bits_inside` of height and width, are the same for all of them but the last.
    """
    PACKED: tl.constexpr = CODEC == "exponent-packed"
    half, first, count, outside = halves(bitmap, tile, height, width, allowed, MASKED, PACKED)
    count = count.to(tl.uint32)
    begin, units, misplaced, sane, more = _record(offsets, tile, tiles, values_bytes)
    record = values + begin.to(tl.int64) * 16
    ITEM_BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    if PACKED:
        head = tl.load(heads.to(tl.pointer_type(tl.uint32)) + tile)
        base = head & 0xFF
        planes = head >> 8 & 0xFF
        escapes = head >> 16
        codes = base + (tl.full([], 1, tl.uint32) << tl.minimum(planes, 8))
        most = tl.minimum(count.to(tl.int32), most_escapes)
        over = tl.maximum(planes.to(tl.int32) - PLANES, escapes.to(tl.int32) - most)
        over = tl.maximum(over, codes.to(tl.int32) - 256)
        can_be = (over <= 0) & (tl.where(count > 0, 0, head) == 0)
        byte_plane = (count + 7) // 8 * 8
        bit_plane = (count + 63) // 64 * 8
        planes_at = (ITEM_BYTES - 1) * byte_plane
        escapes_at = planes_at + planes * bit_plane
        needed = escapes_at + 4 * escapes
    elif CODEC == "int4":
        needed = (count + 1) // 2
    elif CODEC == "int8":
        needed = count
    else:
        tl.static_assert(CODEC == "raw")
        needed = count * ITEM_BYTES
    sane &= (misplaced | units ^ (needed + 15) // 16) == 0
    reason = tl.where(sane, NO_REASON, _OFFSETS)
    if PACKED:
        reason = tl.where(can_be, reason, _HEAD)
    reason = tl.where(outside, _BITS, reason)
    if PACKED:
        # Zero where something is wrong already: then nothing is followed.
        escapes = tl.where(reason == NO_REASON, escapes, 0)
        escape = (record + escapes_at).to(tl.pointer_type(tl.uint32))
        reason = tl.where(escapes_are_wrong(escape, escapes, count), _ESCAPES, reason)
        escapes = tl.where(reason == NO_REASON, escapes, 0)
    half = tl.where(reason == NO_REASON, half, 0)
    if not PACKED:
        planes_at, byte_plane, bit_plane, planes, base, escape, escapes = 0, 0, 0, 0, 0, None, 0
    if PACKED:
        more &= reason == NO_REASON
    if VARIANT == "masked":
        more = False
    # Read what is there without asking, but where `values` may end.
    if more:
        elements = _elements(
            record,
            half,
            first,
            planes_at,
            byte_plane,
            bit_plane,
            planes,
            base,
            escape,
            escapes,
            CODEC,
            DTYPE,
            PLANES,
            VARIANT,
            False,
        )
    else:
        elements = _elements(
            record,
            half,
            first,
            planes_at,
            byte_plane,
            bit_plane,
            planes,
            base,
            escape,
            escapes,
            CODEC,
            DTYPE,
            PLANES,
            VARIANT,
            True,
        )
    if ITEM_BYTES == 2:
        elements = halves_of(elements, DTYPE)
    return elements, reason + tl.zeros([128], tl.int32)


@triton.jit
def _elements(
    record,
    half,
    rank,
    planes_at,
    byte_plane,
    bit_plane,
    planes,
    base,
    escape,
    escapes,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The elements of a tile in whose record nothing is wrong, or of which nothing is kept: DTYPE
    [64, 64], or of 2 bytes uint32 [64, 32]. half, rank: see `halves`.
    """
    if CODEC == "exponent-packed":
        return packed(
            record,
            half,
            rank,
            planes_at,
            byte_plane,
            bit_plane,
            planes,
            base,
            escape,
            escapes,
            DTYPE,
            PLANES,
            CHECKED,
        )
    else:
        first, rank = _octet(record, half, rank, 0, CODEC, DTYPE, VARIANT, CHECKED)
        second, rank = _octet(record, half, rank, 1, CODEC, DTYPE, VARIANT, CHECKED)
        third, rank = _octet(record, half, rank, 2, CODEC, DTYPE, VARIANT, CHECKED)
        fourth, rank = _octet(record, half, rank, 3, CODEC, DTYPE, VARIANT, CHECKED)
        return rows_of(first, second, third, fourth)


@triton.jit
def _octet(
    record,
    half,
    rank,
    NUMBER: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    VARIANT: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """Return the columns [128, 8] of an octet of each half row, and the rank of the next one."""
    kept, spread, ones = octet(half, NUMBER)
    if CODEC == "raw":
        if VARIANT != "gather" and DTYPE.primitive_bitwidth == 16:
            found, rank = pairs(record, kept, rank, CHECKED)
        else:
            found = gathered(record.to(tl.pointer_type(DTYPE)), kept, rank)
            rank += ones
    elif CODEC == "int8":
        low, high = eight_bytes(record, rank, ones, 1, CHECKED)
        low, high = spread_bytes(low, high, spread, tl.zeros([128], tl.uint32))
        rank += ones
        found = numbers_of(low ^ 0x80808080, high ^ 0x80808080, 8, DTYPE)
    else:
        word = window(record, rank * 4, ones * 4, CHECKED) ^ 0x88888888
        low, high = spread_nibbles(word, spread)
        rank += ones
        found = numbers_of(low, high, 4, DTYPE)
    return found, rank


@triton.jit
def _record(offsets, tile, tiles, values_bytes):
    """Return where the record begins and how long it is, in units of 16 bytes, uint32; 0 where it
    is the first or the last one only if it must be; whether it lies in `values`; and whether at
    least _MORE units come after it.
    """
    offset = offsets.to(tl.pointer_type(tl.uint32)) + tile
    begin = tl.load(offset)
    end = tl.load(offset + 1)
    most = (values_bytes >> 4).to(tl.uint32)
    sane = (end <= most) & (begin <= end)
    misplaced = tl.where(tile.to(tl.int32) == 0, begin, 0)
    misplaced |= tl.where((tile + 1).to(tl.int32) == tl.cast(tiles, tl.int32), end ^ most, 0)
    return begin, end - begin, misplaced, sane, sane & (most - end >= _MORE)
