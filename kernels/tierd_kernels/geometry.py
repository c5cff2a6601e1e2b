"""What the kernels ask of their arrays before they look at the contents."""

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.errors import KernelError
from tierd_layouts.packed_matrix import PackedMatrix

TILE: Final = 64
RUN_UNIT: Final = 16
"""Bytes of one step of `offsets`."""
MAX_LENGTH: Final = 2**32 - 1 - TILE
"""Most rows or columns."""

Dtype = Literal["BF16", "F16", "F32"]
Bits = NDArray[np.uint16] | NDArray[np.uint32]

ELEMENT: Final[dict[str, type[np.uint16] | type[np.uint32]]] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.uint32,
}

_EXTRA: Final[dict[str, str | None]] = {
    "raw": None,
    "exponent-packed": "heads",
    "int8": "scales",
    "int4": "scales",
}
"""The array that a codec has beside bitmap, offsets and values."""


def tiles_over(length: int) -> int:
    """Tiles that cover `length` rows or columns."""
    return -(-length // TILE)


def check_array(name: str, array: NDArray[Any], dtype: type[np.generic], ndim: int) -> None:
    """Raise KernelError unless `array` is what a kernel can read without converting it."""
    if not isinstance(array, np.ndarray):
        raise KernelError(f"{name} is a {type(array).__name__}, a numpy array is needed")
    if array.dtype != dtype:
        raise KernelError(f"{name} has dtype {array.dtype}, {np.dtype(dtype)} is needed")
    if array.ndim != ndim:
        raise KernelError(f"{name} has {array.ndim} dimensions, {ndim} are needed")
    flags = array.flags
    if not flags.c_contiguous:
        raise KernelError(f"{name} of shape {array.shape} is not C-contiguous")
    if not flags.aligned:
        raise KernelError(f"{name} does not start on a multiple of its item size")


def check_output(name: str, out: NDArray[Any], dtype: type[np.generic]) -> None:
    """Raise KernelError unless a kernel can write to the matrix `out`."""
    check_array(name, out, dtype, 2)
    if not out.flags.writeable:
        raise KernelError(f"{name} is read-only")


def check_matrix(matrix: PackedMatrix) -> None:
    """Raise KernelError unless the arrays have the types and lengths of the codec and shape.

    Tile by tile the kernels then check the contents.
    """
    codec = matrix.codec
    if codec not in _EXTRA:
        raise KernelError(f"codec {codec!r} is not one of {', '.join(_EXTRA)}")
    if matrix.dtype not in ELEMENT:
        raise KernelError(f"dtype {matrix.dtype!r} is not one of {', '.join(ELEMENT)}")
    for length in (matrix.rows, matrix.cols):
        if not 0 <= length <= MAX_LENGTH:
            raise KernelError(f"shape [{matrix.rows}, {matrix.cols}] is not in 0..{MAX_LENGTH}")
    for name in ("heads", "scales"):
        if getattr(matrix, name) is not None and name != _EXTRA[codec]:
            raise KernelError(f"codec {codec} has no {name}")
    tile_rows, tile_cols = tiles_over(matrix.rows), tiles_over(matrix.cols)
    tiles = tile_rows * tile_cols
    if matrix.bitmap is not None or codec == "raw":
        why = f"{tiles} tiles of {TILE}"
        _check_length("bitmap", "words", matrix.bitmap, np.uint64, tiles * TILE, why)
    _check_length("offsets", "entries", matrix.offsets, np.uint32, tiles + 1, f"{tiles} tiles")
    if codec == "exponent-packed":
        _check_length("heads", "entries", matrix.heads, np.uint32, tiles, f"{tiles} tiles")
    elif codec != "raw":
        group = matrix.group
        if group <= 0 or group % TILE:
            raise KernelError(f"group of {group} columns is not a positive multiple of {TILE}")
        scales = tile_rows * -(-matrix.cols // group) * TILE
        why = f"[{matrix.rows}, {matrix.cols}] in groups of {group} columns"
        _check_length("scales", "entries", matrix.scales, np.uint16, scales, why)
    values = matrix.values
    check_array("values", values, ELEMENT[matrix.dtype] if codec == "raw" else np.uint8, 1)
    begin, end = int(matrix.offsets[0]), int(matrix.offsets[-1])
    if begin != 0:
        raise KernelError(f"offsets begin at {begin}, not at 0")
    if end * RUN_UNIT != values.nbytes:
        raise KernelError(
            f"offsets end at {end * RUN_UNIT} bytes, values has {values.nbytes} bytes"
        )


def tile_range(
    shape: tuple[int, int], out_shape: Sequence[int], tile_rows: tuple[int, int] | None
) -> tuple[int, int]:
    """Return the tile rows (first, end) of a matrix of `shape` that an output holds.

    Raises KernelError where it cannot.
    """
    rows, cols = shape
    total = tiles_over(rows)
    first, end = tile_rows or (0, total)
    if not 0 <= first <= end <= total:
        raise KernelError(f"tile rows {first}..{end} are not in a matrix of {total} tile rows")
    held = min(end * TILE, rows) - first * TILE if first < end else 0
    if tuple(out_shape) != (held, cols):
        raise KernelError(
            f"out has shape {list(out_shape)}, tile rows {first}..{end} have {[held, cols]}"
        )
    return first, end


def _check_length(
    name: str,
    unit: str,
    array: NDArray[Any] | None,
    dtype: type[np.generic],
    length: int,
    why: str,
) -> None:
    if array is None:
        raise KernelError(f"{name} is missing, {why} need {length} {unit}")
    check_array(name, array, dtype, 1)
    if array.size != length:
        raise KernelError(f"{name} has {array.size} {unit}, {why} need {length}")
