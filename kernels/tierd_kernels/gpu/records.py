"""The record of a tile: where it lies, how long it must be, and what is wrong with it.

Nearly every tile is *plain*: whole, neither the first nor the last of its matrix, not empty, with a
record that is as long as its bitmap and head say and ends far from the end of `values`. A few
instructions tell; all other checks are for tiles that are not, and say why.

Units are 16 bytes. Source: FORMAT.md, section "Tile layout".
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.faults import BITS, ESCAPES, HEAD, OFFSETS, REASONS
from tierd_kernels.gpu.escapes import escapes_are_wrong
from tierd_kernels.gpu.octets import bits_inside
from tierd_kernels.gpu.spread import permuted

NO_REASON = tl.constexpr(len(REASONS))
"""Of a tile in which nothing is wrong; the others are numbers of REASONS."""
_BITS = tl.constexpr(BITS)
_HEAD = tl.constexpr(HEAD)
_OFFSETS = tl.constexpr(OFFSETS)
_ESCAPES = tl.constexpr(ESCAPES)
_MORE = tl.constexpr(8192 // 16)
"""Units. Windows begin inside a record, or in 8 bit planes of 512 bytes after it."""
_LONGEST = tl.constexpr(4096 * (4 + 1 + 4) // 16)
"""Units of a record: of 4096 elements of 4 bytes, or of 3, with 8 planes, all of them escapes."""


def far_units(values_bytes: int) -> int:
    """Records that begin before this unit of `values` end so far from its end that windows may be
    read without asking.
    """
    return max(values_bytes // 16 - int(_MORE.value) - int(_LONGEST.value), 0)


@triton.jit
def loaded(offsets, heads, tile, CODEC: tl.constexpr):
    """Return where a tile's record begins and ends, in units, and its head (0: it has none)."""
    offset = offsets.to(tl.pointer_type(tl.uint32)) + tile
    begin, end = tl.load(offset), tl.load(offset + 1)
    if CODEC == "exponent-packed":
        head = tl.load(heads.to(tl.pointer_type(tl.uint32)) + tile)
    else:
        head = begin - begin
    return begin, end, head


@triton.jit
def parts(count, head, CODEC: tl.constexpr, ITEM_BYTES: tl.constexpr):
    """Return the bytes of a plane of bytes and of one of bits, and where the bit planes begin, the
    escapes begin and the record ends: that of a tile with `count` elements.
    """
    count = count.to(tl.uint32)
    byte_plane, bit_plane = count * 0, count * 0
    planes_at, escapes_at = count * 0, count * 0
    if CODEC == "exponent-packed":
        byte_plane = (count + 7) & 0xFFFFFFF8
        bit_plane = (count + 63) // 64 * 8
        planes_at = (ITEM_BYTES - 1) * byte_plane
        escapes_at = planes_at + (head >> 8 & 0xFF) * bit_plane
        end = escapes_at + 4 * (head >> 16)
    elif CODEC == "int4":
        end = (count + 1) // 2
    elif CODEC == "int8":
        end = count
    else:
        tl.static_assert(CODEC == "raw")
        end = count * ITEM_BYTES
    return byte_plane, bit_plane, planes_at, escapes_at, end


@triton.jit
def is_plain(
    values,
    far_units,
    most_escapes,
    usual,
    place,
    count,
    sizes,
    CODEC: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Whether a tile is plain: see above. usual: whether it is whole, and neither the first nor the
    last of its matrix.   far_units: of this module, for `values`.   place: as `loaded`.
    sizes: as `parts`.
    """
    begin, end, head = place
    # Not one comparison after the other: of four LLVM makes one of a vector, which is longer.
    limit = tl.where(usual, far_units.to(tl.uint32), 0)
    plain = (begin < limit) & (begin + (sizes[4] + 15) // 16 == end)
    if CODEC == "exponent-packed":
        planes, escapes = head >> 8 & 0xFF, head >> 16
        over = (head | 0xFFFFFF00).to(tl.int32) - _most_base(planes, PLANES).to(tl.int32)
        over = tl.maximum(over, planes.to(tl.int32) - PLANES)
        plain &= tl.maximum(over, 1 - count) <= 0
        if plain & (escapes > 0):
            plain = escapes <= tl.minimum(count, most_escapes).to(tl.uint32)
            followed = tl.where(plain, escapes, 0)
            escape = (values + begin.to(tl.int64) * 16 + sizes[3]).to(tl.pointer_type(tl.uint32))
            plain &= escapes_are_wrong(escape, followed, count.to(tl.uint32)) == 0
    return plain


@triton.jit
def _most_base(planes, PLANES: tl.constexpr):
    """The largest base of so many planes, at most PLANES; all bits above it are set."""
    if PLANES < 8:
        return permuted(planes * 0 + 0xF8FCFEFF, planes * 0 + 0x80C0E0F0, planes)
    else:
        return 0 - (tl.full([], 1, tl.uint32) << tl.minimum(planes, 8))


@triton.jit
def wrong(
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
    CODEC: tl.constexpr,
    PLANES: tl.constexpr,
):
    """What is wrong with a tile, a number of REASONS, or NO_REASON."""
    begin, end, head = place
    most = (values_bytes >> 4).to(tl.uint32)
    sane = (end <= most) & (begin <= end) & (end - begin == (sizes[4] + 15) // 16)
    sane &= (tile.to(tl.int32) != 0) | (begin == 0)
    sane &= ((tile + 1).to(tl.int32) != tl.cast(tiles, tl.int32)) | (end == most)
    reason = tl.where(sane, NO_REASON, _OFFSETS)
    count = count.to(tl.uint32)
    if CODEC == "exponent-packed":
        planes, escapes = head >> 8 & 0xFF, head >> 16
        codes = (head & 0xFF) + (tl.full([], 1, tl.uint32) << tl.minimum(planes, 8))
        can_be = (planes <= PLANES) & (codes <= 256)
        can_be &= escapes.to(tl.int32) <= tl.minimum(count.to(tl.int32), most_escapes)
        reason = tl.where(can_be & ((count > 0) | (head == 0)), reason, _HEAD)
    outside = kept & bits_inside(height, width) != kept
    reason = tl.where(tl.max(outside.to(tl.int32), axis=0) > 0, _BITS, reason)
    if CODEC == "exponent-packed":
        # Zero where something is wrong already: then nothing is followed.
        followed = tl.where(reason == NO_REASON, escapes, 0)
        escape = (values + begin.to(tl.int64) * 16 + sizes[3]).to(tl.pointer_type(tl.uint32))
        reason = tl.where(escapes_are_wrong(escape, followed, count), _ESCAPES, reason)
    return reason
