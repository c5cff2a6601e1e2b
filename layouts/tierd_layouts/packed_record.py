"""One compressed matrix as it is stored: its codec, its shape, and its arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts.codecs import ARRAYS_OF_CODEC, LEVEL_LIMITS, array_names
from tierd_layouts.dtypes import RAW_VALUES_DTYPE
from tierd_layouts.errors import ArraySetWrong, BadGroup, UnknownCodec, UnknownTensorDtype

if TYPE_CHECKING:
    import numpy.typing as npt

    from tierd_layouts.tile_grid import U16Array, U32Array, U64Array


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A matrix `[rows, cols]` in the form of `codec`. Nothing is checked here: `validate` does.

    bitmap: uint64[tiles * 64], or None: dense form, every element inside the shape is kept.
    offsets: uint32[tiles + 1], in units of 16 bytes of `values`.
    values: uint16 or uint32 for `raw`, uint8 for the other codecs; 1-D.
    heads: uint32[tiles], `exponent-packed` only.
    scales: uint16[tile_rows * groups * 64], bf16 bits, and group, columns: `int8`, `int4` only.
    """

    codec: str
    dtype: str
    rows: int
    cols: int
    bitmap: U64Array | None
    offsets: U32Array
    values: npt.NDArray[Any]
    heads: U32Array | None = None
    scales: U16Array | None = None
    group: int = 0

    @property
    def masked(self) -> bool:
        """Whether a bitmap says which elements are kept."""
        return self.bitmap is not None

    @property
    def nnz(self) -> int:
        """Kept elements: bits of the bitmap, or all of a dense form."""
        if self.bitmap is None:
            return self.rows * self.cols
        # In pieces: a count of every word at once would be an eighth of the bitmap.
        words = self.bitmap
        step = 1 << 20
        return sum(
            int(np.bitwise_count(words[begin : begin + step]).sum(dtype=np.int64))
            for begin in range(0, words.size, step)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; padding between them is not counted."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Returns the arrays that are present, by name, in stored order."""
        named: dict[str, npt.NDArray[Any] | None] = {
            "bitmap": self.bitmap,
            "offsets": self.offsets,
            "heads": self.heads,
            "scales": self.scales,
            "values": self.values,
        }
        return {name: array for name, array in named.items() if array is not None}


def check_set(matrix: PackedMatrix) -> None:
    """Raises UnknownCodec, UnknownTensorDtype, ArraySetWrong, BadGroup: form only, no content."""
    if matrix.codec not in ARRAYS_OF_CODEC or matrix.codec == "dense":
        known = ", ".join(codec for codec in ARRAYS_OF_CODEC if codec != "dense")
        raise UnknownCodec(f"codec {matrix.codec!r}, those of matrices are {known}")
    if matrix.dtype not in RAW_VALUES_DTYPE:
        raise UnknownTensorDtype(
            f"dtype {matrix.dtype!r}, codec {matrix.codec} knows {', '.join(RAW_VALUES_DTYPE)}"
        )
    found, expected = tuple(matrix.arrays()), array_names(matrix.codec, masked=matrix.masked)
    if found != expected:
        raise ArraySetWrong(
            f"arrays {', '.join(found)}, codec {matrix.codec} has {', '.join(expected)}"
        )
    if matrix.group and matrix.codec not in LEVEL_LIMITS:
        raise BadGroup(f"group of {matrix.group} columns, codec {matrix.codec} has none")
