"""The octets of a tile: which elements they keep, and how those are fetched from the record.

An octet is 8 columns of one row, a quarter of what a lane has; tensors of a number for one of them
are [128]. Every fetch begins at a rank, at most the number of elements of the tile: `decode.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.numbers import INTERPRETED
from tierd_kernels.gpu.spread import (
    bytes_of_bits,
    columns_of_pairs,
    digits,
    joined,
    spread_pairs,
    upto,
    weighed,
)


@triton.jit
def halves(bitmap, tile, height, width, allowed, MASKED: tl.constexpr, SCALAR: tl.constexpr):
    """Return which elements a tile keeps, and what the tile does.

    kept uint32 [128]: bit c for column c of half a row: one for each lane of 4 warps, so that
    the scan is short.   rank [128]: of the half's first kept element among those of the tile.
    count: of the tile.   outside: whether there are bits outside the matrix.
    SCALAR: count and outside are scalars; else they may be [128], the same in all: that is cheaper.
    allowed: the `bits_inside` of height and width.
    """
    half = tl.arange(0, 128)
    if MASKED:
        kept = tl.load(bitmap.to(tl.pointer_type(tl.uint32)) + tile.to(tl.int64) * 128 + half)
        # One sum for two questions: there are at most 4096 elements.
        ones = popcount(kept)
        ones = tl.where((kept & allowed) == kept, ones, ones + 8192)
        through = tl.cumsum(ones, axis=0)
        last = tl.full([1], 127, tl.int32) if SCALAR else half * 0 + 127
        found = tl.gather(through, last, axis=0)
        if SCALAR:
            found = tl.sum(found, axis=0)
        return kept, through - ones & 8191, found & 8191, found > 8191
    else:
        count = height * width
        first = half // 2 * width + tl.minimum(half % 2 * 32, width)
        return allowed, tl.minimum(first, count), count, height > 64


@triton.jit
def bits_inside(height, width):
    """Of each half row of a tile, uint32 [128]: the bits that lie in the matrix."""
    half = tl.arange(0, 128)
    inside = tl.minimum(tl.maximum(width - half % 2 * 32, 0), 32)
    inside = tl.where(half // 2 < height, inside, 0)
    return tl.where(inside < 32, (1 << (inside & 31)) - 1, -1).to(tl.uint32)


@triton.jit
def octet(half, NUMBER: tl.constexpr):
    """Return kept [128]: bit j for column j of octet NUMBER of each half row; spread: its `digits`;
    ones: how many those are.
    """
    kept = half >> 8 * NUMBER & 0xFF
    spread = digits(kept)
    return kept.to(tl.int32), spread, (upto(spread) >> 28).to(tl.int32)


@triton.jit
def rows_of(first, second, third, fourth):
    """[64, 64] of the octets of all half rows, each [128, 8]; [64, 32] of words of two columns."""
    both = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(tl.permute(both, [0, 2, 3, 1]), [64, 8 * first.shape[1]])


@triton.jit
def halves_of(words, DTYPE: tl.constexpr):
    """[64, 64] of DTYPE, of 2 bytes: from words of two columns."""
    both = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(both, [64, 64]).to(DTYPE, bitcast=True)


@triton.jit
def popcount(word):
    """The bits that are set in each uint32; compilers know this form, and have an instruction."""
    pairs = word - (word >> 1 & 0x55555555)
    nibbles = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return ((nibbles + (nibbles >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)


@triton.jit
def gathered(item, kept, rank):
    """The items at the ranks of the kept elements, zeros elsewhere: [128, 8], or words of two."""
    zero = tl.zeros([128], item.dtype.element_ty)
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
    if item.dtype.element_ty.primitive_bitwidth == 16:
        return columns_of_pairs(_pair(e0, e1), _pair(e2, e3), _pair(e4, e5), _pair(e6, e7))
    else:
        return joined(e0, e1, e2, e3, e4, e5, e6, e7)


@triton.jit
def _pair(first, second):
    low = first.to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | second.to(tl.uint16, bitcast=True).to(tl.uint32) << 16


@triton.jit
def window(record, bit, bits, CHECKED: tl.constexpr):
    """The 32 bits of the record from `bit` on; of them the first `bits` are right, at most 32.

    CHECKED: read no word that none of these bits is in; else up to 7 bytes after them are read.
    """
    word = record.to(tl.pointer_type(tl.uint32)) + (bit.to(tl.uint32) >> 5)
    low = _word(word, bits > 0, CHECKED)
    high = _word(word + 1, (bit & 31) + bits > 32, CHECKED)
    return _funnel(low, high, bit)


@triton.jit
def eight_bytes(record, item, items, ITEM_BYTES: tl.constexpr, CHECKED: tl.constexpr):
    """The 8 bytes of the record from `item` on, as two uint32; the first `items` of them are right.

    CHECKED: read no word that none of these is in; else up to 11 bytes after them are read.
    """
    ITEMS: tl.constexpr = 4 // ITEM_BYTES
    word = record.to(tl.pointer_type(tl.uint32)) + item.to(tl.uint32) // ITEMS
    past = (item & ITEMS - 1) + items
    first = _word(word, items > 0, CHECKED)
    second = _word(word + 1, past > ITEMS, CHECKED)
    third = _word(word + 2, past > 2 * ITEMS, CHECKED)
    shift = item * (8 * ITEM_BYTES)
    return _funnel(first, second, shift), _funnel(second, third, shift)


@triton.jit
def _word(pointer, needed, CHECKED: tl.constexpr):
    if CHECKED:
        return tl.load(pointer, mask=needed, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def _funnel(low, high, shift):
    """The 32 bits from bit `shift` of two words; of the shift 5 bits count."""
    if INTERPRETED:
        shift = (shift & 31).to(tl.uint32)
        return low >> shift | high << 1 << (shift ^ 31)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], tl.uint32, True, 1
        )


@triton.jit
def pairs(record, kept, rank, CHECKED: tl.constexpr):
    """Elements of 2 bytes: as `gathered`, but those of 4 columns come from a window. And the rank
    after them.
    """
    kept = kept.to(tl.uint32)
    first, second, rank = _four(record, kept & 15, rank, CHECKED)
    third, fourth, rank = _four(record, kept >> 4, rank, CHECKED)
    return columns_of_pairs(first, second, third, fourth), rank


@triton.jit
def _four(record, bits, rank, CHECKED: tl.constexpr):
    ones = bytes_of_bits(bits)
    after = weighed(ones, 0x01010101, rank)
    low, high = eight_bytes(record, rank, after - rank, 2, CHECKED)
    low, high = spread_pairs(low, high, ones)
    return low, high, after
