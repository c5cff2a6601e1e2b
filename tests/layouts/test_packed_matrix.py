from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts import exponent_packed, packed_matrix, quantised, tiles
from tierd_layouts.errors import (
    ArraySetWrong,
    BadGroup,
    BadMatrix,
    BitmapWrong,
    OffsetsWrong,
    TileError,
    UnknownCodec,
    UnknownTensorDtype,
    ValuesWrong,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_layouts.packed_matrix import PackedMatrix

BITS = np.random.default_rng(1).integers(0, 0x7F00, (70, 130), np.uint16)
BITS[::3, ::2] = 0


def all_forms() -> Iterator[PackedMatrix]:
    yield packed_matrix.encode_raw(BITS, "BF16")
    for masked in (True, False):
        yield exponent_packed.encode(BITS, "BF16", masked=masked)
        for codec in ("int8", "int4"):
            yield quantised.encode(BITS, "BF16", codec=codec, group=128, masked=masked)


@pytest.mark.parametrize("matrix", list(all_forms()), ids=lambda m: f"{m.codec}-{m.masked}")
def test_the_codecs_name_decides_how_a_matrix_is_read(matrix: PackedMatrix) -> None:
    packed_matrix.validate(matrix, matrix.nnz)
    decoded = packed_matrix.decode(matrix)
    if matrix.codec in ("int8", "int4"):
        np.testing.assert_array_equal(decoded, quantised.decode(matrix))
    else:
        np.testing.assert_array_equal(decoded, BITS)
    with pytest.raises(BitmapWrong, match=f"{matrix.nnz} elements are kept, nnz is 0"):
        packed_matrix.validate(matrix, 0)


@pytest.mark.parametrize("matrix", list(all_forms()), ids=lambda m: f"{m.codec}-{m.masked}")
def test_a_matrix_says_what_it_stores(matrix: PackedMatrix) -> None:
    names = list(matrix.arrays())
    assert names[-1] == "values"
    assert ("bitmap" in names) == matrix.masked
    assert names.index("offsets") == int(matrix.masked)
    assert matrix.nbytes == sum(array.nbytes for array in matrix.arrays().values())
    if matrix.bitmap is None:
        assert matrix.nnz == 70 * 130
    else:
        assert matrix.nnz == int(np.bitwise_count(matrix.bitmap).sum())


def test_a_raw_matrix_is_what_tiles_encodes() -> None:
    matrix = packed_matrix.encode_raw(BITS, "F16")
    assert (matrix.codec, matrix.dtype, matrix.rows, matrix.cols) == ("raw", "F16", 70, 130)
    for name, array in zip(("bitmap", "offsets", "values"), tiles.encode(BITS), strict=True):
        np.testing.assert_array_equal(matrix.arrays()[name], array)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"codec": "zip"}, UnknownCodec, "'zip', those of matrices are raw, exponent-packed"),
        ({"codec": "dense"}, UnknownCodec, "'dense'"),
        ({"dtype": "I16"}, UnknownTensorDtype, "'I16', codec raw knows BF16, F16, F32"),
        ({"dtype": "F32"}, ValuesWrong, "values are uint16, F32 needs uint32"),
        ({"bitmap": None}, ArraySetWrong, "arrays offsets, values, codec raw has bitmap"),
        ({"heads": np.zeros(6, np.uint32)}, ArraySetWrong, "heads"),
        ({"scales": np.zeros(6, np.uint16)}, ArraySetWrong, "scales"),
        ({"codec": "int8"}, ArraySetWrong, "codec int8 has bitmap, offsets, scales, values"),
        ({"group": 64}, BadGroup, "group of 64 columns, codec raw has none"),
    ],
)
def test_what_does_not_belong_to_the_codec_is_refused(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    matrix = replace(packed_matrix.encode_raw(BITS, "BF16"), **change)
    for check in (packed_matrix.decode, lambda m: packed_matrix.validate(m, m.nnz)):
        with pytest.raises(error, match=text):
            check(matrix)


def test_a_matrix_of_one_codec_is_not_read_as_another() -> None:
    matrix = exponent_packed.encode(BITS, "BF16", masked=True)
    with pytest.raises(ArraySetWrong, match="codec int8 has"):
        packed_matrix.decode(replace(matrix, codec="int8"))
    small = quantised.encode(BITS, "BF16", codec="int4", group=128, masked=True)
    with pytest.raises(TileError):
        packed_matrix.decode(replace(small, codec="int8"))


@pytest.mark.parametrize("shape", [(0, 1 << 60), (1 << 60, 0)])
@pytest.mark.parametrize("matrix", list(all_forms()), ids=lambda m: f"{m.codec}-{m.masked}")
def test_shapes_without_elements_cost_nothing_however_long(
    matrix: PackedMatrix, shape: tuple[int, int]
) -> None:
    rows, cols = shape
    empty: dict[str, Any] = {name: array[:0] for name, array in matrix.arrays().items()}
    empty["offsets"] = matrix.offsets[:1]
    nothing = replace(matrix, rows=rows, cols=cols, **empty)
    packed_matrix.validate(nothing, 0)
    assert packed_matrix.decode(nothing).shape == shape


@pytest.mark.parametrize("matrix", list(all_forms()), ids=lambda m: f"{m.codec}-{m.masked}")
def test_a_shape_far_larger_than_the_arrays_is_refused_before_memory_is_taken(
    matrix: PackedMatrix,
) -> None:
    with pytest.raises((OffsetsWrong, BitmapWrong), match="needs"):
        packed_matrix.decode(replace(matrix, rows=1 << 30, cols=1 << 30))


@pytest.mark.parametrize("shape", [(0, 1 << 61), (1 << 61, 0), (0, 1 << 64), (1 << 31, 1 << 31)])
@pytest.mark.parametrize("matrix", list(all_forms()), ids=lambda m: f"{m.codec}-{m.masked}")
def test_a_shape_that_numpy_cannot_express_is_our_error(
    matrix: PackedMatrix, shape: tuple[int, int]
) -> None:
    """Found by tests/fuzz: numpy refused to make such an array, with a plain ValueError."""
    rows, cols = shape
    empty: dict[str, Any] = {name: array[:0] for name, array in matrix.arrays().items()}
    empty["offsets"] = matrix.offsets[:1]
    nothing = replace(matrix, rows=rows, cols=cols, **empty)
    with pytest.raises(BadMatrix, match="is above the limit of 2305843009213693951 elements"):
        packed_matrix.validate(nothing, 0)
    with pytest.raises(BadMatrix, match="is above the limit"):
        packed_matrix.decode(nothing)
