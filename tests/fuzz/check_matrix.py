"""What must hold for any packed matrix, right or wrong; AssertionError or another error where not.

`validate` decides. What it accepts, everybody reads, and reads alike. What it refuses raises one of
our errors or gives some result, the same from every kernel.
"""

from typing import Any, Final
from unittest import mock

import numpy as np

from tierd_kernels import KernelError, PackedMatrix, dispatch, encode, expand, linear, reference
from tierd_kernels.geometry import ELEMENT, MAX_LENGTH, TILE
from tierd_layouts import exponent_packed, packed_matrix, quantised
from tierd_layouts.errors import FormatError

MOST_ELEMENTS: Final = 1 << 18
"""Of what a matrix claims to be: kernels get an output, and that has to be allocated."""
_ONE: Final = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}
_LARGE: Final = 1e30
_TINY: Final = 1e-37


def check_matrix(matrix: PackedMatrix, nnz: int | None = None) -> bool:
    """Return whether `validate` accepts the matrix; nnz: what an index says, else what is true."""
    try:
        packed_matrix.validate(matrix, matrix.nnz if nnz is None else nnz)
        accepted = True
    except FormatError:
        accepted = False
    try:
        decoded = packed_matrix.decode(matrix)
    except FormatError:
        assert not accepted, "validate accepts what decode refuses"
        decoded = None
    fits = max(matrix.rows, 1) * max(matrix.cols, 1) <= MOST_ELEMENTS
    fits = fits and matrix.group <= MAX_LENGTH  # the format has no limit, the kernels have
    if matrix.dtype in ELEMENT and fits:
        expanded = _expanded(matrix)
        if accepted:
            assert expanded is not None, "validate accepts what the kernels refuse"
            assert decoded is not None
            _equal(decoded, expanded, "decode and expand differ")
            _check_part(matrix, decoded)
            with np.errstate(invalid="ignore"):  # a signalling NaN is a weight like any other
                _check_products(matrix)
                _check_encoders(matrix, decoded)
    else:
        assert not accepted or not fits
    return accepted


def _expanded(matrix: PackedMatrix) -> Any:
    """Return what all kernels make of it, None where all refuse."""
    results: dict[str, Any] = {}
    for name, kernel in dispatch.kernels().items():
        out: Any = np.full(
            (max(0, matrix.rows), max(0, matrix.cols)), 0xA5A5, ELEMENT[matrix.dtype]
        )
        with mock.patch.object(dispatch, "current", lambda kernel=kernel: kernel):
            try:
                expand(matrix, out, threads=1 + len(results) % 2)
                results[name] = out
            except KernelError:
                results[name] = None
    expected = results["reference"]
    # FORMAT.md gives no value to a level times such a scale: kernels only have to survive it.
    wild = matrix.scales is not None and bool((matrix.scales >= 0x7F80).any())
    for name, found in results.items():
        assert (found is None) == (expected is None), f"{name} and reference: only one refuses"
        if found is not None and not wild:
            _equal(found, expected, f"expand of {name} and reference differ")
    return expected


def _check_part(matrix: PackedMatrix, decoded: Any) -> None:
    total = -(-matrix.rows // TILE)
    if total < 2:
        return
    for name, kernel in dispatch.kernels().items():
        out = np.full_like(decoded[TILE:], 0x5A5A)
        with mock.patch.object(dispatch, "current", lambda kernel=kernel: kernel):
            expand(matrix, out, tile_rows=(1, total), threads=1)
        _equal(out, decoded[TILE:], f"expand of a part by {name} differs")


def _check_products(matrix: PackedMatrix) -> None:
    """Columns of the matrix, by products with unit vectors: exact but for denormals."""
    weights = reference.weights(matrix)
    if matrix.scales is not None:
        exact = quantised.weights(matrix)
        assert np.array_equal(exact, weights.astype(np.float32)), "weights and reference differ"
    # Infinities and NaNs spread over a row; what they do is a matter of test_linear.py.
    tame = (np.abs(weights) < _LARGE).all(axis=1)
    for tokens in (1, 3, 20) if matrix.cols else ():
        columns = np.arange(tokens) * 37 % matrix.cols
        x: Any = np.zeros((tokens, matrix.cols), ELEMENT[matrix.dtype])
        x[np.arange(tokens), columns] = _ONE[matrix.dtype]
        for name, kernel in dispatch.kernels().items():
            out = np.full((tokens, matrix.rows), np.nan, np.float32)
            with mock.patch.object(dispatch, "current", lambda kernel=kernel: kernel):
                linear(matrix, x, out, threads=1 + tokens % 2)
            off = np.abs(out[:, tame] - weights[tame][:, columns].T)
            limit = 1e-5 * np.abs(weights[tame][:, columns].T) + _TINY
            assert (off <= limit).all(), f"a product by {name} is off by {off.max()}"


def _check_encoders(matrix: PackedMatrix, decoded: Any) -> None:
    """Encoding what was decoded gives the same arrays where the form is canonical."""
    dtype, masked = matrix.dtype, matrix.masked
    raw = packed_matrix.encode_raw(decoded, dtype)
    exponent = exponent_packed.encode(decoded, dtype, masked=masked)
    if matrix.codec == "raw":
        _same(raw, matrix, "raw is not canonical")
    if matrix.codec == "exponent-packed":
        assert matrix.heads is not None
        assert exponent.heads is not None
        assert exponent.values.nbytes <= matrix.values.nbytes, "the encoder wastes bytes"
        if np.array_equal(exponent.heads, matrix.heads):
            _same(exponent, matrix, "exponent-packed is not unique")
    _equal(packed_matrix.decode(exponent), decoded, "exponent-packed loses something")
    finite = bool(np.isfinite(reference.decode(decoded, dtype)).all())
    levels = (
        quantised.encode(decoded, dtype, codec="int4", group=64, masked=masked) if finite else None
    )
    for name in encode.available():
        with mock.patch.object(encode, "encoder_name", lambda name=name: name):
            _same(encode.encode_raw(decoded, dtype), raw, f"encode_raw of {name} differs")
            _same(
                encode.encode_exponent(decoded, dtype, masked=masked),
                exponent,
                f"encode_exponent of {name} differs",
            )
            assert encode.sizes(decoded, dtype)["raw", True] == raw.nbytes
            assert encode.sizes(decoded, dtype)["exponent-packed", masked] == exponent.nbytes
            if levels is not None:
                native = encode.quantise(decoded, dtype, codec="int4", group=64, masked=masked)
                _same(native, levels, f"quantise of {name} differs")


def _same(left: PackedMatrix, right: PackedMatrix, text: str) -> None:
    found, expected = left.arrays(), right.arrays()
    assert found.keys() == expected.keys(), text
    for name in found:
        _equal(found[name], expected[name], f"{text}: {name}")


def _equal(left: Any, right: Any, text: str) -> None:
    assert left.dtype == right.dtype, f"{text}: {left.dtype} and {right.dtype}"
    if not np.array_equal(left, right):
        places: Any = np.argwhere(left != right) if left.shape == right.shape else []
        first = tuple(places[0]) if len(places) else None
        values = f"{left[first]:#x} and {right[first]:#x}" if first else f"{left.shape}"
        raise AssertionError(f"{text}: {len(places)} places, first {first}: {values}")
