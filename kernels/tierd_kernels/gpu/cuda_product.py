"""The fused product in CUDA C++, `product.cu`: compiled by NVRTC and launched through CuPy.

For masked exponent-packed matrices. A candidate beside Triton's: `crossover.py` measures it where
there is CuPy, and takes it where it is faster by a tenth at least.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from tierd_kernels.errors import KernelError

if TYPE_CHECKING:
    from tierd_kernels.gpu.plans import Plan
    from tierd_kernels.torch_matrix import TorchMatrix

SOURCE: Final = Path(__file__).with_name("product.cu")
NAME: Final = "multiply_packed"
MOST_PLANES: Final = 4
"""That the kernel decodes. Unpruned weights have 3, pruned ones fewer."""
THREADS: Final = 128
BLOCK_OPERAND: Final = "0x6420"
"""Of the one instruction of a block of 512 elements that has it: how it is found in the SASS."""
_ALIGNED_BYTES: Final = 16
"""Of bitmap and values: in a layer every array starts on a multiple of 256."""

Launch = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]
"""Of a grid, a program's threads, and the arguments: addresses and numpy's numbers."""

_log = logging.getLogger(__name__)


def usable(matrix: TorchMatrix) -> bool:
    """Whether the kernel is one for the matrix, and runs here. Why it does not is logged once."""
    return not _unfit(matrix) and _loads(options(matrix, 16), matrix.device)


def check(matrix: TorchMatrix) -> None:
    """Raise KernelError unless the kernel is one for the matrix."""
    if why := _unfit(matrix):
        raise KernelError(f"the CUDA product has no kernel for this matrix: {why}")


def options(matrix: TorchMatrix, tokens: int) -> tuple[str, ...]:
    """What the kernel is compiled with, for so many tokens at once."""
    return (
        "-std=c++17",
        f"-DPLANES={matrix.most_planes}",
        f"-DF16={int(matrix.dtype == 'F16')}",
        f"-DTOKENS={tokens}",
    )


def multiply(
    matrix: TorchMatrix,
    x: torch.Tensor,
    parts: torch.Tensor,
    faults: torch.Tensor,
    plan: Plan,
) -> None:
    """As `product.multiply_tiles`: write the sums of each split to parts [splits, tokens, rows].

    Raises KernelError where there is no CuPy, or where it does not compile the kernel.
    """
    assert matrix.bitmap is not None
    assert matrix.heads is not None
    grid = (matrix.grid.tile_rows, plan.splits, -(-len(x) // plan.tokens))
    arguments = (
        *map(_address, (matrix.bitmap, matrix.offsets, matrix.heads, matrix.values)),
        *map(_address, (x, parts, faults)),
        np.uint64(matrix.values.numel()),
        np.uint32(matrix.most_escapes),
        np.uint32(matrix.rows),
        np.uint32(matrix.cols),
        np.uint32(len(x)),
        np.uint64(x.stride(0)),
        np.uint32(plan.splits),
    )
    loaded(options(matrix, plan.tokens), matrix.device)(grid, (THREADS, 1, 1), arguments)


@cache
def loaded(options: tuple[str, ...], device: torch.device) -> Launch:
    """What launches the kernel on the current stream of torch. Raises KernelError."""
    try:
        import cupy
    except ImportError as error:
        raise KernelError(f"the CUDA product needs CuPy: {error}") from error
    try:
        with cupy.cuda.Device(device.index):
            module = cupy.RawModule(code=SOURCE.read_text(), options=options)
            kernel = module.get_function(NAME)
    except Exception as error:  # CuPy's have no class in common
        raise KernelError(f"CuPy does not compile {SOURCE.name} for {device}: {error}") from error

    def launch(grid: tuple[int, ...], threads: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        with ExitStack() as stack:
            stack.enter_context(cupy.cuda.Device(device.index))
            current = torch.cuda.current_stream(device)
            stack.enter_context(cupy.cuda.Stream.from_external(current))
            kernel(grid, threads, arguments)

    return launch


@cache
def _loads(options: tuple[str, ...], device: torch.device) -> bool:
    try:
        loaded(options, device)
    except KernelError as error:
        _log.info("the product in CUDA C++ is not measured: %s", error)
        return False
    return True


def _unfit(matrix: TorchMatrix) -> str:
    """Why the kernel is none for the matrix; empty where it is one."""
    if matrix.codec != "exponent-packed" or matrix.bitmap is None:
        form = "dense form" if matrix.bitmap is None else "masked"
        return f"it is {matrix.codec}, {form}, not exponent-packed, masked"
    if matrix.most_planes > MOST_PLANES:
        return f"it may have {matrix.most_planes} planes, {MOST_PLANES} at most are decoded"
    for name in ("bitmap", "values"):
        array = matrix.arrays()[name]
        if array.numel() and array.data_ptr() % _ALIGNED_BYTES:
            return f"{name} does not start on a multiple of {_ALIGNED_BYTES} bytes"
    return ""


def _address(tensor: torch.Tensor) -> np.uint64:
    return np.uint64(tensor.data_ptr())
