from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tierd_layouts import tiles
from tierd_layouts.errors import (
    ArrayBytesWrong,
    BadShape,
    DuplicateName,
    NameRefused,
    UnknownTensorDtype,
)
from tierd_layouts.layer_builder import LayerBuilder
from tierd_layouts.records import Array


def test_arrays_start_on_256_bytes_and_the_layer_ends_on_a_page() -> None:
    builder = LayerBuilder("a")
    builder.add_dense("a.norm", "BF16", (3,), b"123456")
    matrix = np.ones((65, 65), np.uint16)
    tensor = builder.add_raw("a.weight", "BF16", matrix)
    layer = builder.finish()
    assert tensor.arrays["bitmap"] == Array(256, 4 * 512)
    assert tensor.arrays["offsets"] == Array(256 + 2048, 20)
    assert tensor.arrays["values"] == Array(256 + 2048 + 256, 8192 + 128 + 128 + 16)
    assert tensor.nnz == 65 * 65
    assert layer.nbytes == 12288
    content = b"".join(layer.pieces())
    assert len(content) == layer.nbytes
    bitmap, offsets, values = tiles.encode(matrix)
    expected = bytearray(layer.nbytes)
    for offset, data in ((0, b"123456"), (256, bitmap), (2304, offsets), (2560, values)):
        raw = bytes(data)
        expected[offset : offset + len(raw)] = raw
    assert content == expected


def test_a_layer_has_at_least_one_page() -> None:
    assert LayerBuilder("a").finish().nbytes == 4096
    builder = LayerBuilder("a")
    builder.add_dense("a.weight", "F32", (0, 5), b"")
    assert b"".join(builder.finish().pieces()) == bytes(4096)


def test_dense_data_is_any_buffer_and_is_not_copied() -> None:
    data = np.arange(6, dtype=np.uint16).reshape(2, 3)
    builder = LayerBuilder("a")
    builder.add_dense("a.weight", "BF16", [2, 3], data, source="other.weight")
    data[0, 0] = 77
    layer = builder.finish()
    assert bytes(layer.chunks[0].data) == data.tobytes()
    assert layer.tensors[0].source == "other.weight"
    assert layer.tensors[0].nnz == 6


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("BF16", np.uint32), ("F32", np.uint16), ("I16", np.uint16), ("BF17", np.uint16)],
)
def test_raw_takes_only_bits_of_its_float_dtypes(dtype: str, bits: Any) -> None:
    with pytest.raises(UnknownTensorDtype, match="uint16 bits of BF16 or F16"):
        LayerBuilder("a").add_raw("a.weight", dtype, np.zeros((2, 2), bits))


def test_raw_takes_only_matrices() -> None:
    with pytest.raises(BadShape, match=r"tensor 'a.weight': shape \[4\]"):
        LayerBuilder("a").add_raw("a.weight", "BF16", np.zeros(4, np.uint16))


def test_dense_data_of_another_length_is_refused() -> None:
    with pytest.raises(ArrayBytesWrong, match=r"5 bytes, BF16\[3\] needs 6"):
        LayerBuilder("a").add_dense("a.weight", "BF16", (3,), b"12345")


def test_an_unknown_dense_dtype_is_refused() -> None:
    with pytest.raises(UnknownTensorDtype, match="'F4'"):
        LayerBuilder("a").add_dense("a.weight", "F4", (3,), b"12345")


def test_two_tensors_whose_stored_names_meet_are_refused() -> None:
    builder = LayerBuilder("a")
    builder.add_raw("a.weight", "BF16", np.ones((2, 2), np.uint16))
    with pytest.raises(DuplicateName, match=r"'a.weight.offsets' appears twice"):
        builder.add_dense("a.weight.offsets", "U8", (1,), b"1")
    with pytest.raises(DuplicateName):
        builder.add_raw("a.weight", "BF16", np.ones((2, 2), np.uint16))
    assert len(builder.finish().tensors) == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\0", "__pad__.0"])
def test_names_that_no_reader_would_take_are_not_written(name: str) -> None:
    with pytest.raises(NameRefused):
        LayerBuilder("a").add_dense(name, "U8", (1,), b"1")
    if name != "__pad__.0":
        with pytest.raises(NameRefused):
            LayerBuilder(name)
