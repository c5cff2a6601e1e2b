"""Numbers with a point are rounded once, to the nearest, as fractions say that are exact."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Final

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.gpu.ptx.snippets import computed

if TYPE_CHECKING:
    from collections.abc import Callable

M32: Final = 0xFFFFFFFF

FINITE = st.integers(0, M32).filter(lambda bits: bits >> 23 & 255 != 255)


def number(bits: int) -> Fraction:
    return Fraction(float(np.uint32(bits).view(np.float32)))


def nearest(exact: Fraction, bits: int, *, of: Callable[[int], Fraction]) -> bool:
    """Whether no neighbour of a finite number is nearer, or as near and even."""
    error = abs(of(bits) - exact)
    for other in (bits - 1, bits + 1):
        distance = abs(of(other) - exact)
        if distance < error or (distance == error and bits & 1):
            return False
    return True


@settings(max_examples=100, deadline=None)
@given(a=FINITE, b=FINITE, c=FINITE)
def test_a_product_and_sum_of_float32_are_rounded_once(a: int, b: int, c: int) -> None:
    sources = [np.array([each], np.uint32) for each in (a, b, c)]
    found = int(computed("fma.rn.f32 %r9, %r0, %r1, %r2;", sources, "%r9")[0])
    exact = number(a) * number(b) + number(c)
    if 0 < found & 0x7FFFFFFF < 0x7F7FFFFF:
        assert nearest(exact, found, of=number)


def test_a_sum_that_float64_would_round_to_a_tie_is_no_tie() -> None:
    """1 + 2^-23 + 2^-24 - 2^-70: float64 has no bit for the last term, and the rest is halfway."""
    numbers = (1 + 2.0**-23, (1 - 2.0**-23) * 2.0**-24, 1 + 2.0**-23)
    sources = [np.array([each], np.float32).view(np.uint32) for each in numbers]
    found = computed("fma.rn.f32 %r9, %r0, %r1, %r2;", sources, "%r9")
    assert found.view(np.float32)[0] == np.float32(1 + 2.0**-23)


def half_number(bits: int) -> Fraction:
    return number(bits << 16)


@settings(max_examples=100, deadline=None)
@given(a=FINITE)
def test_float32_becomes_the_nearest_bfloat16(a: int) -> None:
    words = [np.array([a], np.uint32)]
    found = int(computed("cvt.rn.bf16.f32 %rs9, %r0;", words, "%rs9")[0])
    if 0 < found & 0x7FFF < 0x7F7F:
        assert nearest(number(a), found, of=half_number)
    both = int(computed("cvt.rn.bf16x2.f32 %r9, %r0, 0f3F800000;", words, "%r9")[0])
    assert both == found << 16 | 0x3F80


@settings(max_examples=100, deadline=None)
@given(a=st.integers(0, 0x7F7F), b=st.integers(0, 0x7F7F), c=st.integers(0, 0x7F7F))
def test_a_product_and_sum_of_bfloat16_are_rounded_once(a: int, b: int, c: int) -> None:
    sources = [np.array([each << 16 | 0x3F80], np.uint32) for each in (a, b, c)]
    found = int(computed("fma.rn.bf16x2 %r9, %r0, %r1, %r2;", sources, "%r9")[0])
    assert found & 0xFFFF == 0x4000  # 1 * 1 + 1
    exact = half_number(a) * half_number(b) + half_number(c)
    if 0 < found >> 16 < 0x7F7F:
        assert nearest(exact, found >> 16, of=half_number)


def test_two_floats_in_a_double_word_are_added_apart() -> None:
    pairs = [np.array([1.5, -2.0], np.float32).view(np.uint64)] * 2
    found = computed("add.f32x2 %rd9, %rd0, %rd1;", pairs, "%rd9")
    assert found.view(np.float32).tolist() == [3.0, -4.0]


def test_a_minimum_of_a_number_and_none_is_the_number() -> None:
    words = [np.array([x], np.float32).view(np.uint32) for x in (np.nan, 2.0)]
    assert computed("min.f32 %r9, %r0, %r1;", words, "%r9").view(np.float32)[0] == 2.0
