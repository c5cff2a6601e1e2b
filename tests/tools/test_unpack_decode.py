from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tierd_layouts import exponent_packed, packed_matrix, quantised
from tierd_layouts.container import LayerBuilder, tensor_bits
from tierd_tools.errors import VerifyError
from tierd_tools.unpack_decode import weight_bits


def layer_bytes(builder: LayerBuilder) -> bytes:
    return b"".join(bytes(piece) for piece in builder.finish().pieces())


def random_bits(dtype: str, rows: int, columns: int) -> Any:
    rng = np.random.default_rng([rows, columns])
    weights = rng.normal(0, 0.02, (rows, columns)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.5] = 0
    if dtype == "F16":
        return weights.astype(np.float16).view(np.uint16)
    bits = weights.view(np.uint32)
    return bits if dtype == "F32" else (bits >> 16).astype(np.uint16)


@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (70, 201), (0, 5), (5, 0)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("masked", [True, False])
def test_every_codec_is_decoded_as_the_specification_does(
    shape: tuple[int, int], dtype: str, masked: bool
) -> None:
    bits = random_bits(dtype, *shape)
    for matrix in (
        packed_matrix.encode_raw(bits, dtype),
        exponent_packed.encode(bits, dtype, masked=masked),
        quantised.encode(bits, dtype, codec="int8", group=128, masked=masked),
        quantised.encode(bits, dtype, codec="int4", group=64, masked=masked),
    ):
        builder = LayerBuilder("l")
        tensor = builder.add_matrix("l.w", matrix)
        found = weight_bits(layer_bytes(builder), tensor, where="p")
        assert np.array_equal(found, packed_matrix.decode(matrix))
        assert found.shape == shape
        if matrix.codec in ("raw", "exponent-packed"):
            assert np.array_equal(found, bits)


def test_dense_tensors_are_views_of_the_layer() -> None:
    builder = LayerBuilder("l")
    tensor = builder.add_dense("l.w", "I64", (2, 2), np.arange(4, dtype="<i8").tobytes())
    content = layer_bytes(builder)
    found = weight_bits(content, tensor, where="p")
    assert np.array_equal(found, tensor_bits(content, tensor))
    assert not found.flags.owndata


def test_what_is_no_matrix_is_refused_by_name() -> None:
    builder = LayerBuilder("l")
    bits = random_bits("BF16", 70, 70)
    tensor = builder.add_matrix("l.w", packed_matrix.encode_raw(bits, "BF16"))
    content = bytearray(layer_bytes(builder))
    first_tile = tensor.arrays["bitmap"].offset
    content[first_tile : first_tile + 512] = bytes(512)  # but it has values
    with pytest.raises(VerifyError, match=r"my/pack: tensor 'l\.w': "):
        weight_bits(bytes(content), tensor, where="my/pack")
    wrong = replace(tensor, shape=(700, 70))
    with pytest.raises(VerifyError, match=r"'l\.w'"):
        weight_bits(bytes(content), wrong, where="my/pack")
