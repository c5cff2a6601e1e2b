"""What the kernels ask of their arrays before they look at the contents."""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from tierd_kernels.errors import KernelError

TILE: Final = 64
RUN_UNIT: Final = 16
"""Bytes of one step of `offsets`."""

Dtype = Literal["BF16", "F16", "F32"]
Bits = NDArray[np.uint16] | NDArray[np.uint32]

ELEMENT: Final[dict[str, type[np.uint16] | type[np.uint32]]] = {
    "BF16": np.uint16,
    "F16": np.uint16,
    "F32": np.uint32,
}


def tiles_over(length: int) -> int:
    """Tiles that cover `length` rows or columns."""
    return -(-length // TILE)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the output lies in the packed matrix."""

    cols: int
    """Columns of the matrix, in elements."""
    tile_rows: int
    """Tile rows of the whole matrix."""
    first: int
    """First tile row that the output holds."""
    end: int
    """Tile row behind the last one that the output holds."""


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


def element_of(values: Bits) -> type[np.uint16] | type[np.uint32]:
    """Return the element type that a matrix with these values has."""
    return np.uint32 if getattr(values, "dtype", None) == np.uint32 else np.uint16


def check_packed(
    bitmap: NDArray[np.uint64], offsets: NDArray[np.uint32], values: Bits, tiles: int
) -> None:
    """Raise KernelError unless the three arrays can describe a matrix of `tiles` tiles.

    Tile by tile the kernels then check the offsets against the bitmap.
    """
    check_array("bitmap", bitmap, np.uint64, 1)
    check_array("offsets", offsets, np.uint32, 1)
    check_array("values", values, element_of(values), 1)
    if bitmap.size != tiles * TILE:
        raise KernelError(
            f"bitmap has {bitmap.size} words, {tiles} tiles of {TILE} need {tiles * TILE}"
        )
    if offsets.size != tiles + 1:
        raise KernelError(f"offsets has {offsets.size} entries, {tiles} tiles need {tiles + 1}")
    begin, end = int(offsets[0]), int(offsets[-1])
    if begin != 0:
        raise KernelError(f"offsets begin at {begin}, not at 0")
    if end * RUN_UNIT != values.nbytes:
        raise KernelError(
            f"offsets end at {end * RUN_UNIT} bytes, values has {values.nbytes} bytes"
        )


def check_output(name: str, out: NDArray[Any], dtype: type[np.generic]) -> None:
    """Raise KernelError unless a kernel can write to the matrix `out`."""
    check_array(name, out, dtype, 2)
    if not out.flags.writeable:
        raise KernelError(f"{name} is read-only")


def expand_geometry(
    bitmap: NDArray[np.uint64], rows: int, cols: int, tile_rows: tuple[int, int] | None
) -> Geometry:
    """Find the place of an output of `rows` by `cols` in a matrix with this bitmap."""
    tile_cols = tiles_over(cols)
    if tile_rows is None:
        return Geometry(cols, tiles_over(rows), 0, tiles_over(rows))
    first, end = tile_rows
    # Without columns there are no tiles to count.
    total = bitmap.size // TILE // tile_cols if tile_cols else end
    if not 0 <= first <= end <= total:
        raise KernelError(f"tile rows {first}..{end} are not in a matrix of {total} tile rows")
    most = (end - first) * TILE
    # Only the matrix's own last tile row may be cut short.
    least = most if end < total or first == end else most - TILE + 1
    if not least <= rows <= most:
        wanted = str(most) if least == most else f"{least} to {most}"
        raise KernelError(f"out has {rows} rows, tile rows {first}..{end} have {wanted}")
    return Geometry(cols, total, first, end)
