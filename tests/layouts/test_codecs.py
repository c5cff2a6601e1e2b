from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tierd_layouts import exponent_packed, packed_matrix, quantised
from tierd_layouts.codecs import (
    ARRAYS_OF_CODEC,
    array_names,
    fixed_bytes,
    stored_dtype,
    values_range,
)
from tierd_layouts.tile_grid import TileGrid


def test_only_raw_and_dense_have_one_set_of_arrays() -> None:
    for codec, names in ARRAYS_OF_CODEC.items():
        assert array_names(codec, masked=True) == names
        without = array_names(codec, masked=False)
        if codec in ("dense", "raw"):
            assert without == names
        else:
            assert without == tuple(name for name in names if name != "bitmap")


def test_values_have_the_elements_dtype_only_where_they_are_elements() -> None:
    assert stored_dtype("dense", "I64", "data") == "I64"
    assert stored_dtype("raw", "F32", "values") == "U32"
    assert stored_dtype("raw", "BF16", "values") == "U16"
    for codec in ("exponent-packed", "int8", "int4"):
        assert stored_dtype(codec, "F32", "values") == "U8"
    arrays = ("bitmap", "offsets", "heads", "scales")
    assert [stored_dtype("int8", "F32", a) for a in arrays] == ["U64", "U32", "U32", "U16"]


def matrices(bits: Any) -> list[Any]:
    found = [packed_matrix.encode_raw(bits, "BF16")]
    for masked in (True, False):
        found.append(exponent_packed.encode(bits, "BF16", masked=masked))
        found += [
            quantised.encode(bits, "BF16", codec=codec, group=64, masked=masked)
            for codec in ("int8", "int4")
        ]
    return found


@pytest.mark.parametrize("kind", ["empty", "one a tile", "random", "full"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (64, 64), (65, 130), (200, 63)])
def test_what_the_encoders_write_is_inside_the_range(shape: tuple[int, int], kind: str) -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0x3F00, 0x4000, shape, np.uint16)  # 0.5 to 2: no level is 0
    if kind == "empty":
        bits[:] = 0
    elif kind == "one a tile":
        keep = np.zeros(shape, np.bool_)
        keep[::64, ::64] = True
        bits[~keep] = 0
    elif kind == "random":
        bits[rng.random(shape) < 0.7] = 0
    for matrix in matrices(bits):
        grid = TileGrid(matrix.rows, matrix.cols)
        fewest, most = values_range(matrix.codec, "BF16", grid, matrix.nnz, masked=matrix.masked)
        assert fewest <= matrix.values.nbytes <= most, matrix.codec
        fixed = fixed_bytes(matrix.codec, grid, masked=matrix.masked, group=matrix.group)
        found = {name: array.nbytes for name, array in matrix.arrays().items() if name != "values"}
        assert fixed == found, matrix.codec
        if kind == "one a tile" and matrix.masked and matrix.codec != "exponent-packed":
            assert matrix.values.nbytes == most


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_no_head_makes_a_record_larger_than_the_range(dtype: str) -> None:
    """8 planes and an escape for every element, alone in its tile or all together."""
    low = 3 if dtype == "F32" else 1
    sizes = []
    for kept in range(1, 4097):
        record = low * 8 * -(-kept // 8) + 64 * -(-kept // 64) + 4 * kept
        sizes.append(-(-record // 16) * 16)
        _, most = values_range("exponent-packed", dtype, TileGrid(64, 64), kept, masked=True)
        assert sizes[-1] <= most
    assert any(
        size == (low + 5) * kept + 5 * low + 73 for kept, size in enumerate(sizes, start=1)
    )  # no smaller constant would do
    _, most = values_range("exponent-packed", dtype, TileGrid(64, 64), 4096, masked=False)
    assert most == sizes[-1]
