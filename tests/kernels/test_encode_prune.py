"""Magnitude pruning in place equals its definition by sorting."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tierd_kernels import encode
from tierd_kernels.errors import KernelError

INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def element_of(dtype: str) -> Any:
    return np.uint32 if dtype == "F32" else np.uint16


def pruned_by_sorting(bits: Any, dtype: str, sparsity: float) -> Any:
    """The definition: sort by (magnitude, already zero first, position), cut, leave the NaN."""
    flat = bits.reshape(-1).copy()
    sign = 1 << (flat.itemsize * 8 - 1)
    magnitudes = (flat & flat.dtype.type(sign - 1)).astype(np.int64)
    order = np.lexsort((np.arange(flat.size), flat != 0, magnitudes))
    order = order[magnitudes[order] <= INFINITY[dtype]]
    flat[order[: round(sparsity * flat.size)]] = 0
    return flat.reshape(bits.shape)


def assert_pruned(bits: Any, dtype: str, sparsity: float) -> None:
    expected = pruned_by_sorting(bits, dtype, sparsity)
    encode.prune_magnitude(bits, dtype, sparsity)
    np.testing.assert_array_equal(bits, expected)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[str, Any]:
    dtype = draw(st.sampled_from(sorted(INFINITY)))
    element = element_of(dtype)
    infinity, sign = INFINITY[dtype], 1 << (element(0).itemsize * 8 - 1)
    special = [0, sign, 1, sign | 1, infinity - 1, infinity, infinity + 1, sign | infinity]
    elements = st.one_of(
        st.sampled_from([element(value) for value in special]), hnp.from_dtype(np.dtype(element))
    )
    shape = st.tuples(st.integers(0, 9), st.integers(0, 9))
    return dtype, draw(hnp.arrays(element, shape, elements=elements))


@settings(max_examples=200, deadline=None)
@given(matrices(), st.floats(0, 1, exclude_max=True))
def test_pruning_equals_its_definition_by_sorting(case: tuple[str, Any], sparsity: float) -> None:
    assert_pruned(case[1].copy(), case[0], sparsity)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    cols=st.sampled_from([1, 511, 512, 513, 1024, 1500]),
    dtype=st.sampled_from(sorted(INFINITY)),
    few=st.booleans(),
    sparsity=st.sampled_from([0.05, 0.5, 0.93, 0.999]),
)
def test_ties_end_at_any_place_of_a_row(
    random_bits: Callable[..., Any],
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    few: bool,
    sparsity: float,
) -> None:
    """`few`: four magnitudes only, -0.0 among them, so that a quarter of all elements tie."""
    bits = random_bits(seed, rows, cols, dtype, 0.8)
    if few:
        sign = 1 << (bits.itemsize * 8 - 1)
        bits &= bits.dtype.type(sign | 3)
    assert_pruned(bits, dtype, sparsity)


@pytest.mark.parametrize("dtype", sorted(INFINITY))
def test_weights_of_a_trained_layer_are_pruned_to_the_count(
    random_weights: Callable[..., Any], dtype: str
) -> None:
    for sparsity in (0.3, 0.5, 0.7):
        bits = random_weights(3, 300, 700, dtype, 0.95).copy()
        assert_pruned(bits, dtype, sparsity)
        assert int((bits == 0).sum()) == round(sparsity * bits.size)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_only_the_view_is_pruned(random_weights: Callable[..., Any], dtype: str) -> None:
    whole = random_weights(4, 90, 300, dtype, 1.0).copy()
    before = whole.copy()
    assert_pruned(whole[::-2, 5:250], dtype, 0.6)
    mask = np.ones(whole.shape, np.bool_)
    mask[::-2, 5:250] = False
    np.testing.assert_array_equal(whole[mask], before[mask])
    assert not np.array_equal(whole, before)


def test_a_matrix_that_is_sparse_enough_stays_as_it_is() -> None:
    bits = np.array([[0, 0x3F80], [0, 0x8000]], np.uint16)
    encode.prune_magnitude(bits, "BF16", 0.5)
    assert bits.tolist() == [[0, 0x3F80], [0, 0x8000]]


def test_nan_stays_when_everything_else_is_pruned() -> None:
    bits = np.array([[0x7FC1, 0x7F80, 0xFFFF, 0x3F80]], np.uint16)
    encode.prune_magnitude(bits, "BF16", 0.99)
    assert bits.tolist() == [[0x7FC1, 0, 0xFFFF, 0]]


def test_a_read_only_matrix_is_refused() -> None:
    bits = np.zeros((4, 4), np.uint16)
    bits.flags.writeable = False
    with pytest.raises(KernelError, match="read-only"):
        encode.prune_magnitude(bits, "BF16", 0.5)
