"""The C++ kernels, one object for each instruction set."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tierd_kernels import _cpu, native
from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import TILE, Bits, tiles_over
from tierd_layouts.packed_matrix import PackedMatrix

native.check(_cpu)

MAX_THREADS: Final = _cpu.MAX_THREADS

# Which overload is meant follows from dtypes that were checked at run time, which mypy cannot see.
_native: Any = _cpu


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """One instruction set of `_cpu`; same functions as `tierd_kernels.reference`."""

    name: str

    def expand(self, matrix: PackedMatrix, out: Bits, first: int, end: int, threads: int) -> None:
        """See `reference.expand`; `out` says where the range ends."""
        try:
            _native.expand(*_arguments(matrix), out, first, threads, self.name)
        except ValueError as error:
            raise KernelError(str(error)) from None

    def linear(self, matrix: PackedMatrix, x: Bits, out: NDArray[np.float32], threads: int) -> None:
        """See `reference.linear`; sums in single precision, in an order that no setting changes."""
        try:
            _native.linear(*_arguments(matrix), x, out, threads, self.name)
        except ValueError as error:
            raise KernelError(str(error)) from None


def share_threads(runtime: int, team: int) -> None:
    """See `tierd_kernels.share_threads`."""
    _cpu.share_threads(runtime, team)


def supported_kernels() -> tuple[CpuKernel, ...]:
    """Kernels that this processor runs, slowest first."""
    return tuple(CpuKernel(name) for name, supported in _cpu.kernel_names() if supported)


def unsupported_names() -> tuple[str, ...]:
    """Kernels that were built but that this processor cannot run."""
    return tuple(name for name, supported in _cpu.kernel_names() if not supported)


def _arguments(matrix: PackedMatrix) -> tuple[Any, ...]:
    """Return a matrix as the bindings take it: `values` are bytes for every codec.

    A group of any number of columns is one of as many as there are: they count it in 32 bits.
    """
    return (
        matrix.codec,
        matrix.dtype,
        matrix.rows,
        matrix.cols,
        min(matrix.group, tiles_over(matrix.cols) * TILE or TILE),
        matrix.bitmap,
        matrix.offsets,
        matrix.values.view(np.uint8),
        matrix.heads,
        matrix.scales,
    )
