"""Does expanding a matrix run at the speed of a copy, counted in bytes read and written?

Against a copy of as many dense bytes within the device. Both sides go through more matrices, and
write to more places, than the L2 cache holds. The row has the way that is taken by default; what
the others reach stands beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tierd_kernels.faults import new_faults
from tierd_tools.gpu_acceptance.promises import EXPAND
from tierd_tools.gpu_binding import bound_by
from tierd_tools.gpu_matrices import (
    copies_of,
    dense_copies,
    dense_weights,
    kernel_ground,
    over_all,
    packed_bytes,
    packed_there,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_tools.benchmark import Row
    from tierd_tools.gpu_acceptance.promises import Promise
    from tierd_tools.gpu_matrices import KernelGround

SPARSITY = 0.5
CODECS = ("raw", "exponent-packed", "int8", "int4")


def run() -> list[Row]:
    here = kernel_ground()
    promises = iter(EXPAND)
    if here.problem:
        return [promise.not_run(here.problem) for promise in promises]
    rows: list[Row] = []
    for shape in here.shapes:
        dense = dense_weights(here, shape, SPARSITY)
        there = dense_copies(here, dense)
        outputs = [torch.empty_like(matrix) for matrix in there]
        for codec in CODECS:
            matrix = packed_there(here, dense, codec)
            rows.append(_row(here, next(promises), matrix, there, outputs))
        del there, outputs
    return rows


def _row(
    here: KernelGround,
    promise: Promise,
    matrix: Any,
    dense: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> Row:
    from tierd_kernels.gpu.expand import DEFAULT_WAY, expand, ways

    faults = new_faults(here.device)
    matrices = copies_of(here, matrix)
    pairs = [(one, outputs[number % len(outputs)]) for number, one in enumerate(matrices)]

    def side(way: Any) -> Callable[[], None]:
        return over_all(pairs, lambda pair: expand(*pair, faults=faults, way=way))

    tried = ways(matrix.codec)
    sides = {str(number): side(way) for number, way in enumerate(tried)}
    sides["copy"] = over_all(
        list(zip(outputs, dense, strict=True)), lambda pair: pair[0].copy_(pair[1])
    )
    taken = tried.index(DEFAULT_WAY)
    binding = bound_by(here, lambda: expand(*pairs[0], faults=faults), matrix, DEFAULT_WAY)
    seconds = here.clock.interleaved(sides)
    moved = packed_bytes(matrix) + dense[0].nbytes
    rates = [len(pairs) * moved / seconds[str(number)] for number in range(len(tried))]
    copied = len(dense) * 2 * dense[0].nbytes / seconds["copy"]
    beside = ", ".join(
        f"{way.variant} {way.warps} warps {rate / copied:.2f}"
        for way, rate in zip(tried, rates, strict=True)
    )
    binds = binding.text(moved, seconds[str(taken)] / len(pairs), copied)
    return promise.measured(rates[taken] / 1e9, copied / 1e9, here.but, beside, binds)
