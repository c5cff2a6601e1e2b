"""What the interpreter does with numbers in another way than a GPU."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether TRITON_INTERPRET=1 was set when this was imported: kernels then run on the CPU."""


@triton.jit
def widened(bits):
    """The float32 of which `bits` are the upper half, subnormal ones too: the scales' form.

    The interpreter turns subnormal bfloat16 into other numbers.
    """
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def rounded(number, DTYPE: tl.constexpr):
    """A float32 to the nearest of DTYPE, of two to the even one."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter would cut off.
        bits = number.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + (bits >> 16 & 1)
        # The carry of a NaN's payload must not reach its exponent.
        bits = tl.where(number == number, nearest, bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # Triton compiles what follows a return, too
        return number.to(DTYPE)
