"""int8 and int4 as the numpy specification writes them, to the byte."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_kernels import encode
from tierd_layouts import quantised
from tierd_layouts.errors import BadGroup, BadMatrix, UnknownCodec

LENGTHS = st.one_of(
    st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 192]), st.integers(0, 200)
)
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
CODECS = ("int8", "int4")
GROUPS = (64, 128, 192, 1 << 40)


def assert_same(bits: Any, dtype: str, codec: str, group: int, masked: bool) -> None:
    found = encode.quantise(bits, dtype, codec=codec, group=group, masked=masked)
    expected = quantised.encode(bits, dtype, codec=codec, group=group, masked=masked)
    assert (found.codec, found.dtype, found.rows, found.cols, found.group) == (
        expected.codec,
        expected.dtype,
        expected.rows,
        expected.cols,
        expected.group,
    )
    arrays, wanted = found.arrays(), expected.arrays()
    assert list(arrays) == list(wanted)
    for name, array in arrays.items():
        assert array.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(array, wanted[name], name)


def made_finite(bits: Any, dtype: str) -> Any:
    """Without the lowest bit of the exponent nothing is infinite or NaN."""
    infinity = INFINITY[dtype]
    return bits & bits.dtype.type(~(infinity & -infinity) & (1 << 8 * bits.itemsize) - 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=LENGTHS,
    cols=LENGTHS,
    dtype=st.sampled_from(sorted(INFINITY)),
    density=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    trained=st.booleans(),
    codec=st.sampled_from(CODECS),
    group=st.sampled_from(GROUPS),
    masked=st.booleans(),
)
def test_every_byte_is_the_specified_one(
    encoder: str,
    random_bits: Callable[..., Any],
    random_weights: Callable[..., Any],
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    density: float,
    trained: bool,
    codec: str,
    group: int,
    masked: bool,
) -> None:
    make = random_weights if trained else random_bits
    bits = made_finite(make(seed, rows, cols, dtype, density), dtype)
    assert_same(bits, dtype, codec, group, masked)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(sorted(INFINITY)),
    codec=st.sampled_from(CODECS),
)
def test_extreme_groups_choose_the_specified_scale(
    encoder: str, data: st.DataObject, dtype: str, codec: str
) -> None:
    """Denormals, the largest finite numbers, both zeros: where scales end, or must not round up."""
    infinity = INFINITY[dtype]
    element = np.uint32 if dtype == "F32" else np.uint16
    sign = 1 << (element(0).itemsize * 8 - 1)
    near = st.one_of(
        st.integers(0, 5),
        st.integers(infinity - 200, infinity - 1),
        st.integers(0, infinity - 1),
    )
    magnitudes = data.draw(st.lists(near, min_size=1, max_size=130))
    bits: Any = np.array([magnitudes, magnitudes[::-1]], element)
    bits[1, ::2] |= sign
    assert_same(bits, dtype, codec, 64, True)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", sorted(INFINITY))
def test_quotients_halfway_between_levels_round_to_the_even_one(
    encoder: str, codec: str, dtype: str
) -> None:
    halves = np.arange(-14, 15, dtype=np.float32).reshape(1, -1) / 2
    if codec == "int8":
        halves = np.concatenate([halves, [[127.0]]], axis=1).astype(np.float32)
    bits: Any = halves.view(np.uint32)
    if dtype == "BF16":
        bits = (bits >> 16).astype(np.uint16)
    elif dtype == "F16":
        bits = halves.astype(np.float16).view(np.uint16)
    found = encode.quantise(bits, dtype, codec=codec, group=64, masked=False)
    assert found.scales is not None
    assert codec == "int4" or found.scales[0] == 0x3F80
    assert_same(bits, dtype, codec, 64, False)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("masked", [True, False])
def test_rows_may_lie_apart_and_backwards(
    encoder: str, random_weights: Callable[..., Any], codec: str, masked: bool
) -> None:
    whole = random_weights(1, 140, 300, "BF16")
    assert_same(whole[::-1, 7:250], "BF16", codec, 128, masked)
    assert_same(whole[::3], "BF16", codec, 64, masked)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", sorted(INFINITY))
def test_a_matrix_of_many_tiles_is_equal(
    encoder: str, random_weights: Callable[..., Any], codec: str, dtype: str, seed: int
) -> None:
    assert_same(random_weights(seed, 330, 1030, dtype), dtype, codec, 128, True)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", sorted(INFINITY))
def test_a_weight_that_is_not_finite_is_refused(encoder: str, codec: str, dtype: str) -> None:
    for beyond in (0, 1):
        bits = np.zeros((70, 70), np.uint32 if dtype == "F32" else np.uint16)
        bits[69, 69] = INFINITY[dtype] + beyond
        with pytest.raises(BadMatrix, match=f"not finite, codec {codec}"):
            encode.quantise(bits, dtype, codec=codec, group=64, masked=True)


def test_a_codec_or_a_group_that_does_not_exist_is_refused() -> None:
    bits = np.zeros((4, 4), np.uint16)
    with pytest.raises(UnknownCodec, match="int5"):
        encode.quantise(bits, "BF16", codec="int5", group=64, masked=True)
    for group in (-64, 0, 63, 100):
        with pytest.raises(BadGroup, match=f"group of {group}"):
            encode.quantise(bits, "BF16", codec="int8", group=group, masked=True)
