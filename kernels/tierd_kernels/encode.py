"""Matrices to packed matrices, natively: the bytes that the numpy encoders of tierd_layouts give.

Every function takes the raw bits of a matrix, uint16 [rows, cols] of BF16 or F16, uint32 of F32.
Rows may lie apart, the elements of a row may not. A call runs on the caller's thread alone and
releases the GIL: whoever has several matrices encodes them in several threads. Beside the result
it needs a few KiB. The matrix must not change during a call.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierd_kernels import _encode, dispatch, native
from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import Bits
from tierd_layouts import runs
from tierd_layouts.codecs import fixed_bytes
from tierd_layouts.errors import BadMatrix
from tierd_layouts.float_bits import INFINITY
from tierd_layouts.packed_matrix import PackedMatrix
from tierd_layouts.quantised import check_codec
from tierd_layouts.tile_grid import TILE, TileGrid, check_matrix

native.check(_encode)

# Which overload is meant follows from dtypes that were checked at run time, which mypy cannot see.
_native: Any = _encode

Form = tuple[str, bool]
"""(codec, masked)."""


def encoder_name() -> str:
    """Return the instruction set in use: that of the kernels, or `plain` where it has no encoder.

    All give the same bytes. Raises UnsupportedKernel as `tierd_kernels.kernel_name` does.
    """
    wanted = dispatch.current().name
    return wanted if wanted in available() else "plain"


def available() -> tuple[str, ...]:
    """Return the names of the encoders that this processor can run, slowest first."""
    return tuple(name for name, supported in _encode.encoder_names() if supported)


def encode_raw(bits: Bits, dtype: str) -> PackedMatrix:
    """Return the matrix in codec `raw`, as tierd_layouts.packed_matrix.encode_raw does.

    Raises BadMatrix: not 2-D, not of `dtype`, elements of a row apart, more than 64 GiB of values.
    """
    grid = _checked(bits, dtype)
    bitmap = np.empty(grid.bitmap_words, np.uint64)
    offsets = np.empty(grid.offset_count, np.uint32)
    units = _native.raw_structure(bits, bitmap, offsets, encoder_name())
    values = np.empty(runs.values_bytes(units) // bits.itemsize, bits.dtype)
    _native.raw_values(bits, bitmap, offsets, values, encoder_name())
    return PackedMatrix("raw", dtype, grid.rows, grid.cols, bitmap, offsets, values)


def encode_exponent(bits: Bits, dtype: str, *, masked: bool) -> PackedMatrix:
    """Return the matrix in codec `exponent-packed`, as tierd_layouts.exponent_packed.encode does.

    Raises BadMatrix as `encode_raw` does.
    """
    grid = _checked(bits, dtype)
    bitmap = np.empty(grid.bitmap_words, np.uint64) if masked else None
    offsets = np.empty(grid.offset_count, np.uint32)
    heads = np.empty(grid.tiles, np.uint32)
    units = _native.exponent_structure(bits, bitmap, offsets, heads, encoder_name())
    values = np.empty(runs.values_bytes(units), np.uint8)
    _native.exponent_values(bits, bitmap, offsets, heads, values, encoder_name())
    return PackedMatrix(
        "exponent-packed", dtype, grid.rows, grid.cols, bitmap, offsets, values, heads=heads
    )


def quantise(bits: Bits, dtype: str, *, codec: str, group: int, masked: bool) -> PackedMatrix:
    """Return the matrix in codec `int8` or `int4`, as tierd_layouts.quantised.encode does.

    group: columns that share a scale, a multiple of 64.
    Raises UnknownCodec, BadGroup; BadMatrix as `encode_raw` does and for an infinity or a NaN.
    """
    check_codec(codec, group)
    grid = _checked(bits, dtype)
    # A group that is wider than the matrix is as wide: of any size in Python, below 2^64 there.
    how = (dtype, codec == "int4", min(group, max(1, grid.tile_cols) * TILE))
    scales = np.empty(grid.scale_count(group), np.uint16)
    if not _native.choose_scales(bits, *how, scales, encoder_name()):
        raise BadMatrix(f"a weight is not finite, codec {codec} cannot hold it")
    bitmap = np.empty(grid.bitmap_words, np.uint64) if masked else None
    offsets = np.empty(grid.offset_count, np.uint32)
    units = _native.level_structure(bits, *how, scales, bitmap, offsets, encoder_name())
    values = np.empty(runs.values_bytes(units), np.uint8)
    _native.level_values(bits, *how, scales, bitmap, offsets, values, encoder_name())
    return PackedMatrix(
        codec, dtype, grid.rows, grid.cols, bitmap, offsets, values, scales=scales, group=group
    )


def sizes(bits: Bits, dtype: str) -> dict[Form, int]:
    """Return the bytes of all arrays of every lossless form, exactly; one pass over the matrix.

    ("dense", False), ("raw", True), ("exponent-packed", True), ("exponent-packed", False), in this
    order: `min(sizes, key=sizes.get)` takes the simplest of equals. Padding between arrays is not
    counted. Raises BadMatrix as `encode_raw` does, but for a size.
    """
    grid = _checked(bits, dtype)
    raw, masked, dense_form = _native.measure(bits, encoder_name())
    units = {
        ("raw", True): raw,
        ("exponent-packed", True): masked,
        ("exponent-packed", False): dense_form,
    }
    return {("dense", False): bits.size * bits.itemsize} | {
        (codec, has_bitmap): count * runs.RUN_ALIGNMENT
        + sum(fixed_bytes(codec, grid, masked=has_bitmap).values())
        for (codec, has_bitmap), count in units.items()
    }


def prune_magnitude(bits: Bits, dtype: str, sparsity: float) -> None:
    """Set the round(sparsity * size) elements of smallest absolute value to +0.0, in place.

    Exactly tierd_tools.prune.magnitude: elements that are +0.0 already count first, then -0.0, then
    by absolute value, equal ones by position; NaN is never pruned.
    Raises BadMatrix as `encode_raw` does; KernelError: read-only, or a sparsity outside [0, 1).
    """
    _checked(bits, dtype)
    if not 0 <= sparsity < 1:
        raise KernelError(f"sparsity {sparsity} is outside [0, 1)")
    if not bits.flags.writeable:
        raise KernelError("bits are read-only, pruning is in place")
    _native.prune(bits, INFINITY[dtype], round(sparsity * bits.size))


# --------------------------------------------------------------------------------------------------


def _checked(bits: NDArray[Any], dtype: str) -> TileGrid:
    grid = check_matrix(bits, dtype)
    row_stride, stride = bits.strides
    if bits.size and (bits.shape[1] > 1 and stride != bits.itemsize):
        raise BadMatrix(f"elements of a row are {stride} bytes apart, needs {bits.itemsize}")
    if not bits.flags.aligned or (bits.size and row_stride % bits.itemsize):
        raise BadMatrix(f"elements do not start on multiples of {bits.itemsize} bytes")
    return grid
