"""The packed matrices of a model where they lie in an arena.

Their arrays are made once for a place. A layer mostly comes back to where it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tierd_layouts.layer_reader import packed_matrix

if TYPE_CHECKING:
    from tierd_client.memory import ArenaMemory
    from tierd_kernels.torch_matrix import TorchMatrix
    from tierd_layouts.index import Layer, Tensor
    from tierd_layouts.packed_matrix import PackedMatrix


class StoredMatrices:
    """Those of one model in `memory`. Thread-safe. The caller has a lease of the layer."""

    def __init__(self, memory: ArenaMemory) -> None:
        self._memory = memory
        #: By tensor: where its layer lay when it was last used, and its arrays there.
        self._packed: dict[str, tuple[int, PackedMatrix]] = {}
        self._torch: dict[str, tuple[int, TorchMatrix]] = {}
        #: By tensor: the most planes and escapes of a tile.
        self._limits: dict[str, tuple[int, int]] = {}

    def packed(self, layer: Layer, record: Tensor, offset: int) -> PackedMatrix:
        """A matrix of a layer that lies at `offset`, for kernels of the host."""
        place, matrix = self._packed.get(record.name, (-1, None))
        if matrix is None or place != offset:
            matrix = packed_matrix(self._memory.buffer(offset, layer.nbytes), record)
            self._packed[record.name] = offset, matrix
        return matrix

    def torch(self, layer: Layer, record: Tensor, offset: int) -> TorchMatrix:
        """A matrix of a layer that lies at `offset`, for any device.

        The first time its heads are measured, which waits for the device. Raises KernelError.
        """
        place, matrix = self._torch.get(record.name, (-1, None))
        if matrix is None or place != offset:
            matrix = self._made(layer, record, offset)
            self._torch[record.name] = offset, matrix
        return matrix

    def _made(self, layer: Layer, record: Tensor, offset: int) -> TorchMatrix:
        import torch

        from tierd_kernels import torch_matrix

        with torch.inference_mode(False):  # the thread may leave inference mode later
            found = self._memory.tensor(torch.uint8, (layer.nbytes,), (1,), offset)
            matrix = torch_matrix.from_layer(found, record)
            limits = self._limits.get(record.name)
            if limits is None:
                matrix = torch_matrix.measured(matrix)
                self._limits[record.name] = matrix.most_planes, matrix.most_escapes
                return matrix
        return replace(matrix, most_planes=limits[0], most_escapes=limits[1])
