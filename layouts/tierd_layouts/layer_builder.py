"""Tensors to layer bytes: encode, align, and describe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts.codecs import stored_dtype
from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE, UNSIGNED
from tierd_layouts.errors import ArrayBytesWrong, BadShape, DuplicateName, UnknownTensorDtype
from tierd_layouts.names import check_layer_name, check_tensor_name
from tierd_layouts.packed_matrix import check_set, encode_raw
from tierd_layouts.records import ARRAY_ALIGNMENT, PAGE_BYTES, Array, Tensor, stored_name
from tierd_layouts.tensor_rules import check_tensor
from tierd_layouts.tile_grid import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    from typing_extensions import Buffer

    from tierd_layouts.packed_record import PackedMatrix
    from tierd_layouts.tile_grid import BitsArray


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes that belong at `offset` of the layer."""

    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class EncodedLayer:
    """A layer that is ready to be written: `chunks` by ascending offset, zeros between them."""

    name: str
    tensors: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]
    nbytes: int

    def pieces(self) -> Iterator[memoryview]:
        """Yields the layer's `nbytes` bytes from first to last."""
        position = 0
        for chunk in self.chunks:
            yield from _zeros(chunk.offset - position)
            yield chunk.data
            position = chunk.offset + chunk.data.nbytes
        yield from _zeros(self.nbytes - position)


class LayerBuilder:
    """Collects the tensors of one layer. Dense data is referred to until `finish`, not copied."""

    def __init__(self, name: str) -> None:
        self.name = check_layer_name(name)
        self._tensors: list[Tensor] = []
        self._chunks: list[Chunk] = []
        self._names: set[str] = set()
        self._end = 0

    def add_dense(
        self,
        tensor_name: str,
        dtype: str,
        shape: Sequence[int],
        data: Buffer | npt.NDArray[Any],
        *,
        source: str | None = None,
    ) -> Tensor:
        """Adds a tensor as it is, any shape. `data`: C-contiguous, exactly shape times dtype bytes.

        Raises NameRefused, UnknownTensorDtype, BadShape, ArrayBytesWrong, DuplicateName.
        """
        check_tensor_name(tensor_name)
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        # A zero-sized view cannot be cast by Python; it has no bytes to keep either.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        if dtype not in ITEM_BYTES:
            raise UnknownTensorDtype(
                f"tensor {tensor_name!r}: dtype {dtype!r}, known are {', '.join(ITEM_BYTES)}"
            )
        if prod(shape) * ITEM_BYTES[dtype] != view.nbytes:
            raise ArrayBytesWrong(
                f"tensor {tensor_name!r}: {view.nbytes} bytes, {dtype}{list(shape)} needs "
                f"{prod(shape) * ITEM_BYTES[dtype]}"
            )
        return self._add(
            Tensor(
                name=tensor_name,
                shape=tuple(shape),
                dtype=dtype,
                codec="dense",
                order="row-major",
                tile=None,
                nnz=prod(shape),
                arrays={},
                source=tensor_name if source is None else source,
            ),
            {"data": view},
        )

    def add_raw(
        self,
        tensor_name: str,
        dtype: str,
        matrix_bits: BitsArray,
        *,
        source: str | None = None,
    ) -> Tensor:
        """Adds a matrix as bitmap, offsets and values.

        matrix_bits: [rows, cols], uint16 for BF16 and F16, uint32 for F32; any strides.
        Raises NameRefused, UnknownTensorDtype, BadShape, BadMatrix, DuplicateName.
        """
        check_tensor_name(tensor_name)
        if dtype not in RAW_VALUES_DTYPE or matrix_bits.dtype.itemsize != ITEM_BYTES[dtype]:
            raise UnknownTensorDtype(
                f"tensor {tensor_name!r}: {matrix_bits.dtype} bits of dtype {dtype!r}; codec raw "
                f"takes uint16 bits of BF16 or F16, uint32 bits of F32"
            )
        if matrix_bits.ndim != 2:
            raise BadShape(
                f"tensor {tensor_name!r}: shape {list(matrix_bits.shape)}, codec raw needs 2 "
                f"dimensions"
            )
        return self.add_matrix(tensor_name, encode_raw(matrix_bits, dtype), source=source)

    def add_matrix(
        self, tensor_name: str, matrix: PackedMatrix, *, source: str | None = None
    ) -> Tensor:
        """Adds an encoded matrix. Its arrays are referred to until `finish`, and not validated.

        Raises NameRefused, DuplicateName, ArrayBytesWrong for an array of another dtype, layout or
        length, and what `check_set` and `check_tensor` raise.
        """
        check_tensor_name(tensor_name)
        check_set(matrix)
        views: dict[str, memoryview] = {}
        for name, array in matrix.arrays().items():
            stored = stored_dtype(matrix.codec, matrix.dtype, name)
            if array.dtype != UNSIGNED[ITEM_BYTES[stored]] or not array.flags.c_contiguous:
                raise ArrayBytesWrong(
                    f"tensor {tensor_name!r}: {name} are {array.dtype} with strides "
                    f"{array.strides}, codec {matrix.codec} stores contiguous {stored}"
                )
            views[name] = array.data.cast("B") if array.size else memoryview(b"")
        return self._add(
            Tensor(
                name=tensor_name,
                shape=(matrix.rows, matrix.cols),
                dtype=matrix.dtype,
                codec=matrix.codec,
                order="row-major",
                tile=(TILE, TILE),
                nnz=matrix.nnz,
                arrays={},
                source=tensor_name if source is None else source,
                group=matrix.group or None,
            ),
            views,
        )

    def finish(self) -> EncodedLayer:
        """Returns the layer; its size is a multiple of 4 KiB and at least one page."""
        nbytes = max(1, -(-self._end // PAGE_BYTES)) * PAGE_BYTES
        return EncodedLayer(self.name, tuple(self._tensors), tuple(self._chunks), nbytes)

    def _add(self, tensor: Tensor, views: dict[str, memoryview]) -> Tensor:
        """Returns `tensor` with its arrays, placed after what is there."""
        names = [stored_name(tensor.name, array_name) for array_name in views]
        taken = self._names.intersection(names)
        if taken:
            raise DuplicateName(f"layer {self.name!r}: stored array {min(taken)!r} appears twice")
        end = self._end
        chunks: list[Chunk] = []
        arrays: dict[str, Array] = {}
        for array_name, view in views.items():
            offset = -(-end // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT
            arrays[array_name] = Array(offset, view.nbytes)
            chunks.append(Chunk(offset, view))
            end = offset + view.nbytes
        tensor = replace(tensor, arrays=arrays)
        check_tensor(tensor, f"layer {self.name!r}")
        # Only now: a refused tensor leaves the builder as it was.
        self._names.update(names)
        self._chunks.extend(chunks)
        self._tensors.append(tensor)
        self._end = end
        return tensor


_ZEROS = memoryview(bytes(64 << 10))


def _zeros(nbytes: int) -> Iterator[memoryview]:
    while nbytes > 0:
        piece = _ZEROS[:nbytes]
        yield piece
        nbytes -= piece.nbytes
