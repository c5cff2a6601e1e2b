"""Which kernel runs: the fastest that this processor has, or the one that TIERD_KERNELS names."""

import os
from functools import cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tierd_kernels import cpu, reference
from tierd_kernels.errors import UnsupportedKernel
from tierd_kernels.geometry import Bits, Dtype, Geometry

VARIABLE: Final = "TIERD_KERNELS"


class Kernel(Protocol):
    """What a kernel provides; `tierd_kernels.reference` says what the functions do."""

    @property
    def name(self) -> str: ...

    def expand(
        self,
        bitmap: NDArray[np.uint64],
        offsets: NDArray[np.uint32],
        values: Bits,
        out: Bits,
        geometry: Geometry,
        threads: int,
    ) -> None: ...

    def linear(
        self,
        bitmap: NDArray[np.uint64],
        offsets: NDArray[np.uint32],
        values: Bits,
        x: Bits,
        out: NDArray[np.float32],
        dtype: Dtype,
        threads: int,
    ) -> None: ...


@cache
def kernels() -> dict[str, Kernel]:
    """Return the kernels that run here by name, slowest first."""
    found: list[Kernel] = [reference, *cpu.supported_kernels()]
    return {kernel.name: kernel for kernel in found}


def choose(wanted: str | None) -> Kernel:
    """Return the kernel of this name, the fastest one for None.

    Raises UnsupportedKernel when it is not here: a choice is never replaced by another.
    """
    here = kernels()
    if wanted is None:
        return list(here.values())[-1]
    if wanted in here:
        return here[wanted]
    why = "this processor cannot run it" if wanted in cpu.unsupported_names() else "unknown"
    raise UnsupportedKernel(f"{VARIABLE}={wanted}: {why}; available here: {', '.join(here)}")


@cache
def current() -> Kernel:
    """Return the kernel of this process. The environment is read once."""
    return choose(os.environ.get(VARIABLE))
