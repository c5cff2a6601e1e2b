"""Exponent-packed records: top bytes from bit planes, the other bytes from planes of bytes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.escapes import escaped, first_escapes
from tierd_kernels.gpu.numbers import INTERPRETED
from tierd_kernels.gpu.octets import bits_from, eight_bytes, octet, popcount, rows_of
from tierd_kernels.gpu.spread import (
    columns_of_bytes,
    columns_of_pairs,
    permuted,
    spread_bytes,
    woven,
)


@triton.jit
def packed(
    record,
    half,
    rank,
    head,
    sizes,
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The elements of a tile: DTYPE [64, 64], or of 2 bytes uint32 [64, 32]. As `_elements`."""
    byte_plane, bit_plane, planes_at, escapes_at, _end = sizes
    planes, escapes = head >> 8 & 0xFF, head >> 16
    escape = (record + escapes_at).to(tl.pointer_type(tl.uint32))
    word = record + (planes_at + (rank.to(tl.uint32) >> 5) * 4)
    zero = tl.zeros([128], tl.uint32)
    ones = popcount(half)
    b0, b1, b2, b3, b4, b5, b6, b7 = zero, zero, zero, zero, zero, zero, zero, zero
    if PLANES > 0:
        b0 = _plane(word, 0, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 1:
        b1 = _plane(word, 1, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 2:
        b2 = _plane(word, 2, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 3:
        b3 = _plane(word, 3, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 4:
        b4 = _plane(word, 4, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 5:
        b5 = _plane(word, 5, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 6:
        b6 = _plane(word, 6, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 7:
        b7 = _plane(word, 7, bit_plane, planes, rank, ones, CHECKED)
    # Of the bits of a code those of planes that are there count.
    mask = (tl.full([], 0x01010101, tl.uint32) << planes) - 0x01010101
    base = permuted(head, head, head * 0)
    rank2 = rank + octet(half, 0)[2]
    rank3 = rank2 + octet(half, 1)[2]
    rank4 = rank3 + octet(half, 2)[2]
    b = b0, b1, b2, b3, b4, b5, b6, b7
    # 16 bits of each of two planes are shifted at once: what two octets have.
    two = _two_planes(b, PLANES)
    low, high = _tops(two, rank - rank, base, mask, PLANES)
    low2, high2 = _tops(two, rank2 - rank, base, mask, PLANES)
    past = (rank3 - rank).to(tl.uint32)
    b = (
        b0 >> past,
        b1 >> past,
        b2 >> past,
        b3 >> past,
        b4 >> past,
        b5 >> past,
        b6 >> past,
        b7 >> past,
    )
    two = _two_planes(b, PLANES)
    low3, high3 = _tops(two, rank - rank, base, mask, PLANES)
    low4, high4 = _tops(two, rank4 - rank3, base, mask, PLANES)
    if escapes > 0:
        index, left = first_escapes(escape, escapes, rank)
        while left > 0:
            this = tl.load(escape + index, mask=index < escapes, other=0xFFFF)
            low, high = escaped(this, low, high, rank)
            low2, high2 = escaped(this, low2, high2, rank2)
            low3, high3 = escaped(this, low3, high3, rank3)
            low4, high4 = escaped(this, low4, high4, rank4)
            index += 1
            left = left >> 1
    first = _turned_back(record, byte_plane, low, high, half, 0, rank, DTYPE, CHECKED)
    second = _turned_back(record, byte_plane, low2, high2, half, 1, rank2, DTYPE, CHECKED)
    third = _turned_back(record, byte_plane, low3, high3, half, 2, rank3, DTYPE, CHECKED)
    fourth = _turned_back(record, byte_plane, low4, high4, half, 3, rank4, DTYPE, CHECKED)
    return rows_of(first, second, third, fourth)


@triton.jit
def _two_planes(b, PLANES: tl.constexpr):
    """The first 16 bits of planes 0 and 1, 2 and 3, 4 and 5, 6 and 7. Of a plane without its fellow
    all, in the lower half what is asked for.
    """
    first = woven(b[0], b[1], 0x5410) if PLANES > 1 else b[0]
    second = woven(b[2], b[3], 0x5410) if PLANES > 3 else b[2]
    third = woven(b[4], b[5], 0x5410) if PLANES > 5 else b[4]
    fourth = woven(b[6], b[7], 0x5410) if PLANES > 7 else b[6]
    return first, second, third, fourth


@triton.jit
def _tops(two, past, base, mask, PLANES: tl.constexpr):
    """The top bytes of 8 elements, those from `past` on, at most 8, in the planes' bits: of the
    first four, of the others. Where there are fewer, the last ones are anything.
    """
    past = past.to(tl.uint32)
    x = _squares(woven(two[0] >> past, two[1] >> past, 0x6420))
    low, high = x, x >> 4
    if PLANES > 4:
        more = _squares(woven(two[2] >> past, two[3] >> past, 0x6420))
        low = low & 0x0F0F0F0F | (more & 0x0F0F0F0F) << 4
        high = high & 0x0F0F0F0F | more & 0xF0F0F0F0
    return (low & mask) + base, (high & mask) + base


@triton.jit
def _plane(word, NUMBER: tl.constexpr, bit_plane, planes, rank, ones, CHECKED: tl.constexpr):
    """The bits in plane NUMBER of each half row's kept elements; anything where there is no such.

    word: pointer to the word of plane 0 that has the first one.   bit_plane: bytes of a plane.
    """
    bits = tl.where(planes > NUMBER, ones, 0) if CHECKED else 32
    return bits_from(
        (word + NUMBER * bit_plane).to(tl.pointer_type(tl.uint32)), rank, bits, CHECKED
    )


@triton.jit
def _squares(x):
    """Bit j of byte i as bit i of byte j, for i and j below 4; bits 4 to 7 of the bytes likewise.

    Source: transpose8 of Warren, Hacker's Delight, 7-3: two of its three steps.
    """
    t = (x ^ x >> 7) & 0x00AA00AA
    x = x ^ t ^ t << 7
    t = (x ^ x >> 14) & 0x0000CCCC
    return x ^ t ^ t << 14


@triton.jit
def _turned_back(
    record,
    byte_plane,
    top,
    later,
    half,
    NUMBER: tl.constexpr,
    rank,
    DTYPE: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The elements of DTYPE [128, 8], or words of two [128, 4], of the top bytes of each octet's.

    The record has them rotated left by one bit; its planes of the other bytes come first.
    """
    zero = tl.zeros([128], tl.uint32)
    _kept, spread, ones = octet(half, NUMBER)
    top, top2 = spread_bytes(top, later, spread, zero)
    if DTYPE.primitive_bitwidth == 16:
        low, low2 = eight_bytes(record, rank, ones, CHECKED)
        low, low2 = spread_bytes(low, low2, spread, zero)
        low, low2 = _signs_changed(low), _signs_changed(low2)
        return columns_of_pairs(
            _back(low, top, 0x5140),
            _back(low, top, 0x7362),
            _back(low2, top2, 0x5140),
            _back(low2, top2, 0x7362),
        )
    else:
        turned = columns_of_bytes(top, top2) << 24
        for plane in tl.static_range(3):
            low, low2 = eight_bytes(record + plane * byte_plane, rank, ones, CHECKED)
            low, low2 = spread_bytes(low, low2, spread, zero)
            turned |= columns_of_bytes(low, low2) << 8 * plane
        return (turned >> 1 | turned << 31).to(DTYPE, bitcast=True)


@triton.jit
def _signs_changed(low):
    """Bit 0 changed between neighbours, so that a word of two of them can be turned as one."""
    neighbours = woven(low, low, 0x2301)
    if INTERPRETED:
        return (low & 0xFEFEFEFE) | (neighbours & 0x01010101)
    else:  # written so, it would be two instructions
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0x01010101, 0xD8;",
            "=r,r,r",
            [low, neighbours],
            tl.uint32,
            True,
            1,
        )


@triton.jit
def _back(low, top, WHICH: tl.constexpr):
    """Two elements of 2 bytes each: low and top byte, rotated right by one bit."""
    turned = woven(low, top, WHICH)
    return turned >> 1 | turned << 31
