"""A packed matrix times many tokens: expanded a block at a time, each multiplied while in cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import tierd_kernels
from tierd_client.scratch import Scratch
from tierd_client.tensors import bits_of, torch_dtype
from tierd_layouts.tile_grid import TILE

if TYPE_CHECKING:
    from tierd_kernels import PackedMatrix

#: Of a block, for each thread.
BLOCK_BYTES = 2 << 20


def blocked_product(
    matrix: PackedMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scratch: Scratch | None = None,
    threads: int = 0,
) -> torch.Tensor:
    """`x @ W.T + bias`, one product of torch for every block of rows.

    x: [tokens, cols] of the matrix's dtype. bias: [rows] of it. threads: of the expansion (0: the
    kernels' default); the products take torch's own. Returns [tokens, rows].
    Raises KernelError.
    """
    scratch = scratch or Scratch()
    rows, dtype = matrix.rows, torch_dtype(matrix.dtype)
    step = block_rows(matrix.cols, dtype.itemsize, threads or tierd_kernels.get_threads())
    with torch.no_grad():
        # Transposed: the operand that torch copies for each product is then x and not the block.
        turned, x_turned = torch.empty(rows, x.shape[0], dtype=dtype), x.t()
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            block = scratch.matrix((end - begin, matrix.cols), dtype)
            tile_rows = (begin // TILE, -(-end // TILE))
            tierd_kernels.expand(matrix, bits_of(block), tile_rows=tile_rows, threads=threads)
            part = turned[begin:end]
            if bias is None:
                torch.mm(block, x_turned, out=part)
            else:
                torch.addmm(bias[begin:end, None], block, x_turned, out=part)
        return turned.t().contiguous()


def block_rows(cols: int, item_bytes: int, threads: int) -> int:
    """Rows of a block: as many whole tile rows for each thread as BLOCK_BYTES have room for."""
    each = BLOCK_BYTES // max(1, TILE * cols * item_bytes)
    return max(1, each) * threads * TILE
