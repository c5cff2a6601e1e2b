from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tierd_tools import wanda as module
from tierd_tools.errors import BadSetting
from tierd_tools.prune import DTYPES, magnitude
from tierd_tools.wanda import wanda

INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
FLOATS: dict[str, Any] = {"F16": np.float16, "F32": np.float32}
Bits = np.ndarray[Any, Any]


def bits_type(dtype: str) -> type[np.uint16] | type[np.uint32]:
    return np.uint32 if dtype == "F32" else np.uint16


def numbers(bits: Bits, dtype: str) -> np.ndarray[Any, Any]:
    """float64 of every element, by a way of its own."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        if dtype == "BF16":
            wide = np.zeros((*bits.shape, 2), np.uint16)
            wide[..., 1] = bits
            return np.asarray(wide.view(np.float32)[..., 0], np.float64)
        return np.asarray(bits.view(FLOATS[dtype]), np.float64)


def bits_of(values: np.ndarray[Any, Any], dtype: str) -> Bits:
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(FLOATS[dtype]).view(bits_type(dtype))


def pruned_by_sorting(bits: Bits, dtype: str, norms: Bits, sparsity: float) -> Bits:
    """The definition: per row, sort by (already zero first, score, position) and cut. NaN stays."""
    out = bits.copy()
    for row, line in zip(out, numbers(bits, dtype), strict=True):
        scores = [
            (False, 0.0, j)
            if row[j] == 0
            else (True, np.inf if np.isinf(x) else abs(x) * float(norms[j]), j)
            for j, x in enumerate(line)
            if not np.isnan(x)
        ]
        for _, _, j in sorted(scores)[: round(sparsity * bits.shape[1])]:
            row[j] = 0
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Bits, Bits]:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    kind, infinity = bits_type(dtype), INFINITY[dtype]
    sign = 1 << (np.dtype(kind).itemsize * 8 - 1)
    special = [0, sign, 1, sign | 1, infinity - 1, infinity, infinity + 1, sign | infinity]
    elements = st.one_of(
        st.sampled_from([kind(value) for value in special]), hnp.from_dtype(np.dtype(kind))
    )
    rows, cols = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    bits = draw(hnp.arrays(kind, (rows, cols), elements=elements))
    norm = st.one_of(
        st.sampled_from([np.float32(value) for value in (0, 1, 2, 1e-45, 3e38)]),
        st.floats(0, 4, width=32).map(np.float32),
    )
    return dtype, bits, draw(hnp.arrays(np.float32, cols, elements=norm))


@given(cases(), st.floats(0, 1, exclude_max=True))
def test_pruning_equals_its_definition_by_sorting(
    case: tuple[str, Bits, Bits], sparsity: float
) -> None:
    dtype, bits, norms = case
    before = bits.copy()
    expected = pruned_by_sorting(bits, dtype, norms, sparsity)
    assert np.array_equal(wanda(bits, dtype, norms, sparsity), expected)
    assert np.array_equal(bits, before), "the argument was written to"


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_row_of_several_bands_has_the_same_number_of_zeros(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEP", 300)  # three rows at a time, and a rest
    rng = np.random.default_rng(1)
    bits = bits_of(rng.normal(0, 0.02, (10, 90)), dtype)
    norms = rng.random(90).astype(np.float32)
    pruned = wanda(bits, dtype, norms, 0.4)
    assert np.count_nonzero(pruned == 0, axis=1).tolist() == [36] * 10
    assert np.array_equal(pruned, pruned_by_sorting(bits, dtype, norms, 0.4))


def test_equal_norms_prune_each_row_by_magnitude() -> None:
    bits = bits_of(np.random.default_rng(2).normal(0, 1, (7, 50)), "BF16")
    pruned = wanda(bits, "BF16", np.full(50, 3, np.float32), 0.5)
    rows = [magnitude(row, "BF16", 0.5) for row in bits]
    assert np.array_equal(pruned, np.stack(rows))


def test_a_large_weight_of_a_silent_feature_goes_before_a_small_one_of_a_loud_one() -> None:
    bits = bits_of(np.array([[8.0, 0.5, 0.25, 4.0]]), "F32")
    pruned = wanda(bits, "F32", np.array([0.01, 10, 10, 0.1], np.float32), 0.5)
    assert numbers(pruned, "F32").tolist() == [[0, 0.5, 0.25, 0]]


def test_what_is_sparse_enough_comes_back_as_it_is() -> None:
    bits = bits_of(np.array([[0.0, 1, 0, 2], [3, 0, 0, 4]]), "BF16")
    assert wanda(bits, "BF16", np.ones(4, np.float32), 0.5) is bits
    assert wanda(bits, "BF16", np.ones(4, np.float32), 0.0) is bits


def test_temporaries_do_not_grow_with_the_matrix() -> None:
    bits = np.ones((1024, 2048), np.uint16)
    norms = np.ones(2048, np.float32)
    tracemalloc.start()
    try:
        wanda(bits, "BF16", norms, 0.5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < bits.nbytes + (6 << 20)


@pytest.mark.parametrize(
    ("bits", "dtype", "norms", "sparsity", "text"),
    [
        (np.ones((2, 3), np.uint16), "BF16", np.ones(3, np.float32), 1.0, "sparsity 1.0"),
        (np.ones((2, 3), np.uint16), "I16", np.ones(3, np.float32), 0.5, "dtype I16"),
        (np.ones((2, 3), np.uint16), "F32", np.ones(3, np.float32), 0.5, "no matrix of F32"),
        (np.ones(3, np.uint16), "F16", np.ones(3, np.float32), 0.5, "no matrix of F16"),
        (np.ones((2, 3), np.uint16), "BF16", np.ones(2, np.float32), 0.5, r"float32\[3\]"),
        (np.ones((2, 3), np.uint16), "BF16", np.ones(3), 0.5, r"float32\[3\]"),
        (np.ones((1, 1), np.uint16), "F16", np.full(1, np.nan, np.float32), 0.5, "finite"),
        (np.ones((1, 1), np.uint16), "F16", np.full(1, -1, np.float32), 0.5, "not negative"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    bits: Bits, dtype: str, norms: Bits, sparsity: float, text: str
) -> None:
    with pytest.raises(BadSetting, match=text):
        wanda(bits, dtype, norms, sparsity)
