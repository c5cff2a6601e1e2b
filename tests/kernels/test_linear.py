"""Every kernel's product is the exact product, rounded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tierd_kernels import linear, reference
from tierd_kernels.geometry import Dtype
from tierd_layouts import tiles

DTYPES: tuple[Dtype, ...] = ("BF16", "F16", "F32")
MOST_ERROR = 1e-5
"""RMS of the error relative to the RMS of the exact product; the promise up to 16384 columns."""


def exact_product(matrix: Any, x: Any, dtype: Dtype) -> NDArray[np.float64]:
    return reference.decode(x, dtype) @ reference.decode(matrix, dtype).T


def relative_error(ours: NDArray[np.float32], exact: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))


def product(
    packed: tuple[Any, Any, Any], x: Any, rows: int, dtype: Dtype, threads: int = 0
) -> NDArray[np.float32]:
    out = np.full((x.shape[0], rows), np.nan, np.float32)
    linear(*packed, x, out, dtype=dtype, threads=threads)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 17, 32, 40])
@pytest.mark.parametrize("shape", [(64, 64), (130, 200), (63, 1000)])
def test_the_error_is_below_the_promise_for_every_number_of_tokens(
    kernel: str,
    random_weights: Callable[..., Any],
    random_x: Callable[..., Any],
    dtype: Dtype,
    tokens: int,
    shape: tuple[int, int],
) -> None:
    matrix = random_weights(tokens, *shape, dtype)
    x = random_x(tokens, tokens, shape[1], dtype)
    ours = product(tiles.encode(matrix), x, shape[0], dtype)
    assert relative_error(ours, exact_product(matrix, x, dtype)) < MOST_ERROR / 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_the_error_is_below_the_promise_for_the_longest_rows(
    kernel: str,
    random_weights: Callable[..., Any],
    random_x: Callable[..., Any],
    dtype: Dtype,
    density: float,
) -> None:
    matrix = random_weights(7, 128, 16384, dtype, density)
    x = random_x(8, 3, 16384, dtype)
    ours = product(tiles.encode(matrix), x, 128, dtype)
    assert relative_error(ours, exact_product(matrix, x, dtype)) < MOST_ERROR


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 12),
    rows=st.integers(0, 200),
    cols=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_any_shape_gives_the_exact_product_within_rounding(
    kernel: str,
    random_weights: Callable[..., Any],
    random_x: Callable[..., Any],
    seed: int,
    tokens: int,
    rows: int,
    cols: int,
    dtype: Dtype,
    density: float,
) -> None:
    matrix = random_weights(seed, rows, cols, dtype, density)
    x = random_x(seed, tokens, cols, dtype)
    ours = product(tiles.encode(matrix), x, rows, dtype, threads=2)
    size = np.abs(reference.decode(x, dtype)) @ np.abs(reference.decode(matrix, dtype)).T
    # 300 columns: at most 300 additions, each rounds by half a unit of at most the sum of sizes.
    bound = 300 * 2.0**-24 * size + 2.0**-148 * 300
    assert (np.abs(ours - exact_product(matrix, x, dtype)) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_weights_count(kernel: str, dtype: Dtype) -> None:
    """BF16 and F32 denormals are float32 denormals: flushing them would lose the whole product."""
    matrix = np.full((64, 64), 0x0011, np.uint32 if dtype == "F32" else np.uint16)
    x = {"BF16": 0x4F00, "F16": 0x4F00, "F32": 0x4F000000}[dtype]
    xs = np.full((2, 64), x, matrix.dtype)
    ours = product(tiles.encode(matrix), xs, 64, dtype)
    exact = exact_product(matrix, xs, dtype)
    np.testing.assert_allclose(ours, exact, rtol=1e-6)
    assert (exact != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_spread_as_in_a_dense_product(
    kernel: str, random_weights: Callable[..., Any], random_x: Callable[..., Any], dtype: Dtype
) -> None:
    infinity, nan = {
        "BF16": (0x7F80, 0x7FC1),
        "F16": (0x7C00, 0x7E01),
        "F32": (0x7F800000, 0x7FC00001),
    }[dtype]
    matrix = random_weights(9, 100, 130, dtype)
    x = random_x(9, 4, 130, dtype)
    matrix[3, 70] = infinity
    matrix[64, 129] = nan
    x[1, 5] = infinity  # meets zeros of the matrix: NaN there
    x[2, 129] = nan
    ours = product(tiles.encode(matrix), x, 100, dtype)
    with np.errstate(invalid="ignore"):
        exact = exact_product(matrix, x, dtype)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(exact))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(exact))
    assert np.isnan(exact[1]).any()
    assert np.isinf(exact[1]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch_or_the_threads(
    native_kernel: str,
    random_weights: Callable[..., Any],
    random_x: Callable[..., Any],
    dtype: Dtype,
) -> None:
    packed = tiles.encode(random_weights(10, 300, 500, dtype))
    x = random_x(10, 37, 500, dtype)
    together = product(packed, x, 300, dtype, threads=1)
    for threads in (2, 3, 7):
        again = product(packed, x, 300, dtype, threads=threads)
        np.testing.assert_array_equal(again.view(np.uint32), together.view(np.uint32))
    for token in (0, 1, 8, 31, 36):
        alone = product(packed, x[token : token + 1], 300, dtype, threads=2)
        np.testing.assert_array_equal(alone[0].view(np.uint32), together[token].view(np.uint32))
