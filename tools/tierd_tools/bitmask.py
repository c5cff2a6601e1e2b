"""The bitmask format of compressed-tensors, decoded and encoded with numpy alone.

A weight is a bitmask (one bit for every element, the least significant first, each row of the last
dimension on a byte of its own) and the elements whose bit is set, in C order. `sparse-24-bitmask`
is the same with the values as a matrix. Source: compressed-tensors 0.14.0.1, `compressors/
sparse_compressors/{sparse_bitmask,sparse_24_bitmask}.py` and `utils/helpers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts.dtypes import ITEM_BYTES
from tierd_tools.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tierd_tools.source_tensor import FileTensor

    Bits = NDArray[np.unsignedinteger[Any]]

#: decoded at once: what this needs besides the dense tensor stays in a cache
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class BitmaskTensor:
    """A weight of a checkpoint that lies there as `bitmask` and `values`.

    Their dtypes and shapes fit `shape` (`bitmask_import` saw to that); what the bits say is checked
    when they are read. Reading needs the memory of the dense tensor and a few MiB, or of one row
    where that is more.

    Padding bits are ignored, as the reference reader does: the count of the others has to be that
    of the values. `row_offsets`, which follow from the bits, are not read either: the reference
    reader never looks at them, and for tensors of three dimensions its writer gets them wrong.
    """

    name: str
    shape: tuple[int, ...]
    values: FileTensor
    bitmask: FileTensor

    @property
    def dtype(self) -> str:
        return self.values.dtype

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]

    def read(self) -> NDArray[np.uint8]:
        return self._decoded().view(np.uint8)

    def read_bits(self) -> Bits:
        return self._decoded().reshape(self.shape)

    def sample_bits(self, nbytes: int) -> Bits:
        """Up to `nbytes` of the rows in the middle."""
        rows, columns = self._rows, self.shape[-1]
        wanted = min(nbytes, self.nbytes) // ITEM_BYTES[self.dtype]
        if not wanted:
            return np.zeros(0, f"<u{ITEM_BYTES[self.dtype]}")
        taken = -(-wanted // columns)
        first = (rows - taken) // 2
        used = 0
        step = _block_rows(columns)
        for row in range(0, first, step):
            used += _count(self._mask(row, min(row + step, first)))
        out = np.zeros(taken * columns, f"<u{ITEM_BYTES[self.dtype]}")
        self._fill(out, first_row=first, used=used)
        skipped = (out.size - wanted) // 2
        return out[skipped : skipped + wanted]

    def _decoded(self) -> Bits:
        """All elements. Raises CheckpointError when bits and values are not equally many."""
        out = np.zeros(self.elements, f"<u{ITEM_BYTES[self.dtype]}")
        used = self._fill(out, first_row=0, used=0)
        if used != self.values.elements:
            raise CheckpointError(
                f"tensor {self.name!r}: its bitmask has {used} bits set, {self.values.name!r} has "
                f"{self.values.elements} values"
            )
        return out

    @property
    def _rows(self) -> int:
        return prod(self.shape[:-1])

    def _fill(self, out: Bits, *, first_row: int, used: int) -> int:
        """Writes rows from `first_row` on to `out`; `used` values belong to those before.

        Returns how many values the rows up to the last one have.
        """
        columns, item = self.shape[-1], ITEM_BYTES[self.dtype]
        rows = out.size // columns if columns else 0
        step = _block_rows(columns)
        for row in range(0, rows, step):
            end = min(row + step, rows)
            mask = self._mask(first_row + row, first_row + end)
            count = _count(mask)
            if used + count > self.values.elements:
                raise CheckpointError(
                    f"tensor {self.name!r}: its bitmask has {used + count} bits set up to row "
                    f"{first_row + end} of {self._rows}, {self.values.name!r} has "
                    f"{self.values.elements} values"
                )
            kept = np.unpackbits(mask, axis=1, count=columns, bitorder="little").view(np.bool_)
            values = self.values.read_part(used * item, count * item).view(out.dtype)
            # Six times as fast as indexing with `kept` itself.
            out[row * columns : end * columns][np.flatnonzero(kept)] = values
            used += count
        return used

    def _mask(self, first: int, end: int) -> NDArray[np.uint8]:
        """The bytes of rows [first, end), padding bits cleared: uint8 [rows, ceil(columns / 8)]."""
        columns = self.shape[-1]
        width = -(-columns // 8)
        mask = self.bitmask.read_part(first * width, (end - first) * width).reshape(-1, width)
        if columns % 8:
            mask[:, -1] &= (1 << columns % 8) - 1
        return mask


@dataclass(frozen=True, slots=True)
class EncodedBitmask:
    """A matrix in the format, and what of it the format cannot hold."""

    bitmask: NDArray[np.uint8]  #: [rows, ceil(columns / 8)]
    values: Bits  #: [nnz]
    row_offsets: NDArray[np.int64]  #: [rows], the values before each row
    negative_zeros: int  #: -0.0 elements, which come back as 0.0


def encode(bits: Bits) -> EncodedBitmask:
    """Encodes the bits of a matrix of BF16, F16 or F32, as the reference writer does.

    An element is stored if it differs from zero as a number: NaN is, -0.0 is not.
    """
    rows, columns = bits.shape
    without_sign = bits.dtype.type((1 << (bits.dtype.itemsize * 8 - 1)) - 1)
    bitmask = np.empty((rows, -(-columns // 8)), np.uint8)
    counts = np.empty(rows, np.int64)
    values: list[Bits] = []
    step = _block_rows(columns)
    for row in range(0, rows, step):
        block = bits[row : row + step]
        kept = (block & without_sign) != 0
        bitmask[row : row + step] = np.packbits(kept, axis=1, bitorder="little")
        counts[row : row + step] = np.count_nonzero(kept, axis=1)
        values.append(block.reshape(-1)[np.flatnonzero(kept)])
    return EncodedBitmask(
        bitmask=bitmask,
        values=np.concatenate(values) if values else np.empty(0, bits.dtype),
        row_offsets=np.cumsum(counts) - counts,
        negative_zeros=int(np.count_nonzero(bits)) - int(counts.sum()),
    )


def encoded_bytes(rows: int, columns: int, item_bytes: int, nnz: int) -> int:
    """What a matrix needs in the format: bitmask, values, row offsets and shape."""
    return rows * -(-columns // 8) + nnz * item_bytes + rows * 8 + 16


def _block_rows(columns: int) -> int:
    return max(1, _BLOCK_ELEMENTS // max(1, columns))


def _count(mask: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(mask).sum(dtype=np.int64))
