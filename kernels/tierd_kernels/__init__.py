"""tierd_kernels: expand packed matrices, and multiply with them as they are. No torch.

A packed matrix is a `tierd_layouts.packed_matrix.PackedMatrix`: arrays in the tile layout of
layouts/FORMAT.md, in any of its codecs. Every function releases the GIL, reads its inputs in place
(they may be read-only memory maps), and raises KernelError for arrays that do not fit, whatever
their contents.
"""

import numpy as np
from numpy.typing import NDArray

from tierd_kernels import cpu as _cpu_kernels
from tierd_kernels import dispatch
from tierd_kernels.cpus import default_threads
from tierd_kernels.errors import KernelError, KernelsError, UnsupportedKernel
from tierd_kernels.geometry import (
    ELEMENT,
    Bits,
    Dtype,
    check_array,
    check_matrix,
    check_output,
    tile_range,
)
from tierd_layouts.packed_matrix import PackedMatrix

__all__ = [
    "Dtype",
    "KernelError",
    "KernelsError",
    "PackedMatrix",
    "UnsupportedKernel",
    "available",
    "expand",
    "get_threads",
    "kernel_name",
    "linear",
    "set_threads",
    "share_threads",
]

_threads = 0
"""Threads of a call that names none; 0 until it was asked for or set."""


def expand(
    matrix: PackedMatrix,
    out: Bits,
    *,
    tile_rows: tuple[int, int] | None = None,
    threads: int = 0,
) -> None:
    """Write a packed matrix to `out`: lossless codecs bit for bit, lossy ones rounded once.

    out: bits of the matrix's dtype, uint16 or uint32 [rows, cols], C-contiguous, overwritten.
    tile_rows: (first, end), the part of the matrix that `out` holds; all of it by default.
    threads: 0 is the process's default (`set_threads`).
    Raises KernelError; the contents of `out` are then undefined.
    """
    check_matrix(matrix)
    check_output("out", out, ELEMENT[matrix.dtype])
    first, end = tile_range((matrix.rows, matrix.cols), out.shape, tile_rows)
    dispatch.current().expand(matrix, out, first, end, _threads_for(threads))


def linear(
    matrix: PackedMatrix,
    x: Bits,
    out: NDArray[np.float32],
    *,
    threads: int = 0,
) -> None:
    """Write x @ W.T to `out`, where W is the packed matrix, summed in single precision.

    x: bits of the matrix's dtype, uint16 or uint32 [tokens, cols], C-contiguous.
    out: float32 [tokens, rows], C-contiguous, overwritten.
    Levels of int8 and int4 are multiplied with their scale as they are, not rounded to the dtype.
    The result for a token depends neither on `threads` nor on the other tokens.
    Raises KernelError; the contents of `out` are then undefined.
    """
    check_matrix(matrix)
    check_array("x", x, ELEMENT[matrix.dtype], 2)
    check_output("out", out, np.float32)
    if x.shape[1] != matrix.cols:
        raise KernelError(f"x has {x.shape[1]} columns, the matrix has {matrix.cols}")
    if out.shape != (x.shape[0], matrix.rows):
        raise KernelError(
            f"out has shape {list(out.shape)}, {x.shape[0]} tokens of a matrix of {matrix.rows} "
            f"rows need {[x.shape[0], matrix.rows]}"
        )
    dispatch.current().linear(matrix, x, out, _threads_for(threads))


def kernel_name() -> str:
    """Return the name of the kernel in use. Raises UnsupportedKernel as a product would."""
    return dispatch.current().name


def available() -> tuple[str, ...]:
    """Return the names of the kernels that this processor can run, slowest first."""
    return tuple(dispatch.kernels())


def set_threads(threads: int) -> None:
    """Set the number of threads for calls that name none; 0 returns to what the machine offers."""
    global _threads
    _threads = _checked_threads(threads)


def get_threads() -> int:
    """Return the number of threads that a call uses which names none."""
    return _threads_for(0)


def share_threads(runtime: int, team: int) -> None:
    """Run kernels on the threads of an OpenMP runtime that the process has anyway, torch's.

    runtime: the address of its function GOMP_parallel; 0 is our own threads, also in a child after
    a fork. team: threads of its other parallel regions; of them a call uses as many as it may.
    A runtime's threads spin for milliseconds after a region, where our own would have to wait.
    """
    _cpu_kernels.share_threads(runtime, _checked_threads(team))


def _threads_for(threads: int) -> int:
    global _threads
    if threads != 0:
        return _checked_threads(threads)
    if _threads == 0:
        _threads = min(default_threads(), _cpu_kernels.MAX_THREADS)
    return _threads


def _checked_threads(threads: int) -> int:
    if not 0 <= threads <= _cpu_kernels.MAX_THREADS:
        raise KernelError(f"threads {threads} is not in 0..{_cpu_kernels.MAX_THREADS}")
    return threads
