"""One tile of a packed matrix, decoded by a Triton program: what all kernels for GPUs share.

A lane has half a row: 32 columns, a word of the bitmap. The rank of its first kept element among
those of the tile comes from a scan of all its words in each warp, those of its *octets*, 8 columns
each, by counting on. What an octet keeps are then at most 8 neighbours in the record: a *window* of
it, words that are read and shifted into place; a window of a bit plane holds those of all four
octets. `spread.py` takes them from there to their columns, four bytes an instruction.

Contents are hostile: a tile's record, as its bitmap and head say it must be, is compared with its
offsets and with the size of `values`, which the host knows, before anything follows it
(`records.py`). A rank is below the number of elements that was compared, as both are sums of the
same words. Windows read whole words without asking, except in tiles that are not plain.
`reference.py` says the same in numpy.

Interpreted, Python's `min` and `max` are wrong in a kernel: `tl.minimum` and `tl.maximum`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from tierd_kernels.gpu.levels import numbers_of
from tierd_kernels.gpu.octets import (
    eight_bytes,
    first_of_rows,
    gathered,
    halves,
    halves_of,
    octet,
    pairs,
    rows_of,
    window,
)
from tierd_kernels.gpu.planes import packed
from tierd_kernels.gpu.records import NO_REASON, is_plain, loaded, parts, wrong
from tierd_kernels.gpu.spread import spread_bytes, spread_nibbles

VARIANTS: Final = ("gather", "window", "masked")
"""How elements are fetched. Which is faster is measured on the card.

window: a few words for each octet, read without asking but near the end of `values`.
masked: the same words, each with a mask: more to do, but no branch, so that Triton can read those
of the next tile while this one is decoded (stages).
gather: raw elements of 2 bytes one by one. Those of 4 always are; all else knows windows only.
"""


@triton.jit
def decode_tile(
    bitmap,
    offsets,
    heads,
    values,
    values_bytes,
    far_units,
    tiles,
    most_escapes,
    tile,
    height,
    width,
    usual,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Return (elements [64, 64] of DTYPE, reason): the tile, zero where nothing is kept.

    bitmap, offsets, heads, values: pointers to uint8, the bytes of the arrays (absent: None);
    bitmap and values start on a multiple of 16 bytes.
    values_bytes: the size of `values`; far_units: `records.far_units` of it.
    tiles: of the matrix, `tile` is below it.
    height, width: of the part of the tile that lies in the matrix, 1 to 64.
    usual: whether the tile is whole, and neither the first nor the last of the matrix.
    DTYPE: of the matrix, as tl.bfloat16; for int8 and int4 any: levels are exact in all of them.
    The caller multiplies them by the scales.
    PLANES, most_escapes: as `TorchMatrix.most_planes` and `most_escapes`.
    VARIANT: one of VARIANTS.
    reason: NO_REASON, or what is wrong with the tile (a number of REASONS); it is zeros then.
    """
    ITEM_BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    begin, end, head = loaded(offsets, heads, tile, CODEC)
    place = begin, end, head
    record = values + begin.to(tl.int64) * 16
    if MASKED:
        kept, rank, count = halves(bitmap, tile, VARIANT == "masked")
    else:  # of a whole tile: known to the compiler
        kept = tl.full([128], 0xFFFFFFFF, tl.uint32)
        rank = tl.arange(0, 128) * 32
        count = tl.full([], 4096, tl.int32)
    sizes = parts(count, head, CODEC, ITEM_BYTES)
    if VARIANT == "masked":
        plain = False
    else:
        plain = is_plain(values, far_units, most_escapes, usual, place, count, sizes, CODEC, PLANES)
    if plain:
        reason = tl.full([], NO_REASON, tl.int32)
        elements = _elements(record, kept, rank, head, sizes, CODEC, DTYPE, PLANES, VARIANT, False)
    else:
        if not MASKED:
            kept, rank, count = first_of_rows(height, width)
            sizes = parts(count, head, CODEC, ITEM_BYTES)
        reason = wrong(
            values,
            values_bytes,
            tiles,
            most_escapes,
            tile,
            height,
            width,
            kept,
            count,
            place,
            sizes,
            CODEC,
            PLANES,
        )
        # Where something is wrong nothing is followed.
        kept = tl.where(reason == NO_REASON, kept, 0)
        head = tl.where(reason == NO_REASON, head, 0)
        elements = _elements(record, kept, rank, head, sizes, CODEC, DTYPE, PLANES, VARIANT, True)
    if ITEM_BYTES == 2:
        elements = halves_of(elements, DTYPE)
    return elements, reason


@triton.jit
def _elements(
    record,
    kept,
    rank,
    head,
    sizes,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The elements of a tile in whose record nothing is wrong, or of which nothing is kept: DTYPE
    [64, 64], or of 2 bytes uint32 [64, 32]. kept, rank: see `halves`; sizes: `parts`.
    """
    if CODEC == "exponent-packed":
        return packed(record, kept, rank, head, sizes, DTYPE, PLANES, CHECKED)
    else:
        if CODEC == "raw" and VARIANT != "gather" and DTYPE.primitive_bitwidth == 16:
            rank *= 2  # `pairs` counts bytes
        first, rank = _octet(record, kept, rank, 0, CODEC, DTYPE, VARIANT, CHECKED)
        second, rank = _octet(record, kept, rank, 1, CODEC, DTYPE, VARIANT, CHECKED)
        third, rank = _octet(record, kept, rank, 2, CODEC, DTYPE, VARIANT, CHECKED)
        fourth, rank = _octet(record, kept, rank, 3, CODEC, DTYPE, VARIANT, CHECKED)
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
    """Return the columns [128, 8] of an octet of each half row, and the rank of the next one.

    half, rank: see `halves`; the rank times 2 where `pairs` takes it.
    """
    kept, spread, ones = octet(half, NUMBER)
    if CODEC == "raw":
        if VARIANT != "gather" and DTYPE.primitive_bitwidth == 16:
            found, rank = pairs(record, kept, rank, CHECKED)
        else:
            found = gathered(record.to(tl.pointer_type(DTYPE)), kept, rank)
            rank += ones
    elif CODEC == "int8":
        low, high = eight_bytes(record, rank, ones, CHECKED)
        low, high = spread_bytes(low, high, spread, tl.zeros([128], tl.uint32))
        rank += ones
        found = numbers_of(low ^ 0x80808080, high ^ 0x80808080, 8, DTYPE)
    else:
        word = window(record, rank * 4, ones * 4, CHECKED) ^ 0x88888888
        low, high = spread_nibbles(word, spread)
        rank += ones
        found = numbers_of(low, high, 4, DTYPE)
    return found, rank
