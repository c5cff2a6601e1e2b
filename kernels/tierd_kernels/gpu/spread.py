"""Elements that lie side by side in a record, spread over the columns of an octet that are kept.

Four bytes at a time: an instruction (`prmt`) takes each byte of a word from any of eight; where its
*selector* points at a byte that is zero, nothing is kept. Selectors follow from the octet's bits by
multiplication: no table, no step for each element. Tensors are uint32 [128].
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.numbers import INTERPRETED


@triton.jit
def permuted(low, high, selector):
    """Byte i of the result is that of (low, high), bytes 0 to 7, which digit i of selector says.

    Digits are the lowest four of base 16 and below 8.
    """
    if INTERPRETED:
        both = low.to(tl.uint64) | high.to(tl.uint64) << 32
        found = low * 0
        for i in tl.static_range(4):
            place = (selector >> 4 * i & 7) * 8
            found |= ((both >> place.to(tl.uint64)).to(tl.uint32) & 0xFF) << 8 * i
        return found
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], tl.uint32, True, 1
        )


@triton.constexpr_function
def _woven_by(which):
    return f"prmt.b32 $0, $1, $2, {which:#06x};"


@triton.jit
def woven(low, high, WHICH: tl.constexpr):
    """As `permuted` with a selector that is known: an operand of the instruction, no register."""
    if INTERPRETED:
        return permuted(low, high, low * 0 + WHICH)
    else:
        return tl.inline_asm_elementwise(
            _woven_by(WHICH), "=r,r,r", [low, high], tl.uint32, True, 1
        )


@triton.jit
def digits(kept):
    """Bit j of each octet as digit j of base 16."""
    spread = kept.to(tl.uint32)
    spread = (spread | spread << 12) & 0x000F000F
    spread = (spread | spread << 6) & 0x03030303
    return (spread | spread << 3) & 0x11111111


@triton.jit
def spread_bytes(low, high, spread, gap):
    """The bytes of (low, high) at the columns that are kept, `gap` elsewhere: columns 0-3 and 4-7.

    spread: `digits` of what the octet keeps.   gap: 4 equal bytes.
    """
    later = shifted(low, high, before_later(spread) * 8)
    return permuted(low, gap, selector(spread)), permuted(later, gap, selector(spread >> 16))


@triton.jit
def spread_nibbles(word, spread):
    """As `spread_bytes`, of the 8 nibbles of a word; 8 elsewhere."""
    gap = tl.full(word.shape, 0x08080808, tl.uint32)
    low = permuted(_bytes_of_nibbles(word), gap, selector(spread))
    later = _bytes_of_nibbles(word >> before_later(spread) * 4)
    return low, permuted(later, gap, selector(spread >> 16))


@triton.jit
def _bytes_of_nibbles(word):
    """The 4 lowest nibbles as bytes."""
    halves = woven(word, word * 0, 0x4140)
    return (halves | halves << 4) & 0x0F0F0F0F


@triton.jit
def selector(spread):
    """Digit j: how many columns are kept before column j, and 4 more if it is not itself."""
    return spread * 0x110C + 0x4444


@triton.jit
def before_later(spread):
    """How many of columns 0 to 3 are kept: the last digit of a product that has four of them."""
    product = spread * 0x11110000
    if INTERPRETED:
        return product >> 28
    else:  # seen by the compiler it would be merged with what follows, to two instructions
        return tl.inline_asm_elementwise(
            "shr.u32 $0, $1, 28;", "=r,r", [product], tl.uint32, True, 1
        )


@triton.jit
def upto(spread):
    """Digit j: how many columns are kept up to column j, itself included."""
    return spread * 0x11111111


@triton.jit
def shifted(low, high, bits):
    """The 32 bits from bit `bits` of (low, high), 0 to 32."""
    both = low.to(tl.uint64) | high.to(tl.uint64) << 32
    return (both >> bits.to(tl.uint64)).to(tl.uint32)


@triton.jit
def bytes_of_bits(bits):
    """Bit j of four as byte j."""
    return bits * 0x00204081 & 0x01010101


@triton.jit
def spread_pairs(low, high, ones):
    """Elements of 2 bytes in (low, high) at the columns of 4 that are kept: words of two columns.

    ones: byte j is 1 if column j is kept, else 0.
    """
    zero = low * 0
    later = shifted(low, high, weighed(ones, 0x00001010, zero))
    first = permuted(low, zero, ones * 0x21BC + 0x5454)
    return first, permuted(later, zero, _weighed_later(ones, 0xBC0021BC, zero + 0x5454))


@triton.jit
def weighed(ones, WEIGHTS: tl.constexpr, before):
    """`before` and the bytes of `ones`, each times that of WEIGHTS."""
    if INTERPRETED:
        found = before
        for i in tl.static_range(4):
            found += ((ones >> 8 * i & 0xFF) * (WEIGHTS >> 8 * i & 0xFF)).to(before.dtype)
        return found
    else:
        weights = tl.full(ones.shape, WEIGHTS, tl.uint32)
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [ones, weights, before],
            before.dtype,
            True,
            1,
        )


@triton.jit
def _weighed_later(ones, WEIGHTS: tl.constexpr, before):
    """`before` and bytes 2 and 3 of `ones`, each times 16 bits of WEIGHTS."""
    if INTERPRETED:
        return before + (ones >> 16 & 0xFF) * (WEIGHTS & 0xFFFF) + (ones >> 24) * (WEIGHTS >> 16)
    else:
        weights = tl.full(ones.shape, WEIGHTS, tl.uint32)
        return tl.inline_asm_elementwise(
            "dp2a.hi.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [weights, ones, before],
            tl.uint32,
            True,
            1,
        )


@triton.jit
def columns_of_bytes(low, high):
    """Of two words of 4 columns, [128], the bytes as [128, 8]."""
    return joined(
        low & 0xFF,
        low >> 8 & 0xFF,
        low >> 16 & 0xFF,
        low >> 24,
        high & 0xFF,
        high >> 8 & 0xFF,
        high >> 16 & 0xFF,
        high >> 24,
    )


@triton.jit
def columns_of_pairs(first, second, third, fourth):
    """Four words of 2 columns, [128], as [128, 4]."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [128, 4])


@triton.jit
def joined(e0, e1, e2, e3, e4, e5, e6, e7):
    """[128, 8] of the columns of octets: e0 are the first ones, [128]."""
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), [128, 8])
