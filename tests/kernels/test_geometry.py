"""Arrays that do not fit are refused by name, before and after a kernel looks at their contents."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_kernels import KernelError, expand, linear
from tierd_layouts import tiles


def packed_zeros_and_ones(rows: int = 130, cols: int = 200) -> tuple[Any, Any, Any]:
    matrix = np.random.default_rng(0).integers(0, 2, (rows, cols)).astype(np.uint16)
    return tiles.encode(matrix)


BAD: dict[str, tuple[Callable[[Any, Any, Any], tuple[Any, Any, Any]], str]] = {
    "bitmap too short": (lambda b, o, v: (b[:-1], o, v), "bitmap has 767 words, 12 tiles"),
    "bitmap signed": (lambda b, o, v: (b.view(np.int64), o, v), "bitmap has dtype int64"),
    "bitmap not an array": (lambda b, o, v: (b.tolist(), o, v), "bitmap is a list"),
    "bitmap strided": (lambda b, o, v: (np.repeat(b, 2)[::2], o, v), "bitmap .*not C-contiguous"),
    "bitmap unaligned": (
        lambda b, o, v: (np.frombuffer(b"x" + b.tobytes(), np.uint8)[1:].view(np.uint64), o, v),
        "bitmap does not start on",
    ),
    "offsets too long": (lambda b, o, v: (b, np.append(o, o[-1:]), v), "offsets has 14 entries"),
    "offsets wide": (lambda b, o, v: (b, o.astype(np.uint64), v), "offsets has dtype uint64"),
    "offsets begin late": (lambda b, o, v: (b, o + np.uint32(1), v), "offsets begin at 1"),
    "values cut": (lambda b, o, v: (b, o, v[:-8]), "offsets end at .* bytes, values has"),
    "values too long": (lambda b, o, v: (b, o, np.append(v, v[:8])), "offsets end at .* bytes"),
    "values float": (lambda b, o, v: (b, o, v.view(np.float16)), "values has dtype float16"),
    "values in rows": (lambda b, o, v: (b, o, v.reshape(-1, 8)), "values has 2 dimensions"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_input_is_named(kernel: str, case: str) -> None:
    make, text = BAD[case]
    packed = make(*packed_zeros_and_ones())
    with pytest.raises(KernelError, match=text):
        expand(*packed, np.empty((130, 200), np.uint16))
    with pytest.raises(KernelError, match=text):
        linear(*packed, np.zeros((1, 200), np.uint16), np.empty((1, 130), np.float32), dtype="BF16")


def test_a_wrong_output_is_named(kernel: str) -> None:
    packed = packed_zeros_and_ones()
    frozen = np.empty((130, 200), np.uint16)
    frozen.flags.writeable = False
    wrong: list[tuple[Any, str]] = [
        (np.empty((130, 200), np.uint32), "out has dtype uint32, uint16 is needed"),
        (np.empty((130, 200), np.float16), "out has dtype float16"),
        (np.empty((200, 130), np.uint16).T, "out .*not C-contiguous"),
        (np.empty(26000, np.uint16), "out has 1 dimensions"),
        (np.empty((130, 300), np.uint16), "bitmap has 768 words, 15 tiles"),
        (np.empty((200, 200), np.uint16), "bitmap has 768 words, 16 tiles"),
        (frozen, "out is read-only"),
    ]
    for out, text in wrong:
        with pytest.raises(KernelError, match=text):
            expand(*packed, out)


def test_a_wrong_range_of_tile_rows_is_named(kernel: str) -> None:
    packed = packed_zeros_and_ones()
    wrong = [
        ((0, 4), 130),
        ((2, 1), 0),
        ((-1, 1), 128),
        ((0, 2), 127),
        ((0, 3), 128),
        ((1, 3), 129),
    ]
    for tile_rows, rows in wrong:
        with pytest.raises(KernelError, match=r"tile rows"):
            expand(*packed, np.empty((rows, 200), np.uint16), tile_rows=tile_rows)


def test_x_and_the_product_must_fit(kernel: str) -> None:
    packed = packed_zeros_and_ones()
    x, out = np.zeros((2, 200), np.uint16), np.zeros((2, 130), np.float32)
    wrong: list[tuple[Any, Any, str, str]] = [
        (x.view(np.float16), out, "F16", "x has dtype float16"),
        (x, out.astype(np.float64), "F16", "out has dtype float64"),
        (x, out, "F32", "values has dtype uint16, uint32 is needed"),
        (x, out, "I8", "dtype 'I8' is not one of BF16, F16, F32"),
        (x, out[:1], "F16", "out has 1 tokens, x has 2"),
        (np.zeros((2, 300), np.uint16), out, "F16", "bitmap has 768 words, 15 tiles"),
    ]
    for an_x, an_out, dtype, text in wrong:
        with pytest.raises(KernelError, match=text):
            linear(*packed, an_x, an_out, dtype=dtype)  # type: ignore[arg-type]


def refused(packed: tuple[Any, Any, Any], text: str, threads: int = 1) -> None:
    with pytest.raises(KernelError, match=text):
        expand(*packed, np.empty((130, 200), np.uint16), threads=threads)
    x, out = np.zeros((3, 200), np.uint16), np.empty((3, 130), np.float32)
    with pytest.raises(KernelError, match=text):
        linear(*packed, x, out, dtype="F16", threads=threads)


def test_offsets_that_descend_are_refused(kernel: str) -> None:
    bitmap, offsets, values = packed_zeros_and_ones()
    offsets[5], offsets[6] = offsets[6], offsets[5]
    refused((bitmap, offsets, values), r"tile 4\b.*do not fit")
    offsets[4] = offsets[5]
    offsets[5] = offsets[5] - 1
    refused((bitmap, offsets, values), r"tile (3|4)\b")
    bitmap[: 64 * 12] = 0
    offsets[1:-1] = 0
    offsets[6] = offsets[-1]
    refused((bitmap, offsets, values), r"tile 5\b.*do not fit|tile 6\b.*descend")


def test_a_run_beyond_the_values_is_refused(kernel: str) -> None:
    bitmap, offsets, values = packed_zeros_and_ones()
    offsets[5:-1] = 2**32 - 1
    refused((bitmap, offsets, values), r"tile 4\b.*pass the end of values")


def test_a_bitmap_with_more_bits_than_values_is_refused(kernel: str) -> None:
    bitmap, offsets, values = packed_zeros_and_ones()
    bitmap[64 * 5 : 64 * 6] = 2**64 - 1
    refused((bitmap, offsets, values), r"tile 5\b.*do not fit")


@pytest.mark.parametrize(("tile", "row", "bit"), [(3, 0, 8), (11, 0, 63), (8, 2, 0), (10, 63, 5)])
def test_a_bit_outside_the_matrix_is_refused(kernel: str, tile: int, row: int, bit: int) -> None:
    bitmap, offsets, values = packed_zeros_and_ones()
    bitmap[tile * 64 + row] |= np.uint64(1 << bit)
    refused((bitmap, offsets, values), rf"tile {tile}\b.*bits outside")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_of_several_faults_is_named_whatever_the_threads(
    kernel: str, threads: int
) -> None:
    bitmap, offsets, values = packed_zeros_and_ones()
    for tile in (9, 6, 2):
        bitmap[tile * 64] = 2**64 - 1
        bitmap[tile * 64 + 1] = 2**64 - 1
    refused((bitmap, offsets, values), r"tile 2\b", threads)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_flipped_bits_are_an_error_or_a_matrix_never_a_crash(
    kernel: str, data: st.DataObject
) -> None:
    bitmap, offsets, values = packed_zeros_and_ones()
    for _ in range(data.draw(st.integers(1, 4))):
        array = data.draw(st.sampled_from([bitmap, offsets]))
        place = data.draw(st.integers(0, array.size - 1))
        array[place] ^= array.dtype.type(1 << data.draw(st.integers(0, array.itemsize * 8 - 1)))
    out = np.empty((130, 200), np.uint16)
    try:
        expand(bitmap, offsets, values, out, threads=2)
    except KernelError:
        return
    # Not refused: then the offsets still fit the bitmap, and the bitmap says where the values are.
    assert np.count_nonzero(out) <= int(np.bitwise_count(bitmap).sum())
