"""Matrices of any codec: decode and validate by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_layouts import exponent_packed, quantised, tiles
from tierd_layouts.errors import ValuesWrong
from tierd_layouts.packed_record import PackedMatrix, check_set
from tierd_layouts.tile_grid import bits_dtype

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import BitsArray, U32Array, U64Array

__all__ = ["PackedMatrix", "check_set", "decode", "encode_raw", "validate"]


def encode_raw(bits: BitsArray, dtype: str) -> PackedMatrix:
    """Returns a matrix in codec `raw`. Raises BadMatrix."""
    bitmap, offsets, values = tiles.encode(bits)
    rows, cols = bits.shape
    return PackedMatrix("raw", dtype, rows, cols, bitmap, offsets, values)


def decode(matrix: PackedMatrix) -> BitsArray:
    """Returns the weights' raw bits, [rows, cols]; a lossy codec's are rounded once.

    Raises UnknownCodec, UnknownTensorDtype, ArraySetWrong, BadGroup and the codec's TileErrors.
    """
    check_set(matrix)
    if matrix.codec == "raw":
        return tiles.decode(*_raw_arrays(matrix), matrix.rows, matrix.cols)
    if matrix.codec == exponent_packed.CODEC:
        return exponent_packed.decode(matrix)
    return quantised.decode(matrix)


def validate(matrix: PackedMatrix, nnz: int) -> None:
    """Raises the error of the first rule of FORMAT.md that the matrix breaks; `decode` then works.

    nnz: the kept elements that somebody, an index, promised.
    """
    check_set(matrix)
    if matrix.codec == "raw":
        tiles.validate(*_raw_arrays(matrix), matrix.rows, matrix.cols, nnz)
    elif matrix.codec == exponent_packed.CODEC:
        exponent_packed.validate(matrix, nnz)
    else:
        quantised.validate(matrix, nnz)


# --------------------------------------------------------------------------------------------------


def _raw_arrays(matrix: PackedMatrix) -> tuple[U64Array, U32Array, BitsArray]:
    assert matrix.bitmap is not None  # `check_set`
    if matrix.values.dtype != bits_dtype(matrix.dtype):
        raise ValuesWrong(
            f"values are {matrix.values.dtype}, {matrix.dtype} needs {bits_dtype(matrix.dtype)}"
        )
    return matrix.bitmap, matrix.offsets, matrix.values
