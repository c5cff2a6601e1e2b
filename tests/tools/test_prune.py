from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tierd_tools.errors import BadSetting
from tierd_tools.prune import DTYPES, is_pruned, magnitude

INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def bits_type(dtype: str) -> type[np.uint16] | type[np.uint32]:
    return np.uint32 if dtype == "F32" else np.uint16


def pruned_by_sorting(bits: np.ndarray, dtype: str, sparsity: float) -> np.ndarray:
    """The definition: sort by (magnitude, already zero first, position), cut, leave the NaN."""
    flat = bits.reshape(-1).copy()
    sign = 1 << (flat.dtype.itemsize * 8 - 1)
    magnitudes = (flat & flat.dtype.type(sign - 1)).astype(np.int64)
    order = np.lexsort((np.arange(flat.size), flat != 0, magnitudes))
    order = order[magnitudes[order] <= INFINITY[dtype]]
    flat[order[: round(sparsity * flat.size)]] = 0
    return flat.reshape(bits.shape)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    kind = bits_type(dtype)
    infinity, sign = INFINITY[dtype], 1 << (np.dtype(kind).itemsize * 8 - 1)
    special = [0, sign, 1, sign | 1, infinity - 1, infinity, infinity + 1, sign | infinity]
    elements = st.one_of(
        st.sampled_from([kind(value) for value in special]),
        hnp.from_dtype(np.dtype(kind)),
    )
    return dtype, draw(
        hnp.arrays(kind, st.tuples(st.integers(0, 9), st.integers(0, 9)), elements=elements)
    )


@given(matrices(), st.floats(0, 1, exclude_max=True))
def test_pruning_equals_its_definition_by_sorting(
    case: tuple[str, np.ndarray], sparsity: float
) -> None:
    dtype, bits = case
    before = bits.copy()
    assert np.array_equal(
        magnitude(bits, dtype, sparsity), pruned_by_sorting(bits, dtype, sparsity)
    )
    assert np.array_equal(bits, before), "the argument was written to"


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_pruning_equals_its_definition_over_several_steps_of_the_histogram(dtype: str) -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(0, 0.02, (700, 901)).astype(np.float32)
    kind = bits_type(dtype)
    if dtype == "F32":
        bits = values.view(np.uint32)
    elif dtype == "F16":
        bits = values.astype(np.float16).view(np.uint16)
    else:
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    bits = bits.astype(kind)
    bits[rng.random(bits.shape) < 0.1] = 0
    for sparsity in (0.05, 0.5, 0.93):
        found = magnitude(bits, dtype, sparsity)
        assert np.array_equal(found, pruned_by_sorting(bits, dtype, sparsity))
        wanted = max(round(sparsity * bits.size), int((bits == 0).sum()))
        assert int((found == 0).sum()) == wanted


def test_a_matrix_that_is_sparse_enough_is_returned_as_it_is() -> None:
    bits = np.array([[0, 0x3F80], [0, 0x8000]], np.uint16)
    assert magnitude(bits, "BF16", 0.5) is bits


def test_negative_zero_goes_before_any_number_and_becomes_positive_zero() -> None:
    bits = np.array([0x0001, 0x8000, 0x3F80, 0x8000], np.uint16)
    assert magnitude(bits, "BF16", 0.25).tolist() == [0x0001, 0, 0x3F80, 0x8000]


def test_nan_stays_when_everything_else_is_pruned() -> None:
    bits = np.array([0x7FC1, 0x7F80, 0xFFFF, 0x3F80], np.uint16)
    assert magnitude(bits, "BF16", 0.99).tolist() == [0x7FC1, 0, 0xFFFF, 0]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 2.0, math.nan, math.inf, -math.inf])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(BadSetting, match=r"outside \[0, 1\)"):
        magnitude(np.zeros(4, np.uint16), "BF16", sparsity)


def test_a_dtype_that_cannot_be_pruned_is_refused_by_name() -> None:
    with pytest.raises(BadSetting, match="I64"):
        magnitude(np.zeros(4, np.uint64), "I64", 0.5)
    with pytest.raises(BadSetting, match="uint32"):
        magnitude(np.zeros(4, np.uint32), "BF16", 0.5)


def test_a_matrix_counts_as_pruned_from_a_hundredth_below_what_is_wanted() -> None:
    bits = np.ones((100, 100), np.uint16)
    bits.reshape(-1)[:4900] = 0
    assert is_pruned(bits, 0.49)
    assert is_pruned(bits, 0.5)
    assert not is_pruned(bits, 0.51)
    assert not is_pruned(np.ones((10, 10), np.uint16), 0.005)
    assert not is_pruned(np.zeros((0, 4), np.uint16), 0.5)


def test_negative_zeros_do_not_count_because_they_are_stored() -> None:
    bits = np.full((8, 8), 0x8000, np.uint16)
    assert not is_pruned(bits, 0.5)


def test_two_of_four_counts_as_pruned_whatever_is_wanted() -> None:
    bits = np.ones((64, 128), np.uint16)
    bits.reshape(-1, 4)[:, 1:3] = 0
    assert is_pruned(bits, 0.9)
    bits[3, :4] = 0  # a weight that happens to be zero
    assert is_pruned(bits, 0.9)
    bits[3, :4] = [0, 1, 1, 1]
    assert not is_pruned(bits, 0.9)
    half = np.ones((64, 128), np.uint16)
    half[:, ::2] = 0
    half[:, :8] = [0, 0, 0, 0, 1, 1, 1, 1]
    assert not is_pruned(half, 0.9)
    assert not is_pruned(np.tile(np.array([0, 0, 1], np.uint16), (4, 1)), 0.9)
