"""Raw bits of BF16, F16 and F32, as float32 and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import BitsArray

F32Array = npt.NDArray[np.float32]

#: The bits of infinity: what is above them, without its sign, is a NaN.
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
#: The largest finite number of each dtype.
LARGEST = {
    "BF16": np.uint32(0x7F7F0000).view(np.float32),
    "F16": np.float32(65504),
    "F32": np.finfo(np.float32).max,
}


def widened(bits: npt.NDArray[Any], dtype: str) -> F32Array:
    """Returns raw bits of BF16, F16 or F32 as float32, exact; a new array unless F32."""
    wide: F32Array
    if dtype == "BF16":
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F16":
        wide = bits.view(np.float16).astype(np.float32)
    else:
        wide = bits.view(np.float32)
    return wide


def rounded(values: F32Array, dtype: str) -> BitsArray:
    """Returns the bits of finite float32, rounded once to nearest even, to infinity too."""
    bits: BitsArray
    if dtype == "F32":
        bits = values.view(np.uint32)
    elif dtype == "F16":
        with np.errstate(over="ignore"):  # infinity is what rounding to nearest gives
            bits = values.astype(np.float16).view(np.uint16)
    else:
        wide = values.view(np.uint32)
        bits = (wide + 0x7FFF + (wide >> 16 & 1) >> 16).astype(np.uint16)
    return bits
