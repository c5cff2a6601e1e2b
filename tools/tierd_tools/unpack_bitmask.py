"""A pack as a `sparse-bitmask` checkpoint of compressed-tensors 0.9 to 0.14, in dialect B.

How many values a weight has is not in the index: a pack keeps -0.0, which this format cannot, and
codecs round to zero. So the pack is decoded twice, once to count, and nothing is held in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE
from tierd_tools.bitmask import encode, encoded_bytes
from tierd_tools.bitmask_import import PART_NAMES
from tierd_tools.errors import PackError
from tierd_tools.sparsity import is_linear
from tierd_tools.unpack_plan import Named, Piece

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from tierd_layouts.index import Tensor

    Bits = NDArray[np.unsignedinteger[Any]]

_WEIGHT = ".weight"


@dataclass(slots=True)
class Census:
    """What a first pass over the weights counts; `add` may be called from many threads.

    values: compressed weight -> elements that differ from zero, for those that get smaller.
    """

    values: dict[str, int] = field(default_factory=dict)
    negative_zeros: int = 0  #: in those: what the format loses
    elements: int = 0  #: of all tensors
    zeros: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, tensor: Tensor, bits: Bits) -> None:
        set_bits = int(np.count_nonzero(bits))
        values = set_bits
        if tensor.dtype in RAW_VALUES_DTYPE:
            sign = bits.dtype.type(1 << (bits.dtype.itemsize * 8 - 1))
            values -= int(np.count_nonzero(bits == sign))
        gets_smaller = False
        if _may_be_compressed(tensor):
            rows, columns = tensor.shape
            item = ITEM_BYTES[tensor.dtype]
            gets_smaller = encoded_bytes(rows, columns, item, values) < tensor.dense_bytes
        with self._lock:
            self.elements += bits.size
            self.zeros += bits.size - values
            if gets_smaller:
                self.values[tensor.source] = values
                self.negative_zeros += set_bits - values

    @property
    def sparsity(self) -> float:
        """Share of zeros of the whole model."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def modules(self) -> list[str]:
        """The modules whose weights are compressed."""
        return sorted(name.removesuffix(_WEIGHT) for name in self.values)


def refuse_misread(names: Iterable[str]) -> None:
    """Raises PackError for a tensor whose name makes a reader think that it is part of another."""
    for name in names:
        if name.rpartition(".")[2] in PART_NAMES:
            raise PackError(
                f"tensor {name!r} has a name that sparse-bitmask gives to parts of compressed "
                "weights: readers would take it for one"
            )


def module_paths(names: Iterable[str]) -> set[str]:
    """Every module on the way to a parameter."""
    paths: set[str] = set()
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            paths.add(name)
    return paths


def pieces(named: Named, values: int) -> list[Piece]:
    """The tensors that stand for a weight with `values` elements that differ from zero."""
    rows, columns = named.tensor.shape
    module = named.name.removesuffix(_WEIGHT)
    return [
        Piece(f"{module}.{part}", dtype, shape)
        for part, dtype, shape in (
            ("shape", "I64", (2,)),
            ("compressed", named.tensor.dtype, (values,)),
            ("bitmask", "U8", (rows, -(-columns // 8))),
            ("row_offsets", "I64", (rows,)),
        )
    ]


def contents(named: Named, bits: Bits) -> Mapping[str, NDArray[Any]]:
    """What is in those tensors."""
    encoded = encode(bits)
    module = named.name.removesuffix(_WEIGHT)
    return {
        f"{module}.shape": np.array(bits.shape, "<i8"),
        f"{module}.compressed": encoded.values,
        f"{module}.bitmask": encoded.bitmask,
        f"{module}.row_offsets": encoded.row_offsets,
    }


def _may_be_compressed(tensor: Tensor) -> bool:
    """Whether it is the weight of a linear layer, and its parts' names cannot be mistaken."""
    module = tensor.source.removesuffix(_WEIGHT)
    return (
        len(tensor.shape) == 2
        and tensor.dtype in RAW_VALUES_DTYPE
        and is_linear(tensor.source)
        and module.rpartition(".")[2] not in ("weight", "bias")
    )
