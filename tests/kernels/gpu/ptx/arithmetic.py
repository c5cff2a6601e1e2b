"""What single instructions compute, where numpy has no operator that does just that.

Arrays are unsigned [threads] unless said otherwise; the numbers are those of the PTX manual.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import Undefined

_U4: Final = np.dtype("u4")
_U8: Final = np.dtype("u8")
_DIGITS: Final = (np.arange(1 << 16)[:, None] >> np.array([0, 4, 8, 12]) & 15).astype(np.int64)


def quotient(a: Any, b: Any) -> Any:
    """Cut off, as C does."""
    return (a - remainder(a, b)) // b


def remainder(a: Any, b: Any) -> Any:
    if not np.all(b):
        raise Undefined("a division by zero")
    return np.fmod(a, b)


def shifted_left(a: Any, bits: Any) -> Any:
    """bits: uint32; where there are more than a has, nothing is left."""
    return a << np.minimum(bits, a.itemsize * 8).astype(a.dtype)


def shifted_right(a: Any, bits: Any) -> Any:
    """As `shifted_left`; of a signed `a` its sign is left."""
    return a >> np.minimum(bits, a.itemsize * 8).astype(a.dtype)


def funnel(low: Any, high: Any, bits: Any, *, left: bool, wraps: bool) -> Any:
    """The upper word of (high, low) shifted left, or the lower one of it shifted right."""
    bits = (bits & 31 if wraps else np.minimum(bits, 32)).astype(_U8)
    both = high.astype(_U8) << 32 | low
    if left:
        return (both << bits >> 32).astype(_U4)
    return (both >> bits).astype(_U4)


def high_half(a: Any, b: Any) -> Any:
    """Of the product, of 32 or 64 bits, signed or not."""
    wide = np.dtype("O") if a.itemsize == 8 else np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    product = a.astype(wide) * b.astype(wide) >> 8 * a.itemsize
    return product.astype(a.dtype)


def field(a: Any, first: Any, count: Any) -> Any:
    """`bfe`: of a signed `a` the highest bit of the field goes on upwards."""
    width = a.itemsize * 8
    first, count = first & 255, count & 255
    a = np.broadcast_to(a, np.broadcast_shapes(np.shape(a), np.shape(first), np.shape(count)))
    unsigned = a.view(f"u{a.itemsize}")
    found = shifted_right(a, first).view(unsigned.dtype)
    mask = ~shifted_left(~(unsigned & 0), count)
    if a.dtype.kind == "u":
        return found & mask
    last = np.minimum(first + count - 1, width - 1)
    sign = (shifted_right(unsigned, last) & 1).astype(np.bool_) & (count > 0)
    return np.where(sign, found & mask | ~mask, found & mask).view(a.dtype)


def inserted(piece: Any, base: Any, first: Any, count: Any) -> Any:
    """`bfi`: the lowest `count` bits of `piece` from bit `first` of `base` on."""
    first, count = first & 255, count & 255
    mask = shifted_left(~shifted_left(~(base & 0), count), first)
    return base & ~mask | shifted_left(piece, first) & mask


def permuted(a: Any, b: Any, selector: Any) -> Any:
    """`prmt`: byte i is the one of (a, b) that digit i says; with 8 in the digit only its sign."""
    octets = np.empty((len(a), 2), _U4)
    octets[:, 0], octets[:, 1] = a, b
    digits = _DIGITS[selector & 0xFFFF]
    places = (digits & 7) + np.arange(0, 8 * len(a), 8)[:, None]
    found = octets.view(np.uint8).reshape(-1)[places]
    if np.any(selector & 0x8888):
        signs = np.where(found & 0x80, 0xFF, 0).astype(np.uint8)
        found = np.where(digits & 8, signs, found)
    return found.view(_U4).reshape(-1)


def looked_up(a: Any, b: Any, c: Any, table: int) -> Any:
    """`lop3`: bit abc of the table, for each bit."""
    found = a & 0 | b & 0 | c & 0
    for minterm in range(8):
        if table >> minterm & 1:
            one = a if minterm & 4 else ~a
            two = b if minterm & 2 else ~b
            found = found | one & two & (c if minterm & 1 else ~c)
    return found


def dotted(a: Any, b: Any, c: Any) -> Any:
    """`dp4a`: the sum of c and four products of bytes; a and b are uint8 or int8 [4 threads]."""
    products = a.reshape(-1, 4).astype(np.int64) * b.reshape(-1, 4)
    return (products.sum(axis=1) + c.astype(np.int64)).astype(_U8).astype(_U4)


def dotted_pairs(a: Any, b: Any, c: Any, first: int) -> Any:
    """`dp2a`: a are halves [2 threads], b bytes [4 threads]: `first` and the next one."""
    products = a.reshape(-1, 2).astype(np.int64) * b.reshape(-1, 4)[:, first : first + 2]
    return (products.sum(axis=1) + c.astype(np.int64)).astype(_U8).astype(_U4)


def leading_zeros(a: Any) -> Any:
    width = a.itemsize * 8
    for shift in (1, 2, 4, 8, 16, 32)[: 5 + (width == 64)]:
        a = a | a >> shift
    return (width - np.bitwise_count(a)).astype(_U4)


def reversed_bits(a: Any) -> Any:
    octets = a.view(np.uint8).reshape(-1, a.itemsize)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(a.dtype).reshape(-1)


def _fused_odd(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float64, rounded to odd: the last bit is set where that is not exact, so that
    a second rounding, to half as many bits or fewer, is the only one that is seen. The product of
    two float32 is exact in float64.
    """
    product = a.astype(np.float64) * b
    c = c.astype(np.float64)
    total = product + c
    other = total - product
    rest = (product - (total - other)) + (c - other)
    inexact = np.isfinite(total) & (rest != 0) & ((total.view(np.int64) & 1) == 0)
    return np.where(inexact, np.nextafter(total, np.where(rest > 0, np.inf, -np.inf)), total)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32, rounded once."""
    return _fused_odd(a, b, c).astype(np.float32)


def fused_pairs(a: Any, b: Any, c: Any, dtype: str) -> Any:
    """As `fused`, of the halves of words: "bf16" or "f16"."""
    wide = (_of_halves(each.view(np.uint16), dtype) for each in (a, b, c))
    exactly = _fused_odd(*wide)
    single = exactly.astype(np.float32)
    rest = exactly - single
    inexact = np.isfinite(single) & (rest != 0) & ((single.view(np.int32) & 1) == 0)
    towards = np.where(rest > 0, np.inf, -np.inf).astype(np.float32)
    single = np.where(inexact, np.nextafter(single, towards), single)
    return (to_bfloat16 if dtype == "bf16" else to_half)(single).view(_U4)


def _of_halves(bits: Any, dtype: str) -> Any:
    return from_bfloat16(bits) if dtype == "bf16" else bits.view(np.float16).astype(np.float32)


def to_bfloat16(a: Any) -> Any:
    """The bits, to the nearest, of two to the even one; every NaN becomes 0x7FFF."""
    bits = a.view(_U4)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(a), 0x7FFF, nearest).astype(np.uint16)


def to_half(a: Any) -> Any:
    """As `to_bfloat16`."""
    return np.where(np.isnan(a), np.uint16(0x7FFF), a.astype(np.float16).view(np.uint16))


def to_integer(a: Any, target: Any) -> Any:
    """Towards zero, clamped to the target's range; NaN is 0."""
    limits = np.iinfo(target)
    whole = np.nan_to_num(np.trunc(a.astype(np.float64)), nan=0.0)
    inside = np.clip(whole, float(limits.min), float(limits.max))
    found = np.where(inside >= float(limits.max), 0.0, inside).astype(target)
    return np.where(inside >= float(limits.max), target.type(limits.max), found)


def from_bfloat16(bits: Any) -> Any:
    return (bits.astype(_U4) << 16).view(np.float32)
