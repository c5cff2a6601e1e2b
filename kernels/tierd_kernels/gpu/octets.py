"""The octets of a tile: which elements they keep, and how those are fetched from the record.

An octet is 8 columns of one row. Tensors of one number for each octet are [512]. Every fetch begins
at an octet's rank, which is at most the number of elements of the tile: see `decode.py`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.spread import bytes_of_bits, columns_of_pairs, digits, spread_pairs


@triton.jit
def halves(bitmap, tile, height, width, MASKED: tl.constexpr, SCALAR: tl.constexpr):
    """Return which elements a tile keeps, and what the tile does.

    kept uint32 [128]: bit c for column c of half a row: one for each lane of 4 warps, so that
    the scan is short.   rank [128]: of the half's first kept element among those of the tile.
    count: of the tile.   outside: whether there are bits outside the matrix.
    SCALAR: count and outside are scalars; else they may be [128], the same in all: that is cheaper.
    """
    half = tl.arange(0, 128)
    left = half % 2 * 32
    row = half // 2
    inside = tl.where(row < height, tl.minimum(tl.maximum(width - left, 0), 32), 0)
    allowed = tl.where(inside < 32, (1 << (inside & 31)) - 1, -1).to(tl.uint32)
    if MASKED:
        kept = tl.load(bitmap.to(tl.pointer_type(tl.uint32)) + tile.to(tl.int64) * 128 + half)
        # One sum for two questions: there are at most 4096 elements.
        ones = _popcount(kept)
        ones = tl.where((kept & allowed) == kept, ones, ones + 8192)
        upto = tl.cumsum(ones, axis=0)
        found = tl.sum(ones, axis=0) if SCALAR else tl.gather(upto, half * 0 + 127, axis=0)
        return kept, upto - ones & 8191, found & 8191, found > 8191
    else:
        count = height * width
        return allowed, tl.minimum(row * width + tl.minimum(left, width), count), count, height > 64


@triton.jit
def octets(half, first):
    """Return kept [512]: bit j for column j of the octet; ones [512]: how many those are;
    rank [512]: of the octet's first kept element. half, first: see `halves`.
    """
    octet = tl.arange(0, 512)
    bit = (octet % 4 * 8).to(tl.uint32)
    both = tl.gather(half.to(tl.uint64) | first.to(tl.uint64) << 32, octet // 4, axis=0)
    half = both.to(tl.uint32)
    rank = (both >> 32).to(tl.int32) + _popcount(half & (1 << bit) - 1)
    kept = half >> bit & 0xFF
    return kept.to(tl.int32), (digits(kept) * 0x11111111 >> 28).to(tl.int32), rank


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
def window(record, bit, bits, CHECKED: tl.constexpr):
    """The 32 bits of the record from `bit` on; of them the first `bits` are right, at most 32.

    CHECKED: read no word that none of these bits is in; else up to 7 bytes after them are read.
    """
    word = record.to(tl.pointer_type(tl.uint32)) + (bit.to(tl.uint32) >> 5)
    shift = bit & 31
    low = _word(word, bits > 0, CHECKED)
    high = _word(word + 1, shift + bits > 32, CHECKED)
    return _funnel(low, high, shift)


@triton.jit
def eight_bytes(record, at, nbytes, CHECKED: tl.constexpr):
    """The 8 bytes of the record from `at` on, as two uint32; the first `nbytes` of them are right.

    CHECKED: read no word that none of these is in; else up to 11 bytes after them are read.
    """
    word = record.to(tl.pointer_type(tl.uint32)) + (at.to(tl.uint32) >> 2)
    past = (at & 3) + nbytes
    first = _word(word, nbytes > 0, CHECKED)
    second = _word(word + 1, past > 4, CHECKED)
    third = _word(word + 2, past > 8, CHECKED)
    shift = (at & 3) * 8
    return _funnel(first, second, shift), _funnel(second, third, shift)


@triton.jit
def _word(pointer, needed, CHECKED: tl.constexpr):
    if CHECKED:
        return tl.load(pointer, mask=needed, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def _funnel(low, high, shift):
    """The 32 bits from bit `shift`, 0 to 31, of two words: one instruction, known by this form."""
    return low >> shift.to(tl.uint32) | high << 1 << (shift ^ 31).to(tl.uint32)


@triton.jit
def pairs(record, kept, rank, CHECKED: tl.constexpr):
    """Elements of 2 bytes: as `gathered`, but those of 4 columns come from a window. uint16."""
    kept = kept.to(tl.uint32)
    first, second, ones = _four(record, kept & 15, rank, CHECKED)
    third, fourth, _ = _four(record, kept >> 4, rank + ones, CHECKED)
    return columns_of_pairs(first, second, third, fourth)


@triton.jit
def _four(record, bits, rank, CHECKED: tl.constexpr):
    ones = bytes_of_bits(bits)
    count = (ones * 0x01010101 >> 24).to(tl.int32)
    low, high = eight_bytes(record, rank * 2, count * 2, CHECKED)
    low, high = spread_pairs(low, high, ones)
    return low, high, count


@triton.jit
def joined(e0, e1, e2, e3, e4, e5, e6, e7):
    """[64, 64] of the columns of all octets: e0 are the first ones, [512]."""
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), [64, 64])
