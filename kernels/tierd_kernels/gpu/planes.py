"""Exponent-packed records: top bytes from bit planes, the other bytes from planes of bytes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.escapes import escaped, first_escapes
from tierd_kernels.gpu.numbers import INTERPRETED
from tierd_kernels.gpu.octets import eight_bytes, octet, popcount, rows_of, window
from tierd_kernels.gpu.spread import (
    columns_of_bytes,
    columns_of_pairs,
    spread_bytes,
    woven,
)


@triton.jit
def packed(
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
    DTYPE: tl.constexpr,
    PLANES: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The elements of a tile: DTYPE [64, 64], or of 2 bytes uint32 [64, 32]. As `_elements`."""
    first_plane = record + planes_at
    zero = tl.zeros([128], tl.uint32)
    ones = popcount(half)
    b0, b1, b2, b3, b4, b5, b6, b7 = zero, zero, zero, zero, zero, zero, zero, zero
    if PLANES > 0:
        b0 = _plane(first_plane, 0, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 1:
        b1 = _plane(first_plane, 1, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 2:
        b2 = _plane(first_plane, 2, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 3:
        b3 = _plane(first_plane, 3, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 4:
        b4 = _plane(first_plane, 4, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 5:
        b5 = _plane(first_plane, 5, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 6:
        b6 = _plane(first_plane, 6, bit_plane, planes, rank, ones, CHECKED)
    if PLANES > 7:
        b7 = _plane(first_plane, 7, bit_plane, planes, rank, ones, CHECKED)
    b = b0, b1, b2, b3, b4, b5, b6, b7
    low, high = _tops(b, rank - rank, base, PLANES)
    rank2 = rank + octet(half, 0)[2]
    low2, high2 = _tops(b, rank2 - rank, base, PLANES)
    rank3 = rank2 + octet(half, 1)[2]
    low3, high3 = _tops(b, rank3 - rank, base, PLANES)
    rank4 = rank3 + octet(half, 2)[2]
    low4, high4 = _tops(b, rank4 - rank, base, PLANES)
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
def _tops(b, past, base, PLANES: tl.constexpr):
    """The top bytes of 8 elements, of those from `past` on in the planes' bits: of the first four,
    of the others. Where there are fewer, the last ones are anything.
    """
    past = past.to(tl.uint32)
    FOUR: tl.constexpr = PLANES if PLANES < 4 else 4
    low, high = _codes(b[0] >> past, b[1] >> past, b[2] >> past, b[3] >> past, FOUR)
    if PLANES > 4:
        more, more2 = _codes(b[4] >> past, b[5] >> past, b[6] >> past, b[7] >> past, PLANES - 4)
        low, high = low | more << 4, high | more2 << 4
    return low + base * 0x01010101, high + base * 0x01010101


@triton.jit
def _plane(record, NUMBER: tl.constexpr, bit_plane, planes, rank, ones, CHECKED: tl.constexpr):
    """The bits in plane NUMBER of each half row's kept elements, 0 where there is no such plane.

    record: where its bit planes begin.   bit_plane: bytes of one.   planes: how many there are.
    """
    there = planes > NUMBER
    if CHECKED:
        return window(record + NUMBER * bit_plane, rank, tl.where(there, ones, 0), CHECKED)
    else:
        return window(record + NUMBER * bit_plane, rank, 0, CHECKED) & tl.where(there, -1, 0).to(
            tl.uint32
        )


@triton.jit
def _codes(b0, b1, b2, b3, PLANES: tl.constexpr):
    """The codes of 8 elements, one byte for each: of the first four, of the others.

    b0 .. b3: bits 0 to 7 are those of 4 planes, the others are anything.
    """
    x = woven(b0, b1, 0x5140)
    if PLANES == 3:
        x = woven(x, b2, 0x5410)
    elif PLANES > 3:
        x = woven(x, woven(b2, b3, 0x5140), 0x5410)
    MASK: tl.constexpr = 0x01010101 * ((1 << PLANES) - 1)
    x = _squares(x)
    return x & MASK, x >> 4 & MASK


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
        low, low2 = eight_bytes(record, rank, ones, 1, CHECKED)
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
            low, low2 = eight_bytes(record + plane * byte_plane, rank, ones, 1, CHECKED)
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
