"""One tile of a packed matrix, decoded by a Triton program: what all kernels for GPUs share.

A lane has an *octet*: 8 columns of one row, a byte of the bitmap. The rank of its first kept
element among those of the tile is found once (popcounts and one scan over the tile's 512 octets),
and what it keeps are then at most 8 neighbours in the record. Eight steps follow that are written
out: a few instructions for each element, and all of an octet stays in one thread's registers.

Contents are hostile: a tile's record, as its bitmap and head say it must be, is compared with its
offsets and with the size of `values`, which the host knows, before anything follows it. A rank is
below the number of elements that was compared, as both are sums of the same registers. Source:
FORMAT.md, section "Tile layout"; `reference.py` says the same in numpy.

Interpreted, Python's `min` and `max` are wrong in a kernel: `tl.minimum` and `tl.maximum`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from tierd_kernels.gpu.escapes import escaped, escapes_are_wrong
from tierd_kernels.gpu.octets import eight_bytes, gathered, octets, pairs, picked, window
from tierd_kernels.gpu.planes import codes, turned_back
from tierd_kernels.torch_expand import REASONS

VARIANTS: Final = ("gather", "window")
"""How elements are fetched: one load for each kept one; or for each octet the aligned words that
its elements lie in, shifted into place. Which is faster is measured on the card. Bit planes are
read by windows in both."""

NO_REASON = tl.constexpr(len(REASONS))
"""Of a tile in which nothing is wrong; the others are numbers of REASONS."""
_BITS = tl.constexpr(0)
_HEAD = tl.constexpr(1)
_OFFSETS = tl.constexpr(2)
_ESCAPES = tl.constexpr(3)


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
    kept, ones, rank, count, outside = octets(bitmap, tile, height, width, MASKED)
    reason = tl.where(outside, _BITS, NO_REASON)
    begin, nbytes, sane = _record(offsets, tile, tiles, values_bytes)
    record = values + begin
    ITEM_BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    if CODEC == "exponent-packed":
        head = tl.load(heads.to(tl.pointer_type(tl.uint32)) + tile)
        base = (head & 0xFF).to(tl.int32)
        planes = (head >> 8 & 0xFF).to(tl.int32)
        escapes = (head >> 16).to(tl.int32)
        can_be = (planes <= PLANES) & (escapes <= most_escapes) & (escapes <= count)
        can_be &= base + (1 << tl.minimum(planes, 8)) <= 256
        can_be &= (count > 0) | (head == 0)
        reason = tl.where(can_be, reason, tl.minimum(reason, _HEAD))
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
    sane &= nbytes == (needed + 15) // 16 * 16
    reason = tl.where(sane, reason, tl.minimum(reason, _OFFSETS))
    if CODEC == "exponent-packed":
        # Zero where something is wrong already: then nothing is followed.
        escapes = tl.where(reason == NO_REASON, escapes, 0)
        escape = (record + escapes_at).to(tl.pointer_type(tl.uint32))
        reason = tl.where(escapes_are_wrong(escape, escapes, count), _ESCAPES, reason)
        escapes = tl.where(reason == NO_REASON, escapes, 0)
    kept = tl.where(reason == NO_REASON, kept, 0)
    ones = tl.where(reason == NO_REASON, ones, 0)
    if CODEC == "raw":
        if VARIANT == "window" and ITEM_BYTES == 2:
            elements = pairs(record, kept, ones, rank, DTYPE)
        else:
            elements = gathered(record.to(tl.pointer_type(DTYPE)), kept, rank)
    elif CODEC == "int8":
        if VARIANT == "window":
            word = eight_bytes(record, rank, ones)
            levels = picked(word, kept, 8).to(tl.int8, bitcast=True)
        else:
            levels = gathered(record.to(tl.pointer_type(tl.int8)), kept, rank)
        elements = levels.to(tl.float32).to(DTYPE)
    elif CODEC == "int4":
        word = window(record, rank * 4, ones * 4).to(tl.uint64)
        nibbles = picked(word, kept, 4).to(tl.int32)
        elements = ((nibbles ^ 8) - 8).to(tl.float32).to(DTYPE)
    else:
        top = codes(record + planes_at, bit_plane, planes, rank, ones, PLANES)
        top += base.to(tl.uint64) * 0x0101010101010101
        if escapes > 0:
            top = escaped(escape, escapes, top, rank, ones)
        elements = turned_back(record, byte_plane, top, kept, ones, rank, DTYPE, VARIANT)
    return elements, reason


@triton.jit
def _record(offsets, tile, tiles, values_bytes):
    """Return where the record begins and its bytes, and whether it lies where it must."""
    offset = offsets.to(tl.pointer_type(tl.uint32)) + tile
    begin = tl.load(offset).to(tl.int64) * 16
    end = tl.load(offset + 1).to(tl.int64) * 16
    sane = end <= values_bytes
    sane &= (tile > 0) | (begin == 0)
    sane &= (tile + 1 < tiles) | (end == values_bytes)
    return begin, end - begin, sane
