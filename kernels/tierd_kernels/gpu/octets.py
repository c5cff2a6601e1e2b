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
    permuted,
    spread_pairs,
    upto,
    weighed,
)


@triton.jit
def halves(bitmap, tile, AHEAD: tl.constexpr):
    """Return what a tile keeps. kept uint32 [128]: bit c for column c of half a row, one for each
    lane of 4 warps.   rank [128]: of the half's first kept element among those of the tile.
    count: of the tile.

    AHEAD: by what Triton can do for the next tile while this one is decoded.
    """
    half = tl.arange(0, 128)
    words = bitmap.to(tl.pointer_type(tl.uint32)) + tile.to(tl.int64) * 128
    kept = tl.load(words + half)
    if AHEAD:
        ones = popcount(kept)
        through = tl.cumsum(ones, axis=0)
        count = tl.gather(through, tl.full([1], 127, tl.int32), axis=0)
        return kept, through - ones, tl.sum(count, axis=0)
    else:
        # Each warp counts the whole tile for itself, four words a lane: no barrier.
        first, second, third, fourth = _four_ones(words + tl.arange(0, 32) * 4)
        count = tl.sum(first + second + third + fourth, axis=0)
        # The same words again, now as numbers of lanes; compilers see that, and read them once.
        first, second, third, fourth = _four_ones(words + half % 32 * 4)
        before = _before_in_warp(first + second + third + fourth)
        # Byte j: how many are kept in the words before word j of the four.
        within = first * 0x01010100 + second * 0x01010000 + third * 0x01000000
        rank = _of_lane(before, half >> 2)
        within = _of_lane(within, half >> 2).to(tl.uint32)
        rank += permuted(within, within, (half & 3).to(tl.uint32)).to(tl.int32)
        return kept, rank, count


@triton.jit
def first_of_rows(height, width):
    """As `halves`, of a tile in dense form, of which height and width are in the matrix."""
    half = tl.arange(0, 128)
    count = height * width
    first = half // 2 * width + tl.minimum(half % 2 * 32, width)
    return bits_inside(height, width), tl.minimum(first, count), count


@triton.jit
def bits_inside(height, width):
    """Of each half row of a tile, uint32 [128]: the bits that lie in the matrix."""
    half = tl.arange(0, 128)
    inside = tl.minimum(tl.maximum(width - half % 2 * 32, 0), 32)
    inside = tl.where(half // 2 < height, inside, 0)
    return tl.where(inside < 32, (1 << (inside & 31)) - 1, -1).to(tl.uint32)


@triton.jit
def _four_ones(pointer):
    """How many bits are set in each of four words; the first lies on a multiple of 16 bytes."""
    if INTERPRETED:
        first, second = tl.load(pointer), tl.load(pointer + 1)
        third, fourth = tl.load(pointer + 2), tl.load(pointer + 3)
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer],
            (tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            False,
            1,
        )
    return popcount(first), popcount(second), popcount(third), popcount(fourth)


@triton.jit
def _before_in_warp(numbers):
    """The sum of the numbers of the lanes before each, of its warp: [128], a lane each."""
    if INTERPRETED:
        sums = tl.cumsum(tl.reshape(numbers, [4, 32]), axis=1)
        return tl.reshape(sums, [128]) - numbers
    else:  # Triton's compares the lane before each step
        return tl.inline_asm_elementwise(
            """{
            .reg .pred there;
            .reg .s32 sum, other;
            mov.b32 sum, $1;
            shfl.sync.up.b32 other|there, sum, 1, 0, 0xffffffff;
            @there add.s32 sum, sum, other;
            shfl.sync.up.b32 other|there, sum, 2, 0, 0xffffffff;
            @there add.s32 sum, sum, other;
            shfl.sync.up.b32 other|there, sum, 4, 0, 0xffffffff;
            @there add.s32 sum, sum, other;
            shfl.sync.up.b32 other|there, sum, 8, 0, 0xffffffff;
            @there add.s32 sum, sum, other;
            shfl.sync.up.b32 other|there, sum, 16, 0, 0xffffffff;
            @there add.s32 sum, sum, other;
            sub.s32 $0, sum, $1;
            }""",
            "=r,r",
            [numbers],
            tl.int32,
            False,
            1,
        )


@triton.jit
def _of_lane(numbers, lane):
    """The number of a lane of the same warp, of which 5 bits count: [128], a lane each."""
    if INTERPRETED:
        return tl.gather(numbers, tl.arange(0, 128) // 32 * 32 + (lane & 31), axis=0)
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=r,r,r",
            [numbers, lane],
            tl.int32,
            False,
            1,
        )


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
    """The bits that are set in each uint32."""
    if INTERPRETED:
        pairs = word - (word >> 1 & 0x55555555)
        nibbles = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
        return ((nibbles + (nibbles >> 4) & 0x0F0F0F0F) * 0x01010101 >> 24).to(tl.int32)
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], tl.int32, True, 1)


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
    word = (record + (bit.to(tl.uint32) >> 5) * 4).to(tl.pointer_type(tl.uint32))
    return bits_from(word, bit, bits, CHECKED)


@triton.jit
def bits_from(word, bit, bits, CHECKED: tl.constexpr):
    """As `window`; word: pointer to the one that has the first bit."""
    low = _word(word, bits > 0, CHECKED)
    high = _word(word + 1, (bit & 31) + bits > 32, CHECKED)
    return funnel(low, high, bit)


@triton.jit
def eight_bytes(record, at, count, CHECKED: tl.constexpr):
    """The 8 bytes of the record from `at` on, as two uint32; the first `count` of them are right.

    CHECKED: read no word that none of these is in; else up to 11 bytes after them are read.
    """
    word = (record + (at.to(tl.uint32) & 0xFFFFFFFC)).to(tl.pointer_type(tl.uint32))
    past = (at & 3) + count
    first = _word(word, count > 0, CHECKED)
    second = _word(word + 1, past > 4, CHECKED)
    third = _word(word + 2, past > 8, CHECKED)
    return funnel(first, second, at * 8), funnel(second, third, at * 8)


@triton.jit
def _word(pointer, needed, CHECKED: tl.constexpr):
    if CHECKED:
        return tl.load(pointer, mask=needed, other=0)
    else:
        return tl.load(pointer)


@triton.jit
def funnel(low, high, shift):
    """The 32 bits from bit `shift` of two words; of the shift 5 bits count."""
    if INTERPRETED:
        shift = (shift & 31).to(tl.uint32)
        return low >> shift | high << 1 << (shift ^ 31)
    else:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], tl.uint32, True, 1
        )


@triton.jit
def pairs(record, kept, at, CHECKED: tl.constexpr):
    """Elements of 2 bytes from byte `at` of the record on: as `gathered`, but those of 4 columns
    come from a window. And where the next ones are.
    """
    kept = kept.to(tl.uint32)
    first, second, at = _four(record, kept & 15, at, CHECKED)
    third, fourth, at = _four(record, kept >> 4, at, CHECKED)
    return columns_of_pairs(first, second, third, fourth), at


@triton.jit
def _four(record, bits, at, CHECKED: tl.constexpr):
    ones = bytes_of_bits(bits)
    after = weighed(ones, 0x02020202, at)
    low, high = eight_bytes(record, at, after - at, CHECKED)
    low, high = spread_pairs(low, high, ones)
    return low, high, after
