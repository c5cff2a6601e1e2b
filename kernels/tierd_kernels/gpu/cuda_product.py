"""The fused product in CUDA C++, `product.cu`: compiled by NVRTC and launched through CuPy.

For masked matrices, exponent-packed or of int8. A candidate beside Triton's: `crossover.py`
measures it where there is CuPy, and takes it where it is faster by a tenth at least.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from tierd_kernels.errors import KernelError
from tierd_kernels.gpu.arrays import group_tiles
from tierd_kernels.gpu.plans import CUDA_TOKENS

if TYPE_CHECKING:
    from tierd_kernels.gpu.plans import Plan
    from tierd_kernels.torch_matrix import TorchMatrix

SOURCE: Final = Path(__file__).with_name("product.cu")
NAME: Final = "multiply_packed"
MOST_PLANES: Final = 4
"""That the kernel decodes. Unpruned weights have 3, pruned ones fewer."""
BLOCK_OPERAND: Final = "0x6420"
"""Of the one instruction of a block of 512 exponent-packed elements that has it: how it is found in
the SASS."""

Launch = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]
"""Of a grid, a program's threads, and the arguments: addresses and numpy's numbers."""

_log = logging.getLogger(__name__)


def usable(matrix: TorchMatrix) -> bool:
    """Whether the kernel is one for the matrix, and runs here. Why it does not is logged once."""
    return not _unfit(matrix) and _loads(options(matrix, 16), matrix.device)


def check(matrix: TorchMatrix, plan: Plan) -> None:
    """Raise KernelError unless the kernel is one for the matrix and for such a plan."""
    if why := _unfit(matrix):
        raise KernelError(f"the CUDA product has no kernel for this matrix: {why}")
    if plan.tokens > (most := CUDA_TOKENS[matrix.codec]):
        raise KernelError(
            f"a plan for {plan.tokens} tokens at once, {matrix.codec} has {most} in CUDA"
        )


def options(matrix: TorchMatrix, tokens: int) -> tuple[str, ...]:
    """What the kernel is compiled with, for so many tokens at once."""
    packed = matrix.codec == "exponent-packed"
    return (
        "-std=c++17",
        f"-DINT8={int(not packed)}",
        f"-DPLANES={matrix.most_planes if packed else 0}",
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
    grid = (matrix.grid.tile_rows, plan.splits, -(-len(x) // plan.tokens))
    arguments = (
        *map(_address, (matrix.bitmap, matrix.offsets, matrix.heads, matrix.scales, matrix.values)),
        *map(_address, (x, parts, faults)),
        np.uint64(matrix.values.numel()),
        np.uint32(matrix.most_escapes if matrix.heads is not None else 0),
        np.uint32(matrix.rows),
        np.uint32(matrix.cols),
        np.uint32(len(x)),
        np.uint64(x.stride(0)),
        np.uint32(group_tiles(matrix)),
        np.uint32(plan.splits),
    )
    threads = (32 * plan.warps, 1, 1)
    loaded(options(matrix, plan.tokens), matrix.device)(grid, threads, arguments)


@cache
def loaded(options: tuple[str, ...], device: torch.device) -> Launch:
    """What launches the kernel on the current stream of torch. Raises KernelError."""
    try:
        import cupy

        stream_of = cupy.cuda.Stream.from_external  # since 14
    except Exception as error:  # also what a CuPy raises that does not fit to numpy
        raise KernelError(f"the CUDA product needs CuPy 14 or later: {error}") from error
    try:
        with cupy.cuda.Device(device.index):
            module = cupy.RawModule(code=SOURCE.read_text(), options=options)
            kernel = module.get_function(NAME)
    except Exception as error:  # CuPy's have no class in common
        raise KernelError(f"CuPy does not compile {SOURCE.name} for {device}: {error}") from error

    def launch(grid: tuple[int, ...], threads: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        with cupy.cuda.Device(device.index), stream_of(torch.cuda.current_stream(device)):
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
    if matrix.codec not in CUDA_TOKENS:
        return f"it is {matrix.codec}, not one of {', '.join(CUDA_TOKENS)}"
    if matrix.bitmap is None:
        return "it is in dense form, not masked"
    if matrix.heads is not None and matrix.most_planes > MOST_PLANES:
        return f"it may have {matrix.most_planes} planes, {MOST_PLANES} at most are decoded"
    return ""


def _address(tensor: torch.Tensor | None) -> np.uint64:
    return np.uint64(0 if tensor is None else tensor.data_ptr())
