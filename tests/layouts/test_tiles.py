"""The tile layout against a second, slow encoder that is written straight from FORMAT.md."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierd_layouts import runs, tiles
from tierd_layouts.errors import (
    BadMatrix,
    BitmapWrong,
    BitsOutsideShape,
    GapNotZero,
    OffsetsWrong,
    TileError,
    ValuesWrong,
    ZeroStored,
)
from tierd_layouts.tiles import TileGrid

#: numpy arrays; not typed further, because half of the tests pass wrong ones on purpose.
Matrix = Any


def slow_encode(matrix: Matrix) -> tuple[list[int], list[int], list[int]]:
    """FORMAT.md, word by word: no numpy operation that `tiles` uses."""
    rows, cols = matrix.shape
    per_unit = 16 // matrix.dtype.itemsize
    bitmap: list[int] = []
    offsets = [0]
    values: list[int] = []
    for top in range(0, rows, 64):
        for left in range(0, cols, 64):
            for row in range(top, top + 64):
                word = 0
                for col in range(left, left + 64):
                    if row < rows and col < cols and int(matrix[row, col]) != 0:
                        word |= 1 << (col - left)
                        values.append(int(matrix[row, col]))
                bitmap.append(word)
            while len(values) % per_unit:
                values.append(0)
            offsets.append(len(values) // per_unit)
    return bitmap, offsets, values


@st.composite
def matrices(draw: st.DrawFn) -> Matrix:
    dtype: Any = draw(st.sampled_from([np.uint16, np.uint32]))
    size = st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(126, 131))
    shape = (draw(size), draw(size))
    density = draw(st.sampled_from([0.0, 0.01, 0.5, 0.97, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits = rng.integers(1, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    return bits * (rng.random(shape) < density).astype(dtype)


def random_matrix(rows: int, cols: int, density: float = 0.5, dtype: Any = np.uint16) -> Matrix:
    rng = np.random.default_rng([rows, cols])
    bits = rng.integers(1, np.iinfo(dtype).max, (rows, cols), dtype, endpoint=True)
    return bits * (rng.random((rows, cols)) < density).astype(dtype)


def check_round_trip(matrix: Matrix) -> None:
    bitmap, offsets, values = tiles.encode(matrix)
    assert values.dtype == matrix.dtype
    rows, cols = matrix.shape
    tiles.validate(bitmap, offsets, values, rows, cols, int(np.count_nonzero(matrix)))
    decoded = tiles.decode(bitmap, offsets, values, *matrix.shape)
    assert decoded.dtype == matrix.dtype
    np.testing.assert_array_equal(decoded, matrix)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrices())
def test_the_fast_encoder_gives_the_bytes_of_the_specification(matrix: Matrix) -> None:
    bitmap, offsets, values = tiles.encode(matrix)
    slow_bitmap, slow_offsets, slow_values = slow_encode(matrix)
    assert bitmap.tolist() == slow_bitmap
    assert offsets.tolist() == slow_offsets
    assert values.tolist() == slow_values
    check_round_trip(matrix)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(
    "shape",
    [(0, 0), (0, 7), (7, 0), (1, 1), (1, 200), (200, 1), (64, 64), (64, 65), (65, 64), (63, 129)],
)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_every_shape_survives(shape: tuple[int, int], density: float, dtype: Any) -> None:
    check_round_trip(random_matrix(*shape, density, dtype))


@pytest.mark.parametrize("shape", [(64 * 3, 64 * 511), (64 * 5 - 1, 64 * 300 + 1), (3, 64 * 1030)])
def test_matrices_of_several_pieces_survive(shape: tuple[int, int]) -> None:
    check_round_trip(random_matrix(*shape, 0.1))


def test_a_wide_tile_row_that_is_cut_keeps_its_tiles_in_order() -> None:
    matrix = np.zeros((65, 64 * 513), np.uint16)
    matrix[0, 64 * np.arange(513)] = np.arange(1, 514)
    matrix[64, 64 * np.arange(513)] = np.arange(1001, 1514)
    values = tiles.encode(matrix)[2]
    assert values[::8].tolist() == [*range(1, 514), *range(1001, 1514)]


def test_the_mask_is_on_raw_bits_so_minus_zero_and_nan_payloads_survive() -> None:
    floats = np.array([[0.0, -0.0, np.nan, np.inf, 1e-45, 1.0]], np.float32)
    bits = floats.view(np.uint32).copy()
    bits[0, 2] = 0x7F800ABC  # a signalling NaN with a payload
    bitmap, offsets, values = tiles.encode(bits)
    assert bitmap[0] == 0b111110
    assert values[:5].tolist() == bits[0, 1:].tolist()
    np.testing.assert_array_equal(tiles.decode(bitmap, offsets, values, 1, 6), bits)


def test_an_empty_tile_has_no_values_and_a_dense_tile_has_4096() -> None:
    matrix = np.zeros((64, 128), np.uint16)
    matrix[:, 64:] = 7
    bitmap, offsets, values = tiles.encode(matrix)
    assert offsets.tolist() == [0, 0, 512]
    assert not bitmap[:64].any()
    assert (bitmap[64:] == np.uint64(2**64 - 1)).all()
    assert values.tolist() == [7] * 4096


def test_transposed_and_sliced_input_needs_no_copy_by_the_caller() -> None:
    matrix = random_matrix(150, 90)
    for view in (matrix.T, matrix[::2, ::3], matrix[::-1]):
        check_round_trip(view)


def test_read_only_arrays_decode() -> None:
    matrix = random_matrix(70, 70)
    arrays = tiles.encode(matrix)
    for array in arrays:
        array.flags.writeable = False
    np.testing.assert_array_equal(tiles.decode(*arrays, 70, 70), matrix)


def test_encoding_needs_little_memory_beside_input_and_output() -> None:
    matrix = random_matrix(4096, 2048)  # 16 MiB
    tracemalloc.start()
    arrays = tiles.encode(matrix)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    output = sum(array.nbytes for array in arrays)
    assert peak < output + (48 << 20), f"{peak} bytes at the peak for {output} of output"


# --------------------------------------------------------------------------------------------------
# What can be wrong

Arrays = tuple[Matrix, Matrix, Matrix]


@pytest.fixture
def arrays() -> Arrays:
    """A 70 x 70 matrix: 2 x 2 tiles, three of them on an edge."""
    return tiles.encode(random_matrix(70, 70))


def nnz(arrays: Arrays) -> int:
    return int(np.bitwise_count(arrays[0]).sum())


@pytest.mark.parametrize(
    "matrix",
    [np.zeros(5, np.uint16), np.zeros((2, 2, 2), np.uint16), np.zeros((2, 2), np.float32)],
)
def test_a_matrix_that_is_not_2d_raw_bits_is_refused(matrix: Matrix) -> None:
    with pytest.raises(BadMatrix, match="uint16 or uint32"):
        tiles.encode(matrix)


def test_a_negative_shape_is_refused() -> None:
    with pytest.raises(BadMatrix, match="-1"):
        TileGrid(-1, 3)


def test_more_values_than_the_offsets_can_address_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "MAX_RUN_UNITS", 3)
    tiles.encode(np.ones((1, 24), np.uint16))
    with pytest.raises(BadMatrix, match="offsets address"):
        tiles.encode(np.ones((1, 25), np.uint16))


def test_a_bitmap_of_the_wrong_length_or_dtype_is_refused(arrays: Arrays) -> None:
    bitmap, offsets, values = arrays
    for wrong in (bitmap[:-1], np.append(bitmap, bitmap[:1]), bitmap.astype(np.int64)):
        with pytest.raises(BitmapWrong, match=r"needs uint64\[256\]"):
            tiles.decode(wrong, offsets, values, 70, 70)


def test_a_bitmap_with_another_count_than_nnz_is_refused(arrays: Arrays) -> None:
    with pytest.raises(BitmapWrong, match="nnz is 1"):
        tiles.validate(*arrays, 70, 70, nnz=1)


def test_offsets_of_the_wrong_length_or_dtype_are_refused(arrays: Arrays) -> None:
    bitmap, offsets, values = arrays
    for wrong in (offsets[:-1], offsets.astype(np.int32), offsets[None]):
        with pytest.raises(OffsetsWrong, match=r"needs uint32\[5\]"):
            tiles.decode(bitmap, wrong, values, 70, 70)


def test_offsets_that_do_not_begin_at_0_are_refused(arrays: Arrays) -> None:
    bitmap, offsets, values = arrays
    with pytest.raises(OffsetsWrong, match="begin with 1"):
        tiles.decode(bitmap, offsets + np.uint32(1), values, 70, 70)


@pytest.mark.parametrize("entry", [1, 2, 3, 4])
@pytest.mark.parametrize("change", [-1, 1, 2**31])
def test_offsets_that_contradict_the_popcounts_are_refused(
    arrays: Arrays, entry: int, change: int
) -> None:
    bitmap, offsets, values = arrays
    offsets[entry] = (int(offsets[entry]) + change) % 2**32
    with pytest.raises(OffsetsWrong, match=f"tile {entry - 1} of 4"):
        tiles.decode(bitmap, offsets, values, 70, 70)


def test_values_of_the_wrong_length_dtype_or_rank_are_refused(arrays: Arrays) -> None:
    bitmap, offsets, values = arrays
    longer = np.append(values, np.zeros(8, values.dtype))
    for wrong in (values[:-8], values[:-1], longer, values.astype(np.int16), values[None]):
        with pytest.raises(ValuesWrong):
            tiles.decode(bitmap, offsets, wrong, 70, 70)


@pytest.mark.parametrize(
    ("word", "bit", "text"),
    [(64 * 1 + 3, 6, "columns at and after 70"), (64 * 2 + 6, 0, "rows at and after 70")],
)
def test_bits_outside_the_true_shape_are_refused(word: int, bit: int, text: str) -> None:
    matrix = np.zeros((70, 70), np.uint16)
    matrix[0, 64], matrix[64, 0] = 1, 1
    bitmap, offsets, values = tiles.encode(matrix)
    bitmap[word] |= np.uint64(1 << bit)  # fits into its tile's run: only the shape forbids it
    with pytest.raises(BitsOutsideShape, match=text):
        tiles.decode(bitmap, offsets, values, 70, 70)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_gap_that_is_not_zero_is_refused(dtype: Any) -> None:
    matrix = np.zeros((64, 192), dtype)
    matrix[0, [0, 64, 65, 128]] = 5
    bitmap, offsets, values = tiles.encode(matrix)
    per_unit = 16 // values.dtype.itemsize
    for tile, place in ((0, 1), (1, per_unit + 2), (2, 3 * per_unit - 1)):
        broken = values.copy()
        broken[place] = 9
        with pytest.raises(GapNotZero, match=f"tile {tile} of 3, element {place} of values: 0x9"):
            tiles.validate(bitmap, offsets, broken, 64, 192, nnz=4)


def test_a_stored_zero_is_refused() -> None:
    matrix = np.zeros((64, 192), np.uint16)
    matrix[0, [0, 128, 129]] = 5
    bitmap, offsets, values = tiles.encode(matrix)
    values[9] = 0
    with pytest.raises(ZeroStored, match="tile 2 of 3, element 9"):
        tiles.validate(bitmap, offsets, values, 64, 192, nnz=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_flipped_bits_are_refused_or_are_another_valid_matrix(data: st.DataObject) -> None:
    matrix = random_matrix(70, 66)
    arrays: list[Any] = [array.copy() for array in tiles.encode(matrix)]
    for _ in range(data.draw(st.integers(1, 3))):
        raw = arrays[data.draw(st.integers(0, 2))].view(np.uint8)
        raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    bitmap, offsets, values = arrays
    count = int(np.bitwise_count(bitmap).sum())
    try:
        tiles.validate(bitmap, offsets, values, 70, 66, nnz=count)
    except TileError:
        return
    again = tiles.encode(tiles.decode(bitmap, offsets, values, 70, 66))
    for ours, theirs in zip(again, arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
