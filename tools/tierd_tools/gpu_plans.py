"""Plans of the fused product as measured on this card: all compiled at once, then chosen."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from tierd_tools.gpu_ground import WORK

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd_kernels.gpu.crossover import Crossovers
    from tierd_kernels.gpu.plans import Plan
    from tierd_kernels.torch_matrix import TorchMatrix
    from tierd_tools.gpu_matrices import KernelGround


def crossovers(here: KernelGround) -> Crossovers:
    """As a model has them, with the user's cache. Where an interpreter plays the GPU nothing is
    timed: any fused product is said to be faster than expanding."""
    from tierd_kernels.gpu.crossover import Crossovers

    if here.device.type == "cuda":
        return Crossovers(here.device)
    path = WORK / "crossovers" / f"{os.getpid()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return Crossovers(here.device, lambda plan, tokens, run: 2.0 if plan is None else 1.0, path)


def compile_ahead(wanted: Iterable[tuple[TorchMatrix, int]], device: torch.device) -> None:
    """Every candidate of the matrices, up to so many tokens, compiled by as many threads as there
    are processors: one after the other they take minutes."""
    if device.type != "cuda":
        return
    from tierd_kernels.gpu.linear import linear, processors
    from tierd_kernels.gpu.plans import TOKEN_BLOCKS, candidates

    def launch(matrix: TorchMatrix, tokens: int, plan: Plan) -> None:
        x = torch.zeros((tokens, matrix.cols), dtype=torch.bfloat16, device=device)
        linear(matrix, x, plan=plan)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = []
        for matrix, most in wanted:
            tried = set()
            for tokens in (block for block in TOKEN_BLOCKS if block <= max(most, TOKEN_BLOCKS[0])):
                for plan in candidates(matrix.grid, tokens, processors(device)):
                    variant = (plan.tokens, plan.warps, plan.stages, plan.variant)
                    if variant not in tried:
                        tried.add(variant)
                        running.append(pool.submit(launch, matrix, tokens, plan))
        for launched in running:
            launched.result()


def best(found: Crossovers, matrix: TorchMatrix, tokens: int) -> Plan:
    """The plan that a model would take; the fastest fused one where it would expand."""
    from tierd_kernels.gpu.crossover import TOKEN_CLASSES

    chosen = found.choice(matrix, tokens)
    if chosen is not None:
        return chosen
    times = found.table(matrix)[next(most for most in TOKEN_CLASSES if tokens <= most)]
    return min((plan for plan in times if plan is not None), key=times.__getitem__)
