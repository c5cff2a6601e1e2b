"""The octets of a tile: which elements they keep, and how those are fetched from the record.

An octet is 8 columns of one row. Tensors of one number for each octet are [512]. Every fetch is
bounded by the rank and the number of kept elements of its octet: see `decode.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def octets(bitmap, tile, height, width, MASKED: tl.constexpr):
    """Return what the octets of a tile keep, and what the tile does.

    kept [512]: bit j for column j of the octet.   ones [512]: how many those are.
    rank [512]: of the octet's first kept element among those of the tile.
    count: of the tile.   outside: whether there are bits outside the matrix; they are not kept.
    """
    if MASKED:
        # Words of half a row: one for each lane of 4 warps, so that the scan is short.
        word = tl.arange(0, 128)
        stored = tl.load(bitmap.to(tl.pointer_type(tl.uint32)) + tile.to(tl.int64) * 128 + word)
        inside = tl.minimum(tl.maximum(width - word % 2 * 32, 0), 32)
        inside = tl.where(word // 2 < height, inside, 0)
        allowed = tl.where(inside < 32, (1 << (inside & 31)) - 1, -1).to(tl.uint32)
        halves = stored & allowed
        total = _popcount(halves)
        # One sum for two questions: there are at most 4096 elements.
        found = tl.sum(tl.where(stored == halves, total, total + 8192), axis=0)
        first = tl.cumsum(total, axis=0) - total
        octet = tl.arange(0, 512)
        half = tl.gather(halves, octet // 4, axis=0)
        bit = (octet % 4 * 8).to(tl.uint32)
        kept = (half >> bit & 0xFF).to(tl.int32)
        rank = tl.gather(first, octet // 4, axis=0) + _popcount(half & (1 << bit) - 1)
        ones = _popcount(kept.to(tl.uint32))
        return kept, ones, rank, found % 8192, found >= 8192
    else:
        octet = tl.arange(0, 512)
        row = octet // 8
        left = octet % 8 * 8
        ones = tl.where(row < height, tl.minimum(tl.maximum(width - left, 0), 8), 0)
        return (1 << ones) - 1, ones, row * width + left, height * width, height > 64


@triton.jit
def _popcount(word):
    """The bits that are set in each uint32; compilers know this form, and have an instruction."""
    pairs = word - (word >> 1 & 0x55555555)
    nibbles = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return ((nibbles + (nibbles >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit
def gathered(item, kept, rank):
    """The items at the ranks of the kept elements, zeros elsewhere, [64, 64]."""
    zero = tl.zeros([512], item.dtype.element_ty)
    e0 = tl.load(item + rank, mask=(kept & 1) != 0, other=zero)
    rank += kept & 1
    e1 = tl.load(item + rank, mask=(kept & 2) != 0, other=zero)
    rank += kept >> 1 & 1
    e2 = tl.load(item + rank, mask=(kept & 4) != 0, other=zero)
    rank += kept >> 2 & 1
    e3 = tl.load(item + rank, mask=(kept & 8) != 0, other=zero)
    rank += kept >> 3 & 1
    e4 = tl.load(item + rank, mask=(kept & 16) != 0, other=zero)
    rank += kept >> 4 & 1
    e5 = tl.load(item + rank, mask=(kept & 32) != 0, other=zero)
    rank += kept >> 5 & 1
    e6 = tl.load(item + rank, mask=(kept & 64) != 0, other=zero)
    rank += kept >> 6 & 1
    e7 = tl.load(item + rank, mask=(kept & 128) != 0, other=zero)
    return joined(e0, e1, e2, e3, e4, e5, e6, e7)


@triton.jit
def window(record, bit, bits):
    """The 32 bits of the record from `bit` on; of them the first `bits` are right, at most 32.

    Where `bits` is 0 nothing is read. A second word is read only where they reach into it.
    """
    word = record.to(tl.pointer_type(tl.uint32)) + (bit >> 5)
    shift = bit & 31
    low = tl.load(word, mask=bits > 0, other=0)
    high = tl.load(word + 1, mask=shift + bits > 32, other=0)
    return _funnel(low, high, shift)


@triton.jit
def eight_bytes(record, at, nbytes):
    """The 8 bytes of the record from `at` on, as uint64; the first `nbytes` of them are right."""
    word = record.to(tl.pointer_type(tl.uint32)) + (at >> 2)
    past = (at & 3) + nbytes
    first = tl.load(word, mask=nbytes > 0, other=0)
    second = tl.load(word + 1, mask=past > 4, other=0)
    third = tl.load(word + 2, mask=past > 8, other=0)
    shift = (at & 3) * 8
    low = _funnel(first, second, shift).to(tl.uint64)
    return low | _funnel(second, third, shift).to(tl.uint64) << 32


@triton.jit
def _funnel(low, high, shift):
    """The 32 bits from bit `shift`, 0 to 31, of two words: one instruction, known by this form."""
    return low >> shift.to(tl.uint32) | high << 1 << (shift ^ 31).to(tl.uint32)


@triton.jit
def pairs(record, kept, ones, rank, DTYPE: tl.constexpr):
    """Elements of 2 bytes: as `gathered`, but each octet's come from windows of its record."""
    first = eight_bytes(record, rank * 2, tl.minimum(ones, 4) * 2)
    second = eight_bytes(record, rank * 2 + 8, tl.maximum(ones - 4, 0) * 2)
    before = _before(kept)
    e0 = _pair(first, second, before, kept, 0)
    e1 = _pair(first, second, before, kept, 1)
    e2 = _pair(first, second, before, kept, 2)
    e3 = _pair(first, second, before, kept, 3)
    e4 = _pair(first, second, before, kept, 4)
    e5 = _pair(first, second, before, kept, 5)
    e6 = _pair(first, second, before, kept, 6)
    e7 = _pair(first, second, before, kept, 7)
    return joined(e0, e1, e2, e3, e4, e5, e6, e7).to(DTYPE, bitcast=True)


@triton.jit
def _pair(first, second, before, kept, COLUMN: tl.constexpr):
    number = before >> 4 * COLUMN
    half = tl.where((number & 4) != 0, second, first)
    element = (half >> ((number & 3) * 16).to(tl.uint64)).to(tl.uint32) & 0xFFFF
    return tl.where((kept >> COLUMN & 1) != 0, element, 0).to(tl.uint16)


@triton.jit
def picked(packed, kept, BITS: tl.constexpr):
    """Elements of BITS bits that lie side by side in uint64 `packed`, at the columns that are kept.

    uint8 [64, 64], zeros elsewhere.
    """
    before = _before(kept)
    e0 = _one(packed, before, kept, 0, BITS)
    e1 = _one(packed, before, kept, 1, BITS)
    e2 = _one(packed, before, kept, 2, BITS)
    e3 = _one(packed, before, kept, 3, BITS)
    e4 = _one(packed, before, kept, 4, BITS)
    e5 = _one(packed, before, kept, 5, BITS)
    e6 = _one(packed, before, kept, 6, BITS)
    e7 = _one(packed, before, kept, 7, BITS)
    return joined(e0, e1, e2, e3, e4, e5, e6, e7)


@triton.jit
def _one(packed, before, kept, COLUMN: tl.constexpr, BITS: tl.constexpr):
    shift = (before >> 4 * COLUMN & 7) * BITS
    element = (packed >> shift.to(tl.uint64)).to(tl.uint32) & ((1 << BITS) - 1)
    return tl.where((kept >> COLUMN & 1) != 0, element, 0).to(tl.uint8)


@triton.jit
def _before(kept):
    """How many elements are kept before each column of the octet: 8 numbers of 4 bits, uint32."""
    spread = kept.to(tl.uint32)
    spread = (spread | spread << 12) & 0x000F000F
    spread = (spread | spread << 6) & 0x03030303
    spread = (spread | spread << 3) & 0x11111111
    return spread * 0x11111110  # sums of at most 7 carry nothing


@triton.jit
def joined(e0, e1, e2, e3, e4, e5, e6, e7):
    """[64, 64] of the columns of all octets: e0 are the first ones, [512]."""
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), [64, 64])
