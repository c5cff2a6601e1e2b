"""Which kernel runs: the fastest that this processor has, or the one that TIERD_KERNELS names."""

import os
from functools import cache
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from tierd_kernels import cpu, reference
from tierd_kernels.errors import UnsupportedKernel
from tierd_kernels.geometry import Bits
from tierd_layouts.packed_matrix import PackedMatrix

VARIABLE: Final = "TIERD_KERNELS"


class Kernel(Protocol):
    """What a kernel provides; `tierd_kernels.reference` says what the functions do."""

    @property
    def name(self) -> str: ...

    def expand(self, matrix: PackedMatrix, out: Bits, first: int, end: int, threads: int) -> None:
        """Write tile rows `first` to `end` of `matrix` to `out`, whose shape was checked."""

    def linear(self, matrix: PackedMatrix, x: Bits, out: NDArray[np.float32], threads: int) -> None:
        """Write x @ W.T to `out`. All arrays were checked."""


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
