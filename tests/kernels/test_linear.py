"""Every kernel's product is the exact product, rounded."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernels.random_matrices import TAME
from tierd_kernels import PackedMatrix, linear, reference

DTYPES = ["BF16", "F16", "F32"]
MOST_ERROR = 1e-5
"""RMS of the error relative to the RMS of the exact product; the promise up to 16384 columns."""
LOSSLESS = [("raw", True), ("exponent-packed", True), ("exponent-packed", False)]


def exact_product(matrix: PackedMatrix, x: Any) -> NDArray[np.float64]:
    return reference.decode(x, matrix.dtype) @ reference.weights(matrix).T


@pytest.fixture(scope="session")
def exact_products(
    packed_weights: Callable[..., PackedMatrix], random_x: Callable[..., Any]
) -> Callable[..., list[tuple[Any, NDArray[np.float64]]]]:
    """exact_products(tokens, form, *weights): activations for each number of tokens, and their
    products with `packed_weights`. Computed once: they are the same for every kernel."""

    @cache
    def make(
        numbers_of_tokens: tuple[int, ...], form: tuple[str, bool], *weights: Any
    ) -> list[tuple[Any, NDArray[np.float64]]]:
        matrix = packed_weights(form, *weights)
        exact = reference.weights(matrix).T
        xs = [random_x(tokens, tokens, matrix.cols, matrix.dtype) for tokens in numbers_of_tokens]
        return [(x, reference.decode(x, matrix.dtype) @ exact) for x in xs]

    return make


def relative_error(ours: NDArray[np.float32], exact: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean((ours - exact) ** 2) / np.mean(exact**2)))


def product(matrix: PackedMatrix, x: Any, threads: int = 0) -> NDArray[np.float32]:
    out = np.full((x.shape[0], matrix.rows), np.nan, np.float32)
    linear(matrix, x, out, threads=threads)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (130, 200), (63, 1000)])
def test_the_error_is_below_the_promise_for_every_number_of_tokens(
    kernel: str,
    packed_weights: Callable[..., PackedMatrix],
    exact_products: Callable[..., list[tuple[Any, NDArray[np.float64]]]],
    form: tuple[str, bool],
    dtype: str,
    shape: tuple[int, int],
) -> None:
    matrix = packed_weights(form, 6, *shape, dtype)
    for x, exact in exact_products((1, 2, 3, 7, 8, 9, 17, 32, 33), form, 6, *shape, dtype):
        error = relative_error(product(matrix, x), exact)
        assert error < MOST_ERROR / 10, f"{len(x)} tokens"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_below_the_promise_for_the_longest_rows(
    kernel: str,
    packed_weights: Callable[..., PackedMatrix],
    exact_products: Callable[..., list[tuple[Any, NDArray[np.float64]]]],
    form: tuple[str, bool],
    dtype: str,
) -> None:
    # Zeros are packed masked, and what has none in the dense form.
    for density in (0.5, 1.0) if form[0] == "raw" else (0.5,) if form[1] else (1.0,):
        matrix = packed_weights(form, 7, 64, 16384, dtype, density)
        ((x, exact),) = exact_products((3,), form, 7, 64, 16384, dtype, density)
        assert relative_error(product(matrix, x), exact) < MOST_ERROR


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 12),
    rows=st.integers(0, 200),
    cols=st.integers(0, 300),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    group=st.sampled_from([64, 128, 192]),
)
def test_any_content_of_any_shape_gives_the_exact_product_within_rounding(
    kernel: str,
    random_packed: Callable[..., PackedMatrix],
    random_x: Callable[..., Any],
    form: tuple[str, bool],
    seed: int,
    tokens: int,
    rows: int,
    cols: int,
    dtype: str,
    density: float,
    group: int,
) -> None:
    matrix = random_packed(seed, rows, cols, dtype, form, density, group=group, tops=TAME)
    x = random_x(seed, tokens, cols, dtype)
    ours = product(matrix, x, threads=2)
    weights = reference.weights(matrix)
    size = np.abs(reference.decode(x, dtype)) @ np.abs(weights).T
    # 300 columns: at most 300 additions, each rounds by half a unit of at most the sum of sizes.
    bound = 300 * 2.0**-24 * size + 2.0**-148 * 300
    assert (np.abs(ours - exact_product(matrix, x)) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", LOSSLESS)
def test_denormal_weights_count(
    kernel: str, pack: Callable[..., PackedMatrix], form: tuple[str, bool], dtype: str
) -> None:
    """BF16 and F32 denormals are float32 denormals: flushing them would lose the whole product."""
    bits = np.full((64, 64), 0x0011, np.uint32 if dtype == "F32" else np.uint16)
    x = {"BF16": 0x4F00, "F16": 0x4F00, "F32": 0x4F000000}[dtype]
    xs = np.full((2, 64), x, bits.dtype)
    matrix = pack(bits, dtype, form)
    exact = exact_product(matrix, xs)
    np.testing.assert_allclose(product(matrix, xs), exact, rtol=1e-6)
    assert (exact != 0).all()


INFINITY_AND_NAN = {
    "BF16": (0x7F80, 0x7FC1),
    "F16": (0x7C00, 0x7E01),
    "F32": (0x7F800000, 0x7FC00001),
}

ONE = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_spread_as_in_a_dense_product(
    kernel: str,
    pack: Callable[..., PackedMatrix],
    random_weights: Callable[..., Any],
    random_x: Callable[..., Any],
    form: tuple[str, bool],
    dtype: str,
) -> None:
    infinity, nan = INFINITY_AND_NAN[dtype]
    bits = random_weights(9, 100, 130, dtype).copy()
    x = random_x(9, 4, 130, dtype)
    if form in LOSSLESS:
        bits[3, 70] = infinity
        bits[64, 129] = nan
    bits[:50, 5] = 0
    bits[50:, 5] = ONE[dtype]  # large: its level is not 0
    x[1, 5] = infinity  # meets zeros of the matrix: NaN there
    x[2, 129] = nan
    matrix = pack(bits, dtype, form)
    with np.errstate(invalid="ignore"):
        exact = exact_product(matrix, x)
    ours = product(matrix, x)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(exact))
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(exact))
    assert np.isnan(exact[1]).any()
    assert np.isinf(exact[1]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch_or_the_threads(
    native_kernel: str,
    packed_weights: Callable[..., PackedMatrix],
    random_x: Callable[..., Any],
    form: tuple[str, bool],
    dtype: str,
) -> None:
    matrix = packed_weights(form, 10, 300, 500, dtype)
    x = random_x(10, 37, 500, dtype)
    together = product(matrix, x, threads=1)
    for threads in (2, 3, 7):
        again = product(matrix, x, threads=threads)
        np.testing.assert_array_equal(again.view(np.uint32), together.view(np.uint32))
    for token in (0, 1, 8, 31, 36):
        alone = product(matrix, x[token : token + 1], threads=2)
        np.testing.assert_array_equal(alone[0].view(np.uint32), together[token].view(np.uint32))


@pytest.mark.parametrize("form", [("int8", True), ("int8", False)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_levels_are_multiplied_unrounded(
    kernel: str,
    random_packed: Callable[..., PackedMatrix],
    random_x: Callable[..., Any],
    form: tuple[str, bool],
    dtype: str,
) -> None:
    """By expanded weights, rounded to the dtype, the product would be another one."""
    matrix = random_packed(11, 64, 128, dtype, form, 1.0, tops=(120, 128))
    x = random_x(11, 4, 128, dtype)
    rounded = np.empty((64, 128), np.uint16)
    reference.expand(matrix, rounded, 0, 1, 1)
    theirs = reference.decode(x, dtype) @ reference.decode(rounded, dtype).T
    exact = exact_product(matrix, x)
    ours = product(matrix, x)
    assert relative_error(ours, exact) < 1e-6
    assert relative_error(theirs.astype(np.float32), exact) > 1e-5
