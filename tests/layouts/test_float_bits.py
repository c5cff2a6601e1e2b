from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from tierd_layouts.float_bits import LARGEST, rounded, widened

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import U16Array

ALL_BITS = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def finite(dtype: str) -> U16Array:
    exponent = np.uint16({"BF16": 0x7F80, "F16": 0x7C00}[dtype])
    bits: U16Array = ALL_BITS[(ALL_BITS & exponent) != exponent]
    return bits


def test_every_16_bit_float_comes_back() -> None:
    for dtype in ("BF16", "F16"):
        bits = finite(dtype)
        wide = widened(bits, dtype)
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(rounded(wide, dtype), bits)
        assert wide.max() == LARGEST[dtype]


def test_values_are_those_of_the_formats() -> None:
    assert widened(np.array([0x3F80, 0xBF81, 0x0001], np.uint16), "BF16").tolist() == [
        1.0,
        -1.0078125,
        2.0**-133,
    ]
    for bits in (0x3C00, 0x0001, 0xFBFF, 0x8000):
        (expected,) = struct.unpack("<e", struct.pack("<H", bits))
        assert widened(np.array([bits], np.uint16), "F16").tolist() == [expected]
    one = np.array([0x3F800001], np.uint32)
    assert widened(one, "F32").tolist() == [1 + 2.0**-23]


def test_rounding_is_to_nearest_and_ties_go_to_even() -> None:
    for dtype in ("BF16", "F16"):
        bits = np.sort(finite(dtype)[finite(dtype) < 0x8000])
        low = widened(bits[:-1], dtype).astype(np.float64)
        high = widened(bits[1:], dtype).astype(np.float64)
        middle = ((low + high) / 2).astype(np.float32)
        exact = middle.astype(np.float64) == (low + high) / 2  # not the smallest subnormals
        even = np.where(bits[:-1] % 2 == 0, bits[:-1], bits[1:])
        np.testing.assert_array_equal(rounded(middle, dtype)[exact], even[exact])
        above = np.nextafter(middle, np.float32(np.inf))
        np.testing.assert_array_equal(rounded(above, dtype)[exact], bits[1:][exact])


def test_what_is_too_large_becomes_infinity() -> None:
    largest = np.array([LARGEST["F32"], -LARGEST["F32"]], np.float32)
    assert rounded(largest, "F16").tolist() == [0x7C00, 0xFC00]
    assert rounded(largest, "BF16").tolist() == [0x7F80, 0xFF80]
    assert rounded(largest, "F32").tolist() == [0x7F7FFFFF, 0xFF7FFFFF]
