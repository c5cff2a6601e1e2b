"""A packed matrix as torch tensors, on any device: what is asked of it before anybody reads it.

As `tierd_layouts.packed_matrix.PackedMatrix`, but its arrays are bytes wherever a lease put them.
Besides `gpu/` only this module, `torch_expand`, `torch_records` and `faults` import torch;
`tierd_kernels` itself imports none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import ELEMENT, MAX_LENGTH, RUN_UNIT, TILE
from tierd_layouts.codecs import ARRAYS_OF_CODEC, LEVEL_LIMITS, array_names, fixed_bytes
from tierd_layouts.errors import BadMatrix
from tierd_layouts.tile_grid import TileGrid

if TYPE_CHECKING:
    from tierd_layouts.packed_matrix import PackedMatrix
    from tierd_layouts.records import Tensor

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MOST_PLANES: Final = 8
MOST_ESCAPES: Final = TILE * TILE
_ITEM_BYTES: Final = {"bitmap": 1, "offsets": 4, "heads": 4, "scales": 2}
"""Of the items that the expansion reads; those of `values` depend on codec and dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class TorchMatrix:
    """A matrix `[rows, cols]` in the form of `codec`; each array is its bytes, uint8, 1-D.

    most_planes, most_escapes: no tile of an `exponent-packed` matrix has more; a tile that says it
    has is wrong. What `measured` finds makes the expansion cheaper, never less safe.
    """

    codec: str
    dtype: str
    rows: int
    cols: int
    bitmap: torch.Tensor | None
    offsets: torch.Tensor
    values: torch.Tensor
    heads: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    group: int = 0
    most_planes: int = MOST_PLANES
    most_escapes: int = MOST_ESCAPES

    @property
    def grid(self) -> TileGrid:
        return TileGrid(self.rows, self.cols)

    @property
    def device(self) -> torch.device:
        """Where all its arrays are."""
        return self.values.device

    def arrays(self) -> dict[str, torch.Tensor]:
        """The arrays that are present, by name, in stored order."""
        named = {
            "bitmap": self.bitmap,
            "offsets": self.offsets,
            "heads": self.heads,
            "scales": self.scales,
            "values": self.values,
        }
        return {name: array for name, array in named.items() if array is not None}


def from_layer(layer: torch.Tensor, record: Tensor) -> TorchMatrix:
    """The matrix `record` of a layer whose bytes are `layer`, uint8, 1-D. No copy, nothing read.

    Raises KernelError for an array outside the layer, or a tensor that has no packed form.
    """
    if len(record.shape) != 2 or record.codec == "dense":
        raise KernelError(f"{record.codec} of shape {list(record.shape)} is no packed matrix")
    found: dict[str, torch.Tensor] = {}
    for name, array in record.arrays.items():
        if not 0 <= array.offset <= array.offset + array.nbytes <= layer.numel():
            raise KernelError(
                f"{name} is {array.nbytes} bytes at {array.offset} of a layer of {layer.numel()}"
            )
        found[name] = layer[array.offset : array.offset + array.nbytes]
    rows, cols = record.shape
    return TorchMatrix(
        record.codec,
        record.dtype,
        rows,
        cols,
        found.get("bitmap"),
        found["offsets"],
        found["values"],
        heads=found.get("heads"),
        scales=found.get("scales"),
        group=record.group or 0,
    )


def from_arrays(matrix: PackedMatrix, device: torch.device | str = "cpu") -> TorchMatrix:
    """A matrix in numpy's arrays, copied to `device`."""
    found: dict[str, Any] = {
        name: torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).to(device)
        for name, array in matrix.arrays().items()
    }
    found.setdefault("bitmap", None)
    return TorchMatrix(
        matrix.codec, matrix.dtype, matrix.rows, matrix.cols, group=matrix.group, **found
    )


def measured(matrix: TorchMatrix) -> TorchMatrix:
    """The same matrix, with the most planes and escapes that its heads have. Waits for its device.

    Heads that cannot be are left for the expansion to find.
    """
    check_matrix(matrix)
    if matrix.heads is None or not matrix.heads.numel():
        return matrix
    heads = items(matrix.heads, torch.int32)
    most = torch.stack([(heads >> 8 & 0xFF).amax(), (heads >> 16 & 0xFFFF).amax()]).tolist()
    return replace(
        matrix,
        most_planes=min(most[0], MOST_PLANES),
        most_escapes=min(most[1], MOST_ESCAPES),
    )


def items(array: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An array's bytes as items of `dtype`, in place. An empty one may have a stride of 0."""
    return array.view(dtype) if array.numel() else array.new_empty(0, dtype=dtype)


def check_matrix(matrix: TorchMatrix) -> None:
    """Raise KernelError unless the arrays are bytes of the lengths of codec and shape.

    No content is looked at: nothing waits for the device. Tile by tile, contents are checked there.
    """
    codec, rows, cols = matrix.codec, matrix.rows, matrix.cols
    if codec not in ARRAYS_OF_CODEC or codec == "dense":
        known = ", ".join(name for name in ARRAYS_OF_CODEC if name != "dense")
        raise KernelError(f"codec {codec!r} is not one of {known}")
    if matrix.dtype not in ELEMENT:
        raise KernelError(f"dtype {matrix.dtype!r} is not one of {', '.join(ELEMENT)}")
    if not (0 <= rows <= MAX_LENGTH and 0 <= cols <= MAX_LENGTH):
        raise KernelError(f"shape [{rows}, {cols}] is not in 0..{MAX_LENGTH}")
    try:
        grid = matrix.grid
    except BadMatrix as error:
        raise KernelError(str(error)) from None
    masked, arrays = matrix.bitmap is not None, matrix.arrays()
    if tuple(arrays) != array_names(codec, masked=masked):
        raise KernelError(
            f"arrays {', '.join(arrays)}, codec {codec} has "
            + ", ".join(array_names(codec, masked=masked))
        )
    group = matrix.group
    if codec in LEVEL_LIMITS and (group <= 0 or group % TILE):
        raise KernelError(f"group of {group} columns is not a positive multiple of {TILE}")
    for name, array in arrays.items():
        _check_array(name, array, matrix)
    lengths = fixed_bytes(codec, grid, masked=masked, group=group)
    for name, nbytes in lengths.items():
        if arrays[name].numel() != nbytes:
            raise KernelError(
                f"{name} has {arrays[name].numel()} bytes, [{rows}, {cols}] needs {nbytes}"
            )
    if matrix.values.numel() % RUN_UNIT:
        raise KernelError(
            f"values has {matrix.values.numel()} bytes, records are multiples of {RUN_UNIT}"
        )
    if not grid.tiles and matrix.values.numel():
        raise KernelError(
            f"values has {matrix.values.numel()} bytes, [{rows}, {cols}] has no tiles"
        )


def _check_array(name: str, array: torch.Tensor, matrix: TorchMatrix) -> None:
    if array.dtype != torch.uint8 or array.dim() != 1 or not array.is_contiguous():
        raise KernelError(
            f"{name} is {array.dtype}{list(array.shape)} with strides {list(array.stride())}, "
            "its bytes are needed: uint8, one dimension, contiguous"
        )
    if array.device != matrix.device:
        raise KernelError(f"{name} is on {array.device}, values is on {matrix.device}")
    item_bytes = _ITEM_BYTES.get(name, 1)
    if name == "values" and matrix.codec == "raw":
        item_bytes = DTYPES[matrix.dtype].itemsize
    if array.numel() and (array.data_ptr() % item_bytes or array.storage_offset() % item_bytes):
        raise KernelError(f"{name} does not start on a multiple of {item_bytes} bytes")
