"""A matrix in the arrays of a codec, and how large it would be in each: the seam to the encoders.

Everything here takes any part of a matrix that is a multiple of 64 rows high (the last part may be
less): the arrays of the parts, one after the other, are those of the whole, offsets counted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tierd_kernels import encode as native
from tierd_layouts import exponent_packed
from tierd_layouts.codecs import ALWAYS_MASKED, fixed_bytes
from tierd_layouts.float_bits import INFINITY
from tierd_layouts.records import ARRAY_ALIGNMENT
from tierd_layouts.tile_grid import TileGrid

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd_layouts.packed_matrix import PackedMatrix
    from tierd_layouts.tile_grid import BitsArray


@dataclass(frozen=True, slots=True)
class Form:
    """A codec, and whether a bitmap says which elements are kept."""

    codec: str
    masked: bool


RAW = Form("raw", masked=True)
EXPONENT_MASKED = Form("exponent-packed", masked=True)
EXPONENT_DENSE = Form("exponent-packed", masked=False)
#: of equal sizes the first, which is the quickest to expand
LOSSLESS = (RAW, EXPONENT_MASKED, EXPONENT_DENSE)


def forms_of(codec: str) -> tuple[Form, ...]:
    """Returns the forms between which `codec` of a pack's settings lets the packer choose."""
    match codec:
        case "lossless":
            return LOSSLESS
        case "raw":
            return (RAW,)
        case _:
            return Form(codec, masked=True), Form(codec, masked=False)


def values_bytes(bits: BitsArray, dtype: str) -> dict[Form, int]:
    """Returns the bytes of the array `values` in each lossless form, without encoding it."""
    sizes = native.sizes(bits, dtype)
    grid = TileGrid(*bits.shape)
    return {
        form: sizes[form.codec, form.masked] - sum(_fixed_bytes(form, grid)) for form in LOSSLESS
    }


def stored_bytes(form: Form, grid: TileGrid, values: int, group: int = 0) -> int:
    """Returns what all arrays of a matrix take in a layer: each one begins on 256 bytes."""
    return sum(aligned(nbytes) for nbytes in (values, *_fixed_bytes(form, grid, group)))


def aligned(nbytes: int) -> int:
    """Returns what an array of `nbytes` takes in a layer."""
    return -(-nbytes // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT


def encode(bits: BitsArray, dtype: str, form: Form, group: int = 0) -> PackedMatrix:
    """Returns the matrix in `form`. Raises BadMatrix: too large, or not finite for int8, int4."""
    if form.codec in ALWAYS_MASKED:
        return native.encode_raw(bits, dtype)
    if form.codec == exponent_packed.CODEC:
        return native.encode_exponent(bits, dtype, masked=form.masked)
    return native.quantise(bits, dtype, codec=form.codec, group=group, masked=form.masked)


def all_finite(bits: BitsArray, dtype: str) -> bool:
    """Whether no element is infinite or NaN."""
    mask = bits.dtype.type((1 << (bits.dtype.itemsize * 8 - 1)) - 1)
    return bool(np.all((bits & mask) < INFINITY[dtype]))


def _fixed_bytes(form: Form, grid: TileGrid, group: int = 0) -> Iterable[int]:
    return fixed_bytes(form.codec, grid, masked=form.masked, group=group).values()
