"""Escapes of an exponent-packed record: their check, and the top bytes that they say.

Every loop is bounded by the number of escapes, which was compared with the tile's elements and
with its offsets.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.gpu.spread import permuted

_AT_ONCE = tl.constexpr(128)


@triton.jit
def escapes_are_wrong(escape, escapes, count):
    """Whether the elements of the escapes do not ascend strictly below `count`, or a pad is not 0.

    escape: pointer to uint32.   escapes: how many, at most 4096.
    """
    wrong = 0
    first = 0
    while first < escapes:
        index = first + tl.arange(0, _AT_ONCE)
        this = tl.load(escape + index, mask=index < escapes, other=0)
        following = tl.load(escape + index + 1, mask=index + 1 < escapes, other=count)
        limit = tl.where(index + 1 < escapes, following & 0xFFFF, count.to(tl.uint32))
        bad = (index < escapes) & (((this & 0xFFFF) >= limit) | (this >> 24 != 0))
        wrong += tl.sum(bad.to(tl.int32), axis=0)
        first += _AT_ONCE
    return wrong > 0


@triton.jit
def first_escapes(escape, escapes, rank):
    """Return how many escapes lie before each half row, [128], and a bit for each of those that one
    has at most: compilers repeat the body of a loop whose rounds they can count.

    rank: of the half row's first kept element. Escapes ascend: a bisection for each.
    """
    # Escapes [0, index) lie before the rank, those from index + 2 * step on do not.
    index = tl.zeros_like(rank)
    step = 4096
    while step > escapes:
        step = step // 2
    while step > 0:
        last = index + step - 1
        this = tl.load(escape + last, mask=last < escapes, other=0xFFFF) & 0xFFFF
        index = tl.where(this.to(tl.int32) < rank, last + 1, index)
        step = step // 2
    half = tl.arange(0, 128)
    end = tl.gather(index, tl.minimum(half + 1, 127), axis=0)
    end = tl.where(half < 127, end, escapes.to(tl.int32))
    most = tl.minimum(tl.max(end - index, axis=0), 32)
    return index, ((tl.full([], 1, tl.int64) << most.to(tl.int64)) - 1)


@triton.jit
def escaped(this, low, high, rank):
    """The top bytes of each octet's elements with what an escape says, if it is for one of them.

    low, high: of elements `rank` to rank + 7; those that belong to later octets are changed, too.
    """
    place = ((this & 0xFFFF).to(tl.int32) - rank).to(tl.uint32)
    # Which byte the escape replaces: digits of two selectors, none of them where it is none of 8.
    changed = tl.where(place < 8, (place & 3 ^ 4) << (place & 7) * 4, 0)
    said = this >> 16
    low = permuted(low, said, changed & 0xFFFF ^ 0x3210)
    return low, permuted(high, said, changed >> 16 ^ 0x3210)
