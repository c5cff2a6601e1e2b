"""Is the fused product of 1 to 16 tokens faster than cuBLAS with dense bf16 weights?

Each number of tokens is measured; the row has the worst of them. Both sides go through more
matrices than the L2 cache holds, and are replayed as graphs: what launching costs is in neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from tierd_kernels.faults import new_faults
from tierd_tools import gpu_plans
from tierd_tools.gpu_acceptance.promises import FUSED, FUSED_FORMS
from tierd_tools.gpu_binding import bound_by, watch
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
    from tierd_tools.benchmark import Row
    from tierd_tools.gpu_acceptance.promises import Promise
    from tierd_tools.gpu_matrices import KernelGround

TOKENS = (1, 2, 4, 8, 16)


def run() -> list[Row]:
    here = kernel_ground()
    promises = iter(FUSED)
    if here.problem:
        return [promise.not_run(here.problem) for promise in promises]
    watch(here)
    crossovers = gpu_plans.crossovers(here)
    rows: list[Row] = []
    for shape in here.shapes:
        for codec, zeros, _ in FUSED_FORMS:
            dense = dense_weights(here, shape, zeros)
            matrix = packed_there(here, dense, codec)
            rows.append(_row(here, next(promises), crossovers, matrix, dense))
    return rows


def _row(
    here: KernelGround, promise: Promise, crossovers: Any, matrix: Any, dense: torch.Tensor
) -> Row:
    matrices, theirs = copies_of(here, matrix), dense_copies(here, dense)
    gpu_plans.compile_ahead([(matrix, TOKENS[-1])], here.device)
    found = [_measure(here, crossovers, matrices, theirs, tokens) for tokens in TOKENS]
    ours_s, theirs_s, _ = worst = min(found, key=lambda one: one[1] / one[0])
    figures = ", ".join(
        f"{tokens}: {theirs / ours:.2f}"
        for tokens, (ours, theirs, _) in zip(TOKENS, found, strict=True)
    )
    return promise.measured(
        ours_s * 1e6,
        theirs_s * 1e6,
        here.but,
        beside=f"tokens and times: {figures}",
        binds=worst[2],
    )


def _measure(
    here: KernelGround, crossovers: Any, matrices: list[Any], dense: list[torch.Tensor], tokens: int
) -> tuple[float, float, str]:
    """(seconds of ours, of theirs, what binds ours), of one product."""
    from tierd_kernels.gpu.linear import linear

    matrix, faults = matrices[0], new_faults(here.device)
    x = torch.randn(tokens, matrix.cols).to(dense[0].dtype).to(here.device)
    out = torch.empty((tokens, matrix.rows), dtype=x.dtype, device=here.device)
    plan = gpu_plans.best(crossovers, matrix, tokens)
    sides = {
        "ours": over_all(matrices, lambda one: linear(one, x, out=out, faults=faults, plan=plan)),
        "theirs": over_all(dense, lambda one: F.linear(x, one)),
    }
    binding = bound_by(here, lambda: linear(matrix, x, faults=faults, plan=plan), matrix, plan)
    seconds = here.clock.interleaved(sides)
    ours, theirs = seconds["ours"] / len(matrices), seconds["theirs"] / len(dense)
    # What cuBLAS reads, a stream of bytes, is about what a copy's rate is.
    rate = dense[0].nbytes / theirs
    return ours, theirs, f"{plan}: {binding.text(packed_bytes(matrix), ours, rate, 'cuBLAS reads')}"
