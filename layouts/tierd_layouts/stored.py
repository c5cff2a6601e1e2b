"""How a tensor's arrays appear in a shard: names, dtypes and shapes any safetensors reader sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd_layouts.codecs import stored_dtype
from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.records import stored_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_layouts.records import Array, Layer, Tensor


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array as a safetensors tensor; `array` is its place in the layer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    array: Array


def stored_arrays(layer: Layer | tuple[Tensor, ...]) -> Iterator[StoredArray]:
    """Yields every array of a layer, in the order of its tensors."""
    for tensor in layer if isinstance(layer, tuple) else layer.tensors:
        for name, array in tensor.arrays.items():
            dtype = stored_dtype(tensor.codec, tensor.dtype, name)
            shape = tensor.shape if name == "data" else (array.nbytes // ITEM_BYTES[dtype],)
            yield StoredArray(stored_name(tensor.name, name), dtype, shape, array)
