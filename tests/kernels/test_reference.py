"""The specification against the other specification, and against arithmetic done by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tierd_kernels import PackedMatrix, reference
from tierd_kernels.geometry import ELEMENT
from tierd_layouts import packed_matrix, quantised
from tierd_layouts.codecs import LEVEL_LIMITS

SHAPES = [(1, 1), (64, 64), (65, 127), (130, 200)]
DTYPES = ["BF16", "F16", "F32"]


def expanded(matrix: PackedMatrix) -> Any:
    out: Any = np.full((matrix.rows, matrix.cols), 9, ELEMENT[matrix.dtype])
    reference.expand(matrix, out, 0, -(-matrix.rows // 64), 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_reads_every_form_as_the_layouts_package_does(
    packed_weights: Callable[..., PackedMatrix],
    form: tuple[str, bool],
    dtype: str,
    shape: tuple[int, int],
) -> None:
    matrix = packed_weights(form, 1, *shape, dtype)
    out = expanded(matrix)
    np.testing.assert_array_equal(out, packed_matrix.decode(matrix))
    if matrix.codec in LEVEL_LIMITS:
        weights = quantised.weights(matrix)
    else:
        weights = reference.decode(out, dtype).astype(np.float32)
    np.testing.assert_array_equal(reference.weights(matrix), weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_reads_any_content_as_the_layouts_package_does(
    random_packed: Callable[..., PackedMatrix],
    form: tuple[str, bool],
    dtype: str,
    shape: tuple[int, int],
) -> None:
    for seed in range(5):
        matrix = random_packed(seed, *shape, dtype, form, tops=(64, 192))
        if matrix.scales is not None:  # decode checks those of rows outside the matrix, too
            below = np.arange(matrix.scales.size) % 64 + (-(-shape[0] // 64) - 1) * 64 >= shape[0]
            last = np.arange(matrix.scales.size) >= matrix.scales.size - 64 * -(-shape[1] // 128)
            matrix.scales[below & last] = 0
        np.testing.assert_array_equal(expanded(matrix), packed_matrix.decode(matrix))


def test_a_raw_tile_by_hand() -> None:
    bitmap = np.zeros(64, np.uint64)
    bitmap[0] = (1 << 63) | 0b101
    bitmap[63] = 1
    values = np.array([1, 2, 3, 4, 0, 0, 0, 0], np.uint16)
    offsets = np.array([0, 1], np.uint32)
    out = expanded(PackedMatrix("raw", "BF16", 64, 64, bitmap, offsets, values))
    assert out[0, 0] == 1
    assert out[0, 2] == 2
    assert out[0, 63] == 3
    assert out[63, 0] == 4
    assert np.count_nonzero(out) == 4


def test_an_exponent_packed_tile_by_hand() -> None:
    """1.0, -1.5, 4.0 and the escape 2^-10 in a window of 2 bits from exponent 127."""
    low = [0b0000_0000, 0b1000_0001, 0b0000_0000, 0b0000_0000, 0, 0, 0, 0]  # mantissa, sign
    code_bit_0 = [0] * 8
    code_bit_1 = [0b0100, 0, 0, 0, 0, 0, 0, 0]
    escape = [3, 0, 117, 0]
    record = [*low, *code_bit_0, *code_bit_1, *escape, 0, 0, 0, 0]
    matrix = PackedMatrix(
        "exponent-packed",
        "BF16",
        2,
        2,
        None,
        np.array([0, 2], np.uint32),
        np.array(record, np.uint8),
        heads=np.array([127 | 2 << 8 | 1 << 16], np.uint32),
    )
    numbers = reference.decode(expanded(matrix), "BF16")
    assert numbers.tolist() == [[1.0, -1.5], [4.0, 2.0**-10]]
    np.testing.assert_array_equal(reference.weights(matrix), numbers)


def test_an_int4_tile_by_hand() -> None:
    """Row by row, even elements in the low nibble; each row has its own scale."""
    bitmap = np.zeros(64, np.uint64)
    bitmap[0] = 0b1001
    bitmap[1] = 0b0001
    scales = np.zeros(64, np.uint16)
    scales[:2] = 0x3F00, 0x4000  # 0.5, 2.0
    matrix = PackedMatrix(
        "int4",
        "F32",
        2,
        4,
        bitmap,
        np.array([0, 1], np.uint32),
        np.array([0x97, 0x05] + [0] * 14, np.uint8),
        scales=scales,
        group=64,
    )
    wanted = [[3.5, 0, 0, -3.5], [10, 0, 0, 0]]
    assert reference.weights(matrix).tolist() == wanted
    assert reference.decode(expanded(matrix), "F32").tolist() == wanted


def test_bits_stand_for_the_numbers_that_numpy_and_the_formats_say() -> None:
    assert reference.decode(np.array([0x3FC0], np.uint16), "BF16")[0] == 1.5
    assert reference.decode(np.array([0x0001], np.uint16), "F16")[0] == 2.0**-24
    assert reference.decode(np.array([0x3FC00000], np.uint32), "F32")[0] == 1.5
