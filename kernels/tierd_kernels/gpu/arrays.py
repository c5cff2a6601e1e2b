"""What is asked of a matrix before a kernel on a GPU reads it, beside what all kernels ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import TILE
from tierd_kernels.gpu.numbers import INTERPRETED
from tierd_kernels.torch_matrix import check_matrix

if TYPE_CHECKING:
    from tierd_kernels.torch_matrix import TorchMatrix

WORDS_BYTES: Final = 16
"""`bitmap` is read by four words at once, as `values` may be: both start on a multiple of this. In
a layer every array does on one of 256."""
MOST_TILES: Final = 2**31 - 1
"""Programs of a launch."""


def check_arrays(matrix: TorchMatrix) -> None:
    """Raise KernelError unless the kernels can run on the matrix. Nothing waits for the device."""
    check_matrix(matrix)
    device = "cpu" if INTERPRETED.value else "cuda"
    if matrix.device.type != device:
        why = "TRITON_INTERPRET=1 runs them on the CPU" if device == "cpu" else "they run on cuda"
        raise KernelError(f"the matrix is on {matrix.device}, Triton's kernels are not: {why}")
    if matrix.grid.tiles > MOST_TILES:
        raise KernelError(
            f"the matrix has {matrix.grid.tiles} tiles, a launch at most {MOST_TILES}"
        )
    for name in ("bitmap", "values"):
        array = matrix.arrays().get(name)
        if array is not None and array.numel() and array.data_ptr() % WORDS_BYTES:
            raise KernelError(f"{name} does not start on a multiple of {WORDS_BYTES} bytes")


def group_tiles(matrix: TorchMatrix) -> int:
    """Tiles in a row for which a scale holds: not more than there are, whatever the group says.

    Kernels count them in 32 bits.
    """
    return max(1, min(matrix.group // TILE, matrix.grid.tile_cols))
