"""Whether what was compiled on this machine computes what it should, tried once before it is used.

A Triton or NVRTC of another version, or a card that nobody tested, may make something else of the
kernels than what the tests saw. Some rows of a real matrix, expanded by torch's operations alone,
show it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch

from tierd_kernels import torch_expand
from tierd_kernels.errors import WrongKernel
from tierd_kernels.faults import new_faults
from tierd_kernels.gpu.expand import expand
from tierd_kernels.gpu.linear import linear
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix

if TYPE_CHECKING:
    from tierd_kernels.gpu.plans import Plan

MOST_ERROR: Final = 1e-4
"""Of an element of a product, as a part of |its row of W| times the root mean square of x. Rounding
gives 1e-6; one element of W in the wrong place 1e-2, in a row of 8192."""
_TILE_ROWS: Final = 3
_LONGEST: Final = 1e30
_ROOM_BYTES: Final = 8 << 20
"""Of temporaries: whoever expands has little memory left."""
_ABSENT_TOKENS: Final = 3
"""That a program has room for and a trial does not fill, so that masks are tried, too."""


class Trial:
    """With one matrix: some of its tile rows, as they must be. Waits for the device."""

    def __init__(self, matrix: TorchMatrix) -> None:
        self._matrix = matrix
        last = matrix.grid.tile_rows - 1
        self._tile_rows = sorted({last * i // (_TILE_ROWS - 1) for i in range(_TILE_ROWS)})

    def expansion(self) -> None:
        """Raise WrongKernel unless `expand` writes bit for bit what torch's operations write."""
        for tile_row in self._tile_rows:
            must = self._expanded(self._matrix, tile_row)
            found = torch.empty_like(must)
            expand(self._matrix, found, tile_rows=(tile_row, tile_row + 1), faults=self._ignored())
            if not torch.equal(found.view(torch.uint8), must.view(torch.uint8)):
                raise WrongKernel(f"tile row {tile_row} is expanded wrongly {self._where()}")

    def product(self, plan: Plan) -> None:
        """Raise WrongKernel unless `linear` is right with this plan, but for MOST_ERROR."""
        matrix, tokens = self._matrix, plan.tokens - _ABSENT_TOKENS
        x = torch.randn((tokens, matrix.cols), device=matrix.device).to(DTYPES[matrix.dtype])
        found = torch.empty((tokens, matrix.rows), dtype=torch.float32, device=matrix.device)
        linear(matrix, x, out=found, faults=self._ignored(), plan=plan)
        for tile_row, weights in self._exact.items():
            part = found[:, tile_row * 64 : tile_row * 64 + len(weights)]
            error = _error(part, x.double(), weights.double())
            if not error <= MOST_ERROR:  # also NaN
                raise WrongKernel(
                    f"{plan} multiplies wrongly {self._where()}: "
                    f"off by {error:.1e}, {MOST_ERROR:.0e} at most"
                )

    @cached_property
    def _exact(self) -> dict[int, torch.Tensor]:
        """Of each tile row the weights, once for all plans. Levels are multiplied unrounded; as
        float32 they are.
        """
        matrix = self._matrix
        exact = matrix if matrix.scales is None else replace(matrix, dtype="F32")
        return {tile_row: self._expanded(exact, tile_row) for tile_row in self._tile_rows}

    def _expanded(self, matrix: TorchMatrix, tile_row: int) -> torch.Tensor:
        height = min(64, matrix.rows - tile_row * 64)
        out = torch.empty((height, matrix.cols), dtype=DTYPES[matrix.dtype], device=matrix.device)
        rows = (tile_row, tile_row + 1)
        cell = self._ignored()
        torch_expand.expand(matrix, out, tile_rows=rows, faults=cell, room_bytes=_ROOM_BYTES)
        return out

    def _ignored(self) -> torch.Tensor:
        """Wrong tiles are zeros on both sides; who uses the matrix hears of them."""
        return new_faults(self._matrix.device)

    def _where(self) -> str:
        matrix = self._matrix
        return (
            f"on {_name(matrix.device)}, of a {matrix.codec} matrix "
            f"[{matrix.rows}, {matrix.cols}] of {matrix.dtype}"
        )


def _error(found: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> float:
    """The largest error of an element, see MOST_ERROR. Of a row that is so long that sums in
    float32 may overflow, or no number, nothing is asked.
    """
    exact = x @ weights.T
    lengths = weights.norm(dim=1) * x.square().mean().sqrt()
    off = torch.where(lengths < _LONGEST, (found.double() - exact).abs(), 0.0)
    error = torch.where(off == 0, 0.0, off / lengths)
    return float(error.max()) if error.numel() else 0.0


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
