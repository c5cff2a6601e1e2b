"""Every kernel gives back every packed bit, and of any content what the reference makes of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_kernels import PackedMatrix, expand, linear, reference
from tierd_kernels.geometry import ELEMENT

LENGTHS = st.one_of(
    st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 320]), st.integers(0, 400)
)
DTYPES = ["BF16", "F16", "F32"]
LOSSLESS = [("raw", True), ("exponent-packed", True), ("exponent-packed", False)]


def specified(matrix: PackedMatrix) -> Any:
    """What the reference says."""
    out: Any = np.empty((matrix.rows, matrix.cols), ELEMENT[matrix.dtype])
    reference.expand(matrix, out, 0, -(-matrix.rows // 64), 1)
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=LENGTHS,
    cols=LENGTHS,
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(LOSSLESS),
    density=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]),
    threads=st.integers(1, 3),
)
def test_what_was_packed_without_loss_comes_back_bit_for_bit(
    kernel: str,
    random_bits: Callable[..., Any],
    pack: Callable[..., PackedMatrix],
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    form: tuple[str, bool],
    density: float,
    threads: int,
) -> None:
    matrix = random_bits(seed, rows, cols, dtype, density)
    out = np.full_like(matrix, 0x5555)
    expand(pack(matrix, dtype, form), out, threads=threads)
    np.testing.assert_array_equal(out, matrix)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=LENGTHS,
    cols=LENGTHS,
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.01, 0.3, 0.5, 0.9]),
    group=st.sampled_from([64, 128, 256]),
    threads=st.integers(1, 3),
)
def test_any_content_gives_what_the_reference_says(
    native_kernel: str,
    random_packed: Callable[..., PackedMatrix],
    form: tuple[str, bool],
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    density: float,
    group: int,
    threads: int,
) -> None:
    matrix = random_packed(seed, rows, cols, dtype, form, density, group=group)
    expected = specified(matrix)
    out = np.full_like(expected, 0x5555)
    expand(matrix, out, threads=threads)
    np.testing.assert_array_equal(out, expected)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), rows=st.integers(1, 400), dtype=st.sampled_from(DTYPES))
def test_a_range_of_tile_rows_is_that_part_of_the_whole(
    kernel: str,
    random_packed: Callable[..., PackedMatrix],
    form: tuple[str, bool],
    data: st.DataObject,
    rows: int,
    dtype: str,
) -> None:
    matrix = random_packed(rows, rows, 150, dtype, form)
    tile_rows = -(-rows // 64)
    first = data.draw(st.integers(0, tile_rows))
    end = data.draw(st.integers(first, tile_rows))
    part = specified(matrix)[first * 64 : end * 64]
    out = np.full_like(part, 0x5555)
    expand(matrix, out, tile_rows=(first, end), threads=2)
    np.testing.assert_array_equal(out, part)


def repeated(matrix: PackedMatrix, times: int) -> PackedMatrix:
    """The tile rows of a matrix of whole tile rows, again and again, one below the other."""
    ends = matrix.offsets[1:].astype(np.uint32)
    offsets = [np.zeros(1, np.uint32), *(ends + ends[-1] * np.uint32(i) for i in range(times))]
    arrays: dict[str, Any] = {
        name: np.tile(array, times) for name, array in matrix.arrays().items() if name != "offsets"
    }
    return replace(matrix, rows=matrix.rows * times, offsets=np.concatenate(offsets), **arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 2])
def test_an_output_beyond_the_caches_has_the_same_bits(
    native_kernel: str,
    random_packed: Callable[..., PackedMatrix],
    form: tuple[str, bool],
    dtype: str,
    shift: int,
) -> None:
    """From 16 MiB on, stores bypass the caches where each row starts on 64 bytes."""
    part = random_packed(3, 64, 4096, dtype, form)
    times = 33 if dtype != "F32" else 17
    matrix = repeated(part, times)
    element = ELEMENT[dtype]
    room: Any = np.empty(matrix.rows * matrix.cols + 64, element)
    start = -(room.ctypes.data // room.itemsize) % (64 // room.itemsize) + shift
    out = room[start : start + matrix.rows * matrix.cols].reshape(matrix.rows, matrix.cols)
    assert (out.ctypes.data % 64 == 0) == (shift == 0)
    assert out.nbytes > 16 << 20
    expand(matrix, out, threads=2)
    assert (out.reshape(times, 64, 4096) == specified(part)).all()


def test_read_only_inputs_are_read_in_place(
    kernel: str, random_packed: Callable[..., PackedMatrix], form: tuple[str, bool]
) -> None:
    matrix = random_packed(4, 70, 70, "BF16", form)
    expected = specified(matrix)
    for array in matrix.arrays().values():
        array.flags.writeable = False
    out = np.empty_like(expected)
    expand(matrix, out)
    np.testing.assert_array_equal(out, expected)


def test_a_view_into_a_larger_buffer_does_not_need_vector_alignment(
    kernel: str, random_packed: Callable[..., PackedMatrix], form: tuple[str, bool]
) -> None:
    matrix = random_packed(5, 128, 128, "BF16", form)
    arrays: dict[str, Any] = {
        name: np.concatenate([array[:1], array])[1:] for name, array in matrix.arrays().items()
    }
    moved = replace(matrix, **arrays)
    out = np.empty(128 * 128 + 1, np.uint16)[1:].reshape(128, 128)
    expand(moved, out)
    np.testing.assert_array_equal(out, specified(matrix))


@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [
        ("BF16", [97.0, -97.0, 68.5, 76.5], [98.0, -98.0]),
        ("F16", [96.75, -96.75, 68.5, 76.625], [98.25, -98.25]),
        ("F32", [96.75, -96.75, 68.53125, 76.59375], [98.25, -98.25]),
    ],
)
def test_a_level_times_its_scale_is_rounded_once_to_the_nearest_of_two_to_the_even(
    kernel: str, dtype: str, first: list[float], second: list[float]
) -> None:
    """By hand: 96 * 129/128 and 96 * 131/128 lie halfway between two bf16, 68 and 76 of halves."""
    levels = np.zeros((64, 64), np.int8)
    levels[0, :4] = [96, -96, 68, 76]
    levels[1, :2] = [96, -96]
    scales = np.zeros(64, np.uint16)
    scales[:2] = 0x3F81, 0x3F83
    offsets = np.array([0, 256], np.uint32)
    values = levels.view(np.uint8).reshape(-1)
    matrix = PackedMatrix("int8", dtype, 64, 64, None, offsets, values, scales=scales, group=64)
    out: Any = np.empty((64, 64), ELEMENT[dtype])
    expand(matrix, out)
    numbers = reference.decode(out, dtype)
    assert numbers[0, :4].tolist() == first
    assert numbers[1, :2].tolist() == second
    assert (out[2:] == 0).all()


@pytest.mark.parametrize("cols", [0, 3, 200])
def test_a_group_wider_than_32_bits_is_one_of_all_columns(
    kernel: str, random_packed: Callable[..., PackedMatrix], cols: int
) -> None:
    whole = random_packed(5, 130, cols, "BF16", ("int4", True), 0.5, group=256)
    huge = replace(whole, group=2**40)
    out: Any = np.full((130, cols), 0x5555, np.uint16)
    expand(huge, out)
    np.testing.assert_array_equal(out, specified(whole))
    x: Any = np.full((2, cols), 0x3F80, np.uint16)
    sums = [np.zeros((2, 130), np.float32) for _ in range(2)]
    for matrix, found in zip((whole, huge), sums, strict=True):
        linear(matrix, x, found)
    np.testing.assert_array_equal(sums[0], sums[1])
