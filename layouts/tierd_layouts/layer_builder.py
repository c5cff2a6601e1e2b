"""Tensors to layer bytes: encode, align, and describe."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts import tiles
from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE
from tierd_layouts.errors import ArrayBytesWrong, BadShape, DuplicateName, UnknownTensorDtype
from tierd_layouts.index_rules import check_tensor
from tierd_layouts.names import check_layer_name, check_tensor_name
from tierd_layouts.records import ARRAY_ALIGNMENT, PAGE_BYTES, Array, Tensor, stored_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt
    from typing_extensions import Buffer


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
            tensor_name, dtype, tuple(shape), "dense", prod(shape), {"data": view}, source
        )

    def add_raw(
        self,
        tensor_name: str,
        dtype: str,
        matrix_bits: tiles.BitsArray,
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
        bitmap, offsets, values = tiles.encode(matrix_bits)
        nnz = int(np.bitwise_count(bitmap).sum(dtype=np.int64))
        arrays: dict[str, npt.NDArray[Any]] = {
            "bitmap": bitmap,
            "offsets": offsets,
            "values": values,
        }
        views = {
            name: array.data.cast("B") if array.size else memoryview(b"")
            for name, array in arrays.items()
        }
        return self._add(tensor_name, dtype, matrix_bits.shape, "raw", nnz, views, source)

    def finish(self) -> EncodedLayer:
        """Returns the layer; its size is a multiple of 4 KiB and at least one page."""
        nbytes = max(1, -(-self._end // PAGE_BYTES)) * PAGE_BYTES
        return EncodedLayer(self.name, tuple(self._tensors), tuple(self._chunks), nbytes)

    def _add(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        codec: str,
        nnz: int,
        views: dict[str, memoryview],
        source: str | None,
    ) -> Tensor:
        names = [stored_name(name, array_name) for array_name in views]
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
        tensor = Tensor(
            name=name,
            shape=shape,
            dtype=dtype,
            codec=codec,
            order="row-major",
            tile=(tiles.TILE, tiles.TILE) if codec == "raw" else None,
            nnz=nnz,
            arrays=arrays,
            source=name if source is None else source,
        )
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
