"""The native encoder gives the bytes that the numpy encoders of tierd_layouts give."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_kernels import encode
from tierd_kernels.errors import KernelError
from tierd_layouts import exponent_packed, packed_matrix, runs
from tierd_layouts.errors import BadMatrix
from tierd_layouts.packed_matrix import PackedMatrix

LENGTHS = st.one_of(
    st.sampled_from([0, 1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129]), st.integers(0, 200)
)
DTYPES = ("BF16", "F16", "F32")


def assert_same(found: PackedMatrix, expected: PackedMatrix) -> None:
    for name in ("codec", "dtype", "rows", "cols", "group"):
        assert getattr(found, name) == getattr(expected, name), name
    arrays, wanted = found.arrays(), expected.arrays()
    assert list(arrays) == list(wanted)
    for name, array in arrays.items():
        assert array.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(array, wanted[name], name)


def assert_all_forms_same(bits: Any, dtype: str) -> None:
    """Raw, exponent-packed with and without a bitmap, and the sizes of all of them."""
    raw = packed_matrix.encode_raw(bits, dtype)
    masked = exponent_packed.encode(bits, dtype, masked=True)
    dense_form = exponent_packed.encode(bits, dtype, masked=False)
    assert_same(encode.encode_raw(bits, dtype), raw)
    assert_same(encode.encode_exponent(bits, dtype, masked=True), masked)
    assert_same(encode.encode_exponent(bits, dtype, masked=False), dense_form)
    assert encode.sizes(bits, dtype) == {
        ("dense", False): bits.nbytes,
        ("raw", True): raw.nbytes,
        ("exponent-packed", True): masked.nbytes,
        ("exponent-packed", False): dense_form.nbytes,
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=LENGTHS,
    cols=LENGTHS,
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0]),
    trained=st.booleans(),
)
def test_every_form_is_equal_to_its_specification(
    encoder: str,
    random_bits: Callable[..., Any],
    random_weights: Callable[..., Any],
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    density: float,
    trained: bool,
) -> None:
    make = random_weights if trained else random_bits
    assert_all_forms_same(make(seed, rows, cols, dtype, density), dtype)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_a_few_elements_choose_as_specified_among_forms_that_tie(
    encoder: str, data: st.DataObject, dtype: str
) -> None:
    """With few elements nearly every choice of planes and base costs the same."""
    element = np.uint32 if dtype == "F32" else np.uint16
    tops = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=70))
    bits = np.array([tops], np.int64) << np.dtype(element).itemsize * 8 - 9
    bits |= data.draw(st.sampled_from([0, 1, 5]))
    assert_all_forms_same(bits.astype(element), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", range(9))
def test_every_number_of_planes_is_written(encoder: str, dtype: str, planes: int) -> None:
    rng = np.random.default_rng(planes)
    element = np.uint32 if dtype == "F32" else np.uint16
    base = 256 - (1 << planes)
    tops = rng.integers(base, 256, (128, 128), element)
    if planes < 8:
        tops[rng.random(tops.shape) < 0.002] = 3  # escapes
    low = rng.integers(0, 1 << 7, tops.shape, element)
    bits = (tops << (element(0).itemsize * 8 - 9)).astype(element) | low
    heads = encode.encode_exponent(bits, dtype, masked=False).heads
    assert heads is not None
    assert set((heads >> 8 & 0xFF).tolist()) == {planes}
    assert ((heads >> 16).sum() > 0) == (planes < 8)
    assert_all_forms_same(bits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_16_bits_is_encoded(encoder: str, dtype: str) -> None:
    """NaN with payloads, infinities, both zeros and denormals: the top half of a float32, too."""
    patterns = np.arange(1 << 16).reshape(256, 256)
    if dtype == "F32":
        assert_all_forms_same((patterns << 16 | patterns).astype(np.uint32), dtype)
    else:
        assert_all_forms_same(patterns.astype(np.uint16), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_rows_may_lie_apart_backwards_or_on_each_other(
    encoder: str, random_weights: Callable[..., Any], dtype: str
) -> None:
    whole = random_weights(1, 140, 300, dtype).copy()
    whole.flags.writeable = False
    for bits in (
        whole[:, 7:200],
        whole[::3],
        whole[::-1],
        np.broadcast_to(whole[5], (70, 300)),
        whole[:, :1],
        whole[:, 3:3],
    ):
        assert_all_forms_same(bits, dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_of_many_tiles_is_equal(
    encoder: str, random_weights: Callable[..., Any], dtype: str, seed: int
) -> None:
    bits = random_weights(seed, 520, 1030, dtype).copy()
    bits[64:192, 64:192] = 0  # empty tiles inside
    assert_all_forms_same(bits, dtype)


CALLS: dict[str, Callable[[Any, str], object]] = {
    "raw": encode.encode_raw,
    "masked": lambda bits, dtype: encode.encode_exponent(bits, dtype, masked=True),
    "dense form": lambda bits, dtype: encode.encode_exponent(bits, dtype, masked=False),
    "int8": lambda bits, dtype: encode.quantise(bits, dtype, codec="int8", group=64, masked=True),
    "sizes": encode.sizes,
    "prune": lambda bits, dtype: encode.prune_magnitude(bits, dtype, 0.5),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("bits", "dtype", "text"),
    [
        (np.zeros(4, np.uint16), "BF16", "1 dimensions"),
        (np.zeros((4, 4), np.uint32), "BF16", "uint32"),
        (np.zeros((4, 4), np.uint16), "F32", "uint16"),
        (np.zeros((4, 4), np.float16), "F16", "float16"),
        (np.zeros((4, 4), ">u2"), "BF16", ">u2"),
        (np.zeros((4, 4), np.uint16), "I16", "I16"),
        (np.zeros((4, 4), np.uint16).T, "BF16", "8 bytes apart"),
        (np.zeros((4, 8), np.uint16)[:, ::2], "BF16", "4 bytes apart"),
        (np.zeros(33, np.uint8)[1:].view(np.uint16).reshape(4, 4), "BF16", "multiples of 2"),
    ],
)
def test_a_matrix_of_another_kind_is_refused(call: str, bits: Any, dtype: str, text: str) -> None:
    with pytest.raises(BadMatrix, match=text):
        CALLS[call](bits, dtype)


@pytest.mark.parametrize("call", ["raw", "masked", "dense form", "int8"])
def test_more_values_than_offsets_can_address_are_refused(
    encoder: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    bits = np.full((64, 64), 0x3F80, np.uint16)
    monkeypatch.setattr(runs, "MAX_RUN_UNITS", 128)
    with pytest.raises(BadMatrix, match="split the matrix"):
        CALLS[call](np.tile(bits, (1, 3)), "BF16")
    monkeypatch.setattr(runs, "MAX_RUN_UNITS", 512)
    CALLS[call](bits, "BF16")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(KernelError, match=r"outside \[0, 1\)"):
        encode.prune_magnitude(np.zeros((4, 4), np.uint16), "BF16", sparsity)
