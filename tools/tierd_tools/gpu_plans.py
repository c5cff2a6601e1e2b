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
    """Every variant of the matrices, up to so many tokens, compiled by as many threads as there
    are processors: one after the other they take minutes."""
    if device.type != "cuda":
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [
            pool.submit(launch, matrix, plan)
            for matrix, most in wanted
            for plan in variants(matrix.codec, most)
        ]
        for launched in running:
            launched.result()


def variants(codec: str, most: int) -> list[Plan]:
    """A plan of each kernel that is compiled for up to so many tokens."""
    from tierd_kernels.gpu.plans import TOKEN_BLOCKS, VARIANTS, Plan, token_block, worth

    blocks = [block for block in TOKEN_BLOCKS if block <= token_block(most)]
    return [
        Plan(block, 1, *variant)
        for block in blocks
        for variant in VARIANTS
        if worth(codec, *variant)
    ]


def launch(matrix: TorchMatrix, plan: Plan) -> None:
    """One product, whose result nobody looks at."""
    from tierd_kernels.gpu.linear import linear

    x = torch.zeros((plan.tokens, matrix.cols), dtype=torch.bfloat16, device=matrix.device)
    linear(matrix, x, plan=plan)


def best(found: Crossovers, matrix: TorchMatrix, tokens: int) -> Plan:
    """The plan that a model would take; the fastest fused one where it would expand."""
    from tierd_kernels.gpu.crossover import TOKEN_CLASSES

    chosen = found.choice(matrix, tokens)
    if chosen is not None:
        return chosen
    times = found.table(matrix)[next(most for most in TOKEN_CLASSES if tokens <= most)]
    return min((plan for plan in times if plan is not None), key=times.__getitem__)
