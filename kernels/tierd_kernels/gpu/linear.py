"""The fused product: x @ W.T + bias from a packed W, which is never expanded to memory."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, Final

import torch
import triton.language as tl

from tierd_kernels.errors import KernelError
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults
from tierd_kernels.gpu import cuda_product
from tierd_kernels.gpu.arrays import check_arrays, group_tiles
from tierd_kernels.gpu.plans import (
    CUDA,
    DATA_CENTER_PROCESSORS,
    MOST_SPLITS,
    MOST_TOKENS,
    TOKEN_BLOCKS,
    VARIANTS,
    Plan,
    default_plan,
)
from tierd_kernels.gpu.product import add_parts, multiply_tiles
from tierd_kernels.gpu.records import far_units
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix

ELEMENTS: Final = {"BF16": tl.bfloat16, "F16": tl.float16}
"""The dtypes that there are products for."""
REGISTERS: Final = {
    ("raw", 16): 80,
    ("exponent-packed", 16): 102,
    ("exponent-packed", 32): 128,
    ("int8", 16): 102,
    ("int4", 16): 102,
}
"""Of a thread, at most, by codec and tokens of a program that reads windows: 6, 5 and 4 programs of
4 warps are on a multiprocessor then. Without a number compilers take somewhat fewer, mostly for as
many programs, and compute more anew in each turn of the loop; sm_100's keeps some in memory."""
SUM_ROWS: Final = 256
"""Rows of a program of `add_parts`."""


def linear(
    matrix: TorchMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    faults: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Return x @ W.T + bias, summed in float32 and rounded once.

    x: [tokens, cols] of the matrix's dtype, BF16 or F16, up to MOST_TOKENS tokens, on its device;
    the elements of a row are adjacent.   bias: [rows] of that dtype; added before the rounding.
    out: [tokens, rows], of that dtype or float32 (which is not rounded), overwritten; a new tensor
    by default.
    faults: see `faults.new_faults`; tiles that are wrong count as zeros, and the call does
    not wait for the device. Without it the call waits and raises KernelError for the first of them.
    plan: how to run it (`crossover.py` measures which); a sensible one by default.

    Levels of int8 and int4 are multiplied as they are and their sums by the scales, in float32. A
    token's result depends on the plan's `order`, never on the other tokens or how many there are.
    Zeros count as in a dense product: with an infinite or NaN x they give NaN.
    Raises KernelError for arrays that do not fit.
    """
    check_arrays(matrix)
    tokens = _check_x(matrix, x)
    _check_bias(matrix, bias)
    if out is None:
        out = x.new_empty((tokens, matrix.rows))
    _check_out(matrix, out, tokens)
    cell = new_faults(matrix.device) if faults is None else faults
    if tokens and matrix.rows:
        chosen = plan or default_plan(matrix.grid, tokens, processors(matrix.device))
        _check_plan(matrix, chosen)
        launch(matrix, x.detach(), bias, out.detach(), cell, chosen)
    if faults is None and (fault := int(cell)) != NO_FAULT:
        raise KernelError(fault_text(fault))
    return out


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 where the interpreter plays it."""
    if device.type != "cuda":
        return DATA_CENTER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def multiply_arguments(matrix: TorchMatrix, plan: Plan) -> dict[str, Any]:
    """The constants that `multiply_tiles` is compiled with, and Triton's options."""
    packed = matrix.codec == "exponent-packed"
    return {
        "CODEC": matrix.codec,
        "DTYPE": ELEMENTS[matrix.dtype],
        "MASKED": matrix.bitmap is not None,
        "PLANES": matrix.most_planes if packed else 0,
        "VARIANT": plan.variant,
        "TOKENS": plan.tokens,
        "STAGES": plan.stages,
        "num_warps": plan.warps,
        "maxnreg": REGISTERS.get((matrix.codec, plan.tokens)) if plan.variant == "window" else None,
    }


def launch(
    matrix: TorchMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    faults: torch.Tensor,
    plan: Plan,
) -> None:
    """As `linear`, without asking whether anything fits."""
    tokens, rows, cols = len(x), matrix.rows, matrix.cols
    splits = plan.splits if cols else 0
    parts = x.new_empty((splits, tokens, rows), dtype=torch.float32)
    # Triton launches on the current device, whichever that of its arguments is.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if splits and plan.cuda:
            cuda_product.multiply(matrix, x, parts, faults, plan)
        elif splits:
            grid = (matrix.grid.tile_rows, splits, -(-tokens // plan.tokens))
            multiply_tiles[grid](
                matrix.bitmap,
                matrix.offsets,
                matrix.heads,
                matrix.scales,
                matrix.values,
                x,
                parts,
                faults,
                matrix.values.numel(),
                far_units(matrix.values.numel()),
                matrix.most_escapes if matrix.heads is not None else 0,
                rows,
                cols,
                tokens,
                x.stride(0),
                group_tiles(matrix),
                splits,
                **multiply_arguments(matrix, plan),
            )
        add_parts[(-(-rows // SUM_ROWS), tokens)](
            parts, bias, out, rows, tokens, splits, out.stride(0), ROWS=SUM_ROWS
        )


def _check_x(matrix: TorchMatrix, x: torch.Tensor) -> int:
    """Raise KernelError unless `x` fits; returns how many tokens it has."""
    if matrix.dtype not in ELEMENTS:
        raise KernelError(f"dtype {matrix.dtype} has no fused product, {', '.join(ELEMENTS)} have")
    if x.dtype != DTYPES[matrix.dtype]:
        raise KernelError(f"x has dtype {x.dtype}, {DTYPES[matrix.dtype]} is needed")
    if x.device != matrix.device:
        raise KernelError(f"x is on {x.device}, the matrix is on {matrix.device}")
    if x.dim() != 2 or x.shape[1] != matrix.cols or len(x) > MOST_TOKENS:
        raise KernelError(
            f"x has shape {list(x.shape)}, [0..{MOST_TOKENS}, {matrix.cols}] is needed"
        )
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise KernelError(f"x has strides {list(x.stride())}, a row's elements must be adjacent")
    return len(x)


def _check_bias(matrix: TorchMatrix, bias: torch.Tensor | None) -> None:
    if bias is None:
        return
    if bias.shape != (matrix.rows,) or bias.dtype != DTYPES[matrix.dtype]:
        raise KernelError(
            f"bias is {bias.dtype}{list(bias.shape)}, {DTYPES[matrix.dtype]}[{matrix.rows}] "
            "is needed"
        )
    if bias.device != matrix.device:
        raise KernelError(f"bias is on {bias.device}, the matrix is on {matrix.device}")
    if not bias.is_contiguous():
        raise KernelError(f"bias has strides {list(bias.stride())}, it must be contiguous")


def _check_out(matrix: TorchMatrix, out: torch.Tensor, tokens: int) -> None:
    if out.dtype not in (torch.float32, DTYPES[matrix.dtype]):
        raise KernelError(
            f"out has dtype {out.dtype}, {DTYPES[matrix.dtype]} or torch.float32 is needed"
        )
    if out.shape != (tokens, matrix.rows):
        raise KernelError(f"out has shape {list(out.shape)}, {[tokens, matrix.rows]} is needed")
    if out.device != matrix.device:
        raise KernelError(f"out is on {out.device}, the matrix is on {matrix.device}")
    if matrix.rows > 1 and out.stride(1) != 1:
        raise KernelError(
            f"out has strides {list(out.stride())}, a row's elements must be adjacent"
        )


def _check_plan(matrix: TorchMatrix, plan: Plan) -> None:
    most = max(1, min(matrix.grid.tile_cols, MOST_SPLITS))
    if plan.tokens not in TOKEN_BLOCKS:
        raise KernelError(f"a plan for {plan.tokens} tokens at once, there are {TOKEN_BLOCKS}")
    if not 1 <= plan.splits <= most:
        raise KernelError(f"a plan of {plan.splits} splits, {matrix.cols} columns have 1..{most}")
    if (plan.warps, plan.stages, plan.variant) not in (*VARIANTS, CUDA):
        raise KernelError(f"{plan} is none of the variants that are compiled and tested")
    if plan.cuda:
        cuda_product.check(matrix, plan)
