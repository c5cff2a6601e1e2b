"""Does the order of tiles and elements on disk cost a GPU more than another would?

The one decoding that there is, over copies of a matrix in other orders (`gpu_layout` says which),
for expanding and for a product with one token. Should the order on disk cost more than 15 %,
another one is to be proposed for all processors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tierd_tools.gpu_acceptance.promises import LAYOUT
from tierd_tools.gpu_matrices import (
    copies_of,
    dense_copies,
    dense_weights,
    kernel_ground,
    over_all,
    packed_there,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_tools.benchmark import Row
    from tierd_tools.gpu_matrices import KernelGround

SHAPE, SMALL = (8192, 8192), (256, 512)
SPLITS = 8


def run() -> list[Row]:
    here = kernel_ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in LAYOUT]
    dense = dense_weights(here, SHAPE if here.device.type == "cuda" else SMALL, 0.5)
    outputs = [torch.empty_like(one) for one in dense_copies(here, dense)]
    x = torch.randn(dense.shape[1]).to(dense.dtype).to(here.device)
    expands, sums, count = _sides(here, dense, outputs, x)
    rows: list[Row] = []
    for promise, sides in zip(LAYOUT, (expands, sums), strict=True):
        seconds = here.clock.interleaved(sides)
        others = {name: value for name, value in seconds.items() if name != "rows"}
        beside = ", ".join(f"{name} {value / count * 1e6:.1f}" for name, value in others.items())
        ours, theirs = seconds["rows"] / count * 1e6, min(others.values()) / count * 1e6
        rows.append(promise.measured(ours, theirs, here.but, beside=beside))
    return rows


def _sides(
    here: KernelGround, dense: torch.Tensor, outputs: list[torch.Tensor], x: torch.Tensor
) -> tuple[dict[str, Callable[[], None]], dict[str, Callable[[], None]], int]:
    """For each order: expanding, and summing, over so many copies. Both were seen to be right."""
    from tierd_kernels.gpu.expand import DEFAULT_WAY
    from tierd_kernels.gpu.records import far_units
    from tierd_tools import gpu_layout

    expands, sums, count = {}, {}, 0
    tall, wide = (length // gpu_layout.TILE for length in dense.shape)
    exact = dense.double() @ x.cpu().double()
    for order in gpu_layout.ORDERS:
        stored = packed_there(here, gpu_layout.stored_copy(dense, order), "raw")
        matrices = copies_of(here, stored)
        count, variant = len(matrices), DEFAULT_WAY.variant
        parts = torch.empty((SPLITS, dense.shape[0]), device=here.device)
        pairs = [(one, outputs[number % len(outputs)]) for number, one in enumerate(matrices)]

        def expand(
            pair: tuple[Any, torch.Tensor], order: str = order, variant: str = variant
        ) -> None:
            matrix, out = pair
            gpu_layout.expand_tiles[(tall * wide,)](
                matrix.bitmap, matrix.offsets, matrix.values, matrix.values.numel(),
                far_units(matrix.values.numel()), out, tall, wide, VARIANT=variant, ORDER=order,
            )  # fmt: skip

        def add(
            matrix: Any,
            order: str = order,
            variant: str = variant,
            parts: torch.Tensor = parts,
        ) -> None:
            gpu_layout.sum_rows[(tall, SPLITS)](
                matrix.bitmap, matrix.offsets, matrix.values, matrix.values.numel(),
                far_units(matrix.values.numel()), x, parts, tall, wide, SPLITS,
                VARIANT=variant, ORDER=order,
            )  # fmt: skip

        expands[order], sums[order] = over_all(pairs, expand), over_all(matrices, add)
        expands[order]()
        sums[order]()
        if not torch.equal(outputs[0].cpu(), dense):
            raise RuntimeError(f"the order {order} is not expanded to the matrix")
        error = float((parts.sum(0).cpu().double() - exact).abs().max() / exact.abs().max())
        if error > 1e-4:
            raise RuntimeError(f"the order {order} gives a product that is {error:.1e} off")
    return expands, sums, count
