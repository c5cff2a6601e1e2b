"""Escapes of an exponent-packed record: their check, and the top bytes that they say.

Every loop is bounded by the number of escapes, which was compared with the tile's elements and
with its offsets.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

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
def escaped(escape, escapes, top, rank, ones):
    """The top bytes of each octet's kept elements, with those that its escapes say; uint64 [512].

    Escapes ascend: each octet finds its first one by bisection, and has at most 8.
    """
    # Escapes [0, index) lie before the octet, those from index + 2 * step on do not.
    index = tl.zeros_like(rank)
    step = 4096
    while step > escapes:
        step = step // 2
    while step > 0:
        last = index + step - 1
        this = tl.load(escape + last, mask=(last < escapes) & (ones > 0), other=0xFFFF) & 0xFFFF
        index = tl.where(this.to(tl.int32) < rank, last + 1, index)
        step = step // 2
    left = 1
    while left > 0:
        this = tl.load(escape + index, mask=(index < escapes) & (ones > 0), other=0xFFFF)
        place = (this & 0xFFFF).to(tl.int32) - rank
        mine = (place >= 0) & (place < ones)
        shift = (tl.where(mine, place, 0) * 8).to(tl.uint64)
        said = (this >> 16 & 0xFF).to(tl.uint64)
        changed = (top >> shift ^ said) & 0xFF
        top ^= tl.where(mine, changed << shift, 0)
        index += mine.to(tl.int32)
        left = tl.max(mine.to(tl.int32), axis=0)
    return top
