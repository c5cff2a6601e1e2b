"""Levels of int8 and int4 as numbers: exact in every dtype."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.numbers import INTERPRETED, widened
from tierd_kernels.gpu.spread import columns_of_bytes, columns_of_pairs, woven


@triton.jit
def numbers_of(low, high, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The levels in the bytes of two words of 4 columns, as DTYPE [128, 8], or as
    words of two.

    A byte is the level + 2^(BITS - 1).
    """
    OFFSET: tl.constexpr = 1 << (BITS - 1)
    if DTYPE.primitive_bitwidth == 32:
        # 2^23 + byte, of which the mantissa's last bits are the byte.
        number = columns_of_bytes(low, high) | 0x4B000000
        return (number.to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)).to(DTYPE)
    else:
        return columns_of_pairs(
            _two(low, 0x0504, BITS, DTYPE),
            _two(low, 0x0706, BITS, DTYPE),
            _two(high, 0x0504, BITS, DTYPE),
            _two(high, 0x0706, BITS, DTYPE),
        )


@triton.jit
def _two(word, WHICH: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Two levels side by side: the byte becomes the end of a mantissa, and what it adds goes."""
    if tl.float16 == DTYPE:  # 1024 + byte - (1024 + 128 or 8)
        number = woven(tl.full(word.shape, 0x64646464, tl.uint32), word, WHICH)
        more = tl.full(word.shape, 0x64806480 if BITS == 8 else 0x64086408, tl.uint32)
    elif BITS == 4:  # 128 + byte - (128 + 8)
        number = woven(tl.full(word.shape, 0x43434343, tl.uint32), word, WHICH)
        more = tl.full(word.shape, 0x43084308, tl.uint32)
    else:  # a mantissa of 7 bits: 128 + bits 0 to 6 - (128, or 256 where the level is negative)
        exponent = tl.full(word.shape, 0x43434343, tl.uint32)
        number = woven(exponent, word & 0x7F7F7F7F, WHICH)
        more = woven(exponent, (word ^ 0x80808080) & 0x80808080, WHICH)
    return _difference(number, more, DTYPE)


@triton.jit
def _difference(number, more, DTYPE: tl.constexpr):
    """Two numbers of DTYPE in a word, less two others; exact here."""
    if INTERPRETED:
        first = _one(number & 0xFFFF, DTYPE) - _one(more & 0xFFFF, DTYPE)
        second = _one(number >> 16, DTYPE) - _one(more >> 16, DTYPE)
        return _bits(first, DTYPE) | _bits(second, DTYPE) << 16
    elif tl.float16 == DTYPE:
        return tl.inline_asm_elementwise(
            "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [number, more], tl.uint32, True, 1
        )
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 minus; mov.b32 minus, 0xBF80BF80; fma.rn.bf16x2 $0, $2, minus, $1; }",
            "=r,r,r",
            [number, more],
            tl.uint32,
            True,
            1,
        )


@triton.jit
def _one(bits, DTYPE: tl.constexpr):
    if tl.float16 == DTYPE:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return widened(bits)


@triton.jit
def _bits(number, DTYPE: tl.constexpr):
    if tl.float16 == DTYPE:
        return number.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        return number.to(tl.uint32, bitcast=True) >> 16
