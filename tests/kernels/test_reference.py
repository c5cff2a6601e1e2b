"""The specification against the other specification, and against arithmetic done by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tierd_kernels import reference
from tierd_kernels.geometry import Geometry
from tierd_layouts import tiles


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 127), (130, 200)])
def test_the_reference_reads_the_layout_as_the_layouts_package_does(
    random_bits: Callable[..., Any], dtype: str, shape: tuple[int, int]
) -> None:
    matrix = random_bits(1, *shape, dtype, 0.5)
    packed = tiles.encode(matrix)
    out = np.empty_like(matrix)
    reference.expand(*packed, out, Geometry(shape[1], -(-shape[0] // 64), 0, -(-shape[0] // 64)), 1)
    np.testing.assert_array_equal(out, matrix)
    np.testing.assert_array_equal(out, tiles.decode(*packed, *shape))


def test_a_tile_by_hand() -> None:
    bitmap = np.zeros(64, np.uint64)
    bitmap[0] = (1 << 63) | 0b101
    bitmap[63] = 1
    values = np.array([1, 2, 3, 4, 0, 0, 0, 0], np.uint16)
    out = np.full((64, 64), 9, np.uint16)
    reference.expand(bitmap, np.array([0, 1], np.uint32), values, out, Geometry(64, 1, 0, 1), 1)
    assert out[0, 0] == 1
    assert out[0, 2] == 2
    assert out[0, 63] == 3
    assert out[63, 0] == 4
    assert np.count_nonzero(out) == 4


def test_bits_stand_for_the_numbers_that_numpy_and_the_formats_say() -> None:
    assert reference.decode(np.array([0x3FC0], np.uint16), "BF16")[0] == 1.5
    assert reference.decode(np.array([0x0001], np.uint16), "F16")[0] == 2.0**-24
    assert reference.decode(np.array([0x3FC00000], np.uint32), "F32")[0] == 1.5
