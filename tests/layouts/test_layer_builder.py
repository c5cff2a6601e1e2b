from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts import exponent_packed, packed_matrix, quantised, tiles
from tierd_layouts.errors import (
    ArrayBytesWrong,
    ArraySetWrong,
    BadGroup,
    BadShape,
    DuplicateName,
    NameRefused,
    UnknownCodec,
    UnknownTensorDtype,
)
from tierd_layouts.layer_builder import LayerBuilder
from tierd_layouts.records import Array

if TYPE_CHECKING:
    from tierd_layouts.packed_matrix import PackedMatrix


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


def small_matrix(**changes: Any) -> PackedMatrix:
    matrix = quantised.encode(
        np.full((65, 65), 0x3F80, np.uint16), "BF16", codec="int8", group=128, masked=False
    )
    return replace(matrix, **changes)


def test_an_encoded_matrix_is_stored_array_by_array_and_not_copied() -> None:
    matrix = small_matrix()
    builder = LayerBuilder("a")
    tensor = builder.add_matrix("a.weight", matrix, source="other.weight")
    assert (tensor.codec, tensor.dtype, tensor.shape) == ("int8", "BF16", (65, 65))
    assert (tensor.tile, tensor.nnz, tensor.group) == ((64, 64), 65 * 65, 128)
    assert tensor.source == "other.weight"
    assert list(tensor.arrays) == ["offsets", "scales", "values"]
    assert tensor.arrays["scales"] == Array(256, 256)
    layer = builder.finish()
    values = layer.chunks[-1]
    assert values.data.nbytes == tensor.arrays["values"].nbytes == 4096 + 64 + 64 + 16
    matrix.values[0] = 99
    assert values.data[0] == 99
    assert bytes(layer.chunks[1].data) == matrix.scales.tobytes()  # type: ignore[union-attr]


def test_codecs_without_scales_have_no_group_in_the_index() -> None:
    bits = np.ones((2, 2), np.uint16)
    builder = LayerBuilder("a")
    packed = builder.add_matrix("a.x", exponent_packed.encode(bits, "BF16", masked=True))
    assert (packed.codec, packed.group) == ("exponent-packed", None)
    raw = builder.add_matrix("a.y", packed_matrix.encode_raw(bits, "BF16"))
    assert (raw.codec, raw.group) == ("raw", None)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"codec": "zip"}, UnknownCodec, "'zip'"),
        ({"dtype": "I16"}, UnknownTensorDtype, "'I16'"),
        ({"scales": None}, ArraySetWrong, "codec int8 has"),
        ({"group": 0}, BadGroup, "group None, needs"),
        ({"group": 100}, BadGroup, "group 100, needs"),
        ({"group": 64}, ArrayBytesWrong, "'scales' has 256 bytes"),
        ({"rows": 64}, ArrayBytesWrong, "'offsets' has"),
        ({"values": np.zeros(4240, np.int8)}, ArrayBytesWrong, "values are int8 .* contiguous U8"),
        ({"values": np.zeros(8480, np.uint8)[::2]}, ArrayBytesWrong, "strides"),
        ({"values": np.zeros(4224, np.uint8)}, ArrayBytesWrong, "values have 4224 bytes"),
        ({"scales": np.zeros(64, np.uint32)}, ArrayBytesWrong, "scales are uint32"),
    ],
)
def test_a_matrix_that_no_reader_would_take_is_not_written(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    builder = LayerBuilder("a")
    with pytest.raises(error, match=text):
        builder.add_matrix("a.weight", small_matrix(**changes))
    assert builder.finish().tensors == ()
    builder.add_matrix("a.weight", small_matrix())
