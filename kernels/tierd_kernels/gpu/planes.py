"""Exponent-packed records: top bytes from bit planes, the other bytes from planes of bytes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.octets import eight_bytes, window
from tierd_kernels.gpu.spread import (
    bytes_of_bits,
    columns_of_bytes,
    columns_of_pairs,
    digits,
    spread_bytes,
    woven,
)


@triton.jit
def codes(record, bit_plane, planes, rank, ones, PLANES: tl.constexpr, CHECKED: tl.constexpr):
    """The codes of each octet's kept elements, one byte for each: of the first four, of the others.

    record: where its bit planes begin.   bit_plane: bytes of one.   planes: at most PLANES.
    """
    low = tl.zeros([512], tl.uint32)
    high = tl.zeros([512], tl.uint32)
    for plane in tl.static_range(PLANES):
        there = plane < planes
        bits = window(
            record + plane * bit_plane, rank, tl.where(there, ones, 0) if CHECKED else 0, CHECKED
        )
        four = tl.where(there, 15, 0).to(tl.uint32)
        low |= bytes_of_bits(bits & four) << plane
        high |= bytes_of_bits(bits >> 4 & four) << plane
    return low, high


@triton.jit
def turned_back(
    record,
    byte_plane,
    top,
    later,
    kept,
    ones,
    rank,
    DTYPE: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The elements [64, 64] of DTYPE, of the top bytes of each octet's kept elements.

    The record has them rotated left by one bit; its planes of the other bytes come first.
    """
    spread = digits(kept)
    zero = tl.zeros([512], tl.uint32)
    top, top2 = spread_bytes(top, later, spread, zero)
    if DTYPE.primitive_bitwidth == 16:
        low, low2 = eight_bytes(record, rank, ones, CHECKED)
        low, low2 = spread_bytes(low, low2, spread, zero)
        return columns_of_pairs(
            _back(low, top, 0x5140),
            _back(low, top, 0x7362),
            _back(low2, top2, 0x5140),
            _back(low2, top2, 0x7362),
        ).to(DTYPE, bitcast=True)
    else:
        turned = columns_of_bytes(top, top2) << 24
        for plane in tl.static_range(3):
            low, low2 = eight_bytes(record + plane * byte_plane, rank, ones, CHECKED)
            low, low2 = spread_bytes(low, low2, spread, zero)
            turned |= columns_of_bytes(low, low2) << 8 * plane
        return (turned >> 1 | turned << 31).to(DTYPE, bitcast=True)


@triton.jit
def _back(low, top, WHICH: tl.constexpr):
    """Two elements of 2 bytes each: low and top byte, rotated right by one bit."""
    turned = woven(low, top, WHICH)
    return (turned >> 1 & 0x7FFF7FFF) | (turned << 15 & 0x80008000)
