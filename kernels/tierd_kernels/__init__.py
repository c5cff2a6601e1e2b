"""tierd_kernels: expand packed matrices, and multiply with them as they are. No torch.

A packed matrix is three arrays, `bitmap`, `offsets` and `values`, in the tile layout of
layouts/FORMAT.md. Every function releases the GIL, reads its inputs in place (they may be read-only
memory maps), and raises KernelError for arrays that do not fit, whatever their contents.
"""

from typing import get_args

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
    check_output,
    check_packed,
    element_of,
    expand_geometry,
    tiles_over,
)

__all__ = [
    "Dtype",
    "KernelError",
    "KernelsError",
    "UnsupportedKernel",
    "available",
    "expand",
    "get_threads",
    "kernel_name",
    "linear",
    "set_threads",
]

_threads = 0
"""Threads of a call that names none; 0 until it was asked for or set."""


def expand(
    bitmap: NDArray[np.uint64],
    offsets: NDArray[np.uint32],
    values: Bits,
    out: Bits,
    *,
    tile_rows: tuple[int, int] | None = None,
    threads: int = 0,
) -> None:
    """Write a packed matrix to `out`, bit for bit, zeros where no bit is set.

    bitmap: uint64[tiles * 64].   offsets: uint32[tiles + 1].   values: uint16 or uint32.
    out: [rows, cols] of the type of `values`, C-contiguous, overwritten.
    tile_rows: (first, end), the part of the matrix that `out` holds; all of it by default.
    threads: 0 is the process's default (`set_threads`).
    Raises KernelError; the contents of `out` are then undefined.
    """
    check_output("out", out, element_of(values))
    rows, cols = out.shape
    geometry = expand_geometry(bitmap, rows, cols, tile_rows)
    check_packed(bitmap, offsets, values, geometry.tile_rows * tiles_over(cols))
    dispatch.current().expand(bitmap, offsets, values, out, geometry, _threads_for(threads))


def linear(
    bitmap: NDArray[np.uint64],
    offsets: NDArray[np.uint32],
    values: Bits,
    x: Bits,
    out: NDArray[np.float32],
    *,
    dtype: Dtype,
    threads: int = 0,
) -> None:
    """Write x @ W.T to `out`, where W is the packed matrix, summed in single precision.

    x: the bits of `dtype`, uint16 or uint32 [tokens, cols], C-contiguous.
    out: float32 [tokens, rows], C-contiguous, overwritten.
    The result for a token depends neither on `threads` nor on the other tokens.
    Raises KernelError; the contents of `out` are then undefined.
    """
    if dtype not in get_args(Dtype):
        raise KernelError(f"dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}")
    check_array("values", values, ELEMENT[dtype], 1)
    check_array("x", x, ELEMENT[dtype], 2)
    check_output("out", out, np.float32)
    tokens, cols = x.shape
    if out.shape[0] != tokens:
        raise KernelError(f"out has {out.shape[0]} tokens, x has {tokens}")
    check_packed(bitmap, offsets, values, tiles_over(out.shape[1]) * tiles_over(cols))
    dispatch.current().linear(bitmap, offsets, values, x, out, dtype, _threads_for(threads))


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
