"""Which variant of the fused product is best for which number of tokens, and where does it end?

What a model measures when it meets a kind of matrix for the first time: every plan and every class
of tokens, against expanding and cuBLAS. Written as a table to build/bench/gpu_variants.md; the
times of all plans stay in the user's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools import gpu_plans
from tierd_tools.gpu_acceptance.promises import VARIANTS
from tierd_tools.gpu_matrices import dense_weights, kernel_ground, packed_there

if TYPE_CHECKING:
    from tierd_tools.benchmark import Row

TABLE = Path("build/bench/gpu_variants.md")
CODECS = ("raw", "exponent-packed", "int8", "int4")
SPARSITY = 0.5
HEADING = (
    "| matrix | tokens | best plan | us | expand + cuBLAS, us | taken |",
    "|---|---|---|---|---|---|",
)


def run() -> list[Row]:
    here = kernel_ground()
    promises = iter(VARIANTS)
    if here.problem:
        return [promise.not_run(here.problem) for promise in promises]
    from tierd_kernels.gpu.crossover import TOKEN_CLASSES, decide

    crossovers = gpu_plans.crossovers(here)
    lines = [*HEADING]
    rows: list[Row] = []
    for shape in here.shapes:
        dense = dense_weights(here, shape, SPARSITY)
        matrices = {codec: packed_there(here, dense, codec) for codec in CODECS}
        gpu_plans.compile_ahead(
            [(matrix, TOKEN_CLASSES[-1]) for matrix in matrices.values()], here.device
        )
        for codec, matrix in matrices.items():
            table = crossovers.table(matrix)
            chosen = decide(table)
            lines += table_lines(f"{codec} {shape[0]}x{shape[1]}", table, chosen)
            fused = [tokens for tokens, plan in chosen.items() if plan is not None]
            rows.append(next(promises).measured(max(fused, default=0), TOKEN_CLASSES[-1], here.but))
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")
    return rows


def table_lines(name: str, table: dict[int, dict[Any, float]], chosen: dict[int, Any]) -> list[str]:
    """A line for each class of tokens: the fastest plan, and which way a model takes."""
    lines = []
    for tokens, times in table.items():
        fused = {plan: seconds for plan, seconds in times.items() if plan is not None}
        best = min(fused, key=fused.__getitem__)
        taken = "expand" if chosen[tokens] is None else plan_text(chosen[tokens])
        lines.append(
            f"| {name} | {tokens} | {plan_text(best)} | {fused[best] * 1e6:.1f} | "
            f"{times[None] * 1e6:.1f} | {taken} |"
        )
    return lines


def plan_text(plan: Any) -> str:
    return (
        f"{plan.variant}, {plan.splits} splits, {plan.warps} warps, {plan.stages} stages, "
        f"{plan.tokens} tokens a program"
    )
