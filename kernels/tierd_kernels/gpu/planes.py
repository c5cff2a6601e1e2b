"""Exponent-packed records: top bytes from bit planes, the other bytes from planes of bytes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.octets import eight_bytes, gathered, picked, window


@triton.jit
def codes(record, bit_plane, planes, rank, ones, PLANES: tl.constexpr):
    """The codes of each octet's kept elements, one byte for each, as uint64 [512].

    record: where its bit planes begin.   bit_plane: bytes of one.   planes: at most PLANES.
    """
    low = tl.zeros([512], tl.uint32)
    high = tl.zeros([512], tl.uint32)
    for plane in tl.static_range(PLANES):
        bits = window(record + plane * bit_plane, rank, tl.where(plane < planes, ones, 0))
        bits = tl.where(plane < planes, bits, 0)
        # Bit i of 4 goes to byte i: the copies of the product do not overlap.
        low |= ((bits & 15) * 0x00204081 & 0x01010101) << plane
        high |= ((bits >> 4 & 15) * 0x00204081 & 0x01010101) << plane
    return low.to(tl.uint64) | high.to(tl.uint64) << 32


@triton.jit
def turned_back(
    record,
    byte_plane,
    top,
    kept,
    ones,
    rank,
    DTYPE: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """The elements [64, 64] of DTYPE, of the top bytes of each octet's kept elements, uint64.

    The record has them rotated left by one bit; its planes of the other bytes come first.
    """
    if DTYPE.primitive_bitwidth == 16:
        turned = picked(top, kept, 8).to(tl.uint16) << 8
        turned |= _low(record, kept, ones, rank, VARIANT).to(tl.uint16)
        bits = turned >> 1 | turned << 15
    else:
        turned = picked(top, kept, 8).to(tl.uint32) << 24
        for plane in tl.static_range(3):
            low = _low(record + plane * byte_plane, kept, ones, rank, VARIANT)
            turned |= low.to(tl.uint32) << 8 * plane
        bits = turned >> 1 | turned << 31
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _low(record, kept, ones, rank, VARIANT: tl.constexpr):
    if VARIANT == "window":
        return picked(eight_bytes(record, rank, ones), kept, 8)
    return gathered(record, kept, rank)
