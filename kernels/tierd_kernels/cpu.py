"""The C++ kernels, one object for each instruction set."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tierd_kernels import _cpu
from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import Bits, Dtype, Geometry

MAX_THREADS: Final = _cpu.MAX_THREADS

# Which overload is meant follows from dtypes that were checked at run time, which mypy cannot see.
_native: Any = _cpu


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """One instruction set of `_cpu`; same functions as `tierd_kernels.reference`."""

    name: str

    def expand(
        self,
        bitmap: NDArray[np.uint64],
        offsets: NDArray[np.uint32],
        values: Bits,
        out: Bits,
        geometry: Geometry,
        threads: int,
    ) -> None:
        """See `reference.expand`."""
        try:
            _native.expand(
                bitmap, offsets, values, out, geometry.tile_rows, geometry.first, threads, self.name
            )
        except ValueError as error:
            raise KernelError(str(error)) from None

    def linear(
        self,
        bitmap: NDArray[np.uint64],
        offsets: NDArray[np.uint32],
        values: Bits,
        x: Bits,
        out: NDArray[np.float32],
        dtype: Dtype,
        threads: int,
    ) -> None:
        """See `reference.linear`; sums in single precision, in an order that no setting changes."""
        try:
            _native.linear(bitmap, offsets, values, x, out, dtype == "F16", threads, self.name)
        except ValueError as error:
            raise KernelError(str(error)) from None


def supported_kernels() -> tuple[CpuKernel, ...]:
    """Kernels that this processor runs, slowest first."""
    return tuple(CpuKernel(name) for name, supported in _cpu.kernel_names() if supported)


def unsupported_names() -> tuple[str, ...]:
    """Kernels that were built but that this processor cannot run."""
    return tuple(name for name, supported in _cpu.kernel_names() if not supported)
