"""Every kernel gives back every bit that was packed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_kernels import expand
from tierd_layouts import tiles

LENGTHS = st.one_of(
    st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 320]), st.integers(0, 400)
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=LENGTHS,
    cols=LENGTHS,
    dtype=st.sampled_from(["BF16", "F32"]),
    density=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]),
    threads=st.integers(1, 3),
)
def test_what_was_packed_comes_back_bit_for_bit(
    kernel: str,
    random_bits: Callable[..., Any],
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    density: float,
    threads: int,
) -> None:
    matrix = random_bits(seed, rows, cols, dtype, density)
    out = np.full_like(matrix, 0x5555)
    expand(*tiles.encode(matrix), out, threads=threads)
    np.testing.assert_array_equal(out, matrix)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 400), dtype=st.sampled_from(["BF16", "F32"]))
def test_a_range_of_tile_rows_is_that_part_of_the_whole(
    kernel: str, random_bits: Callable[..., Any], data: st.DataObject, rows: int, dtype: str
) -> None:
    matrix = random_bits(rows, rows, 150, dtype, 0.5)
    tile_rows = -(-rows // 64)
    first = data.draw(st.integers(0, tile_rows))
    end = data.draw(st.integers(first, tile_rows))
    part = matrix[first * 64 : end * 64]
    out = np.full_like(part, 0x5555)
    expand(*tiles.encode(matrix), out, tile_rows=(first, end), threads=2)
    np.testing.assert_array_equal(out, part)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("shift", [0, 2])
def test_an_output_beyond_the_caches_has_the_same_bits(
    kernel: str, random_bits: Callable[..., Any], dtype: str, shift: int
) -> None:
    """From 16 MiB on, stores bypass the caches where each row starts on 64 bytes."""
    if kernel == "reference":
        pytest.skip("the reference knows no caches, and is slow at this size")
    matrix = random_bits(3, 2112, 4096, dtype, 0.5)
    packed = tiles.encode(matrix)
    room = np.empty(matrix.size + 64, matrix.dtype)
    start = -(room.ctypes.data // room.itemsize) % (64 // room.itemsize) + shift
    out = room[start : start + matrix.size].reshape(matrix.shape)
    assert (out.ctypes.data % 64 == 0) == (shift == 0)
    expand(*packed, out, threads=2)
    assert np.array_equal(out, matrix)


def test_read_only_inputs_are_read_in_place(kernel: str, random_bits: Callable[..., Any]) -> None:
    matrix = random_bits(4, 70, 70, "BF16", 0.5)
    packed = tiles.encode(matrix)
    for array in packed:
        array.flags.writeable = False
    out = np.empty_like(matrix)
    expand(*packed, out)
    np.testing.assert_array_equal(out, matrix)


def test_a_view_into_a_larger_buffer_does_not_need_vector_alignment(
    kernel: str, random_bits: Callable[..., Any]
) -> None:
    matrix = random_bits(5, 128, 128, "BF16", 0.5)
    bitmap, offsets, values = tiles.encode(matrix)
    moved = [np.concatenate([array[:1], array])[1:] for array in (bitmap, offsets, values)]
    out = np.empty(matrix.size + 1, np.uint16)[1:].reshape(matrix.shape)
    expand(moved[0], moved[1], moved[2], out)
    np.testing.assert_array_equal(out, matrix)
