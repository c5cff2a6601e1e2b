"""The benchmarks of GPU kernels, tried out on small matrices with Triton's interpreter: they
compute what they should, and count for nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tierd_tools import gpu_matrices, gpu_plans
from tierd_tools.bench import gpu_error, gpu_expand, gpu_fused, gpu_layout, gpu_variants
from tierd_tools.gpu_acceptance.promises import FUSED_FORMS
from tierd_tools.gpu_matrices import copies_of, kernel_ground, packed_bytes, packed_there

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_tools.benchmark import Row

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here: no interpreter"
)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIERD_BENCH_DEVICE", "memfd")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_matrices, "SMALL_SHAPES", ((64, 64),))


def measured(rows: list[Row], count: int) -> list[Row]:
    assert len(rows) == count
    assert {row.not_applicable for row in rows} == {gpu_matrices.BY_INTERPRETER}
    assert {row.met for row in rows} == {None}
    assert all(row.ratio is not None for row in rows)
    return rows


def test_expanding_is_measured_in_every_way_there_is() -> None:
    from tierd_kernels.gpu.expand import ways

    for row in measured(gpu_expand.run(), 4):
        assert row.row.count(" warps ") == len(ways(row.row.split()[1]))
        assert "no kernel was compiled" in str(row.binds)


def test_the_row_of_the_fused_product_is_the_worst_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_fused, "TOKENS", (1, 16))
    monkeypatch.setattr(gpu_fused, "FUSED_FORMS", FUSED_FORMS[4:])
    found = iter([(1.0, 3.0, "one"), (2.0, 3.0, "sixteen")] * 2)
    monkeypatch.setattr(gpu_fused, "_measure", lambda *arguments: next(found))
    for row in measured(gpu_fused.run(), 2):
        assert row.ratio == 1.5
        assert row.binds == "sixteen"
        assert "1: 3.00, 16: 1.50" in row.row


def test_the_fused_product_is_measured_with_the_plan_of_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_fused, "TOKENS", (2,))
    monkeypatch.setattr(gpu_fused, "FUSED_FORMS", FUSED_FORMS[:1])
    (row,) = measured(gpu_fused.run(), 1)
    assert str(row.binds).startswith("Plan(tokens=16, ")


@pytest.mark.parametrize("codec", ["raw", "exponent-packed"])
def test_every_variant_that_a_model_may_take_is_compiled_ahead(codec: str) -> None:
    here = kernel_ground()
    matrix = packed_there(here, torch.eye(64, 64, dtype=torch.bfloat16), codec)
    ahead = {replace(plan, splits=1) for plan in gpu_plans.variants(codec, 64)}
    for times in gpu_plans.crossovers(here).table(matrix).values():
        assert {replace(plan, splits=1) for plan in times if plan is not None} <= ahead
    assert {plan.tokens for plan in gpu_plans.variants(codec, 16)} == {16}
    gpu_plans.launch(matrix, gpu_plans.variants(codec, 16)[0])


def test_the_product_is_as_exact_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_error, "SMALL", (64, 128))
    for row in measured(gpu_error.run(), 6):
        assert row.ratio is not None
        assert row.at_most is not None
        assert row.ratio <= row.at_most
        assert row.ours


def test_the_table_of_plans_has_a_line_for_each_class_of_tokens() -> None:
    for row in measured(gpu_variants.run(), 4):
        assert row.ratio == 1.0
    lines = gpu_variants.TABLE.read_text().splitlines()
    assert len(lines) == 2 + 4 * 7
    assert lines[2].startswith("| raw 64x64 | 1 | ")
    assert lines[2].count(" tokens a program |") == 2


def test_orders_are_held_against_that_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """`squares` needs 32 tiles: without it."""
    from tierd_tools import gpu_layout as orders

    monkeypatch.setattr(orders, "ORDERS", ("rows", "columns", "blocks"))
    monkeypatch.setattr(gpu_layout, "SMALL", (128, 64))
    monkeypatch.setattr(gpu_layout, "SPLITS", 1)
    for row in measured(gpu_layout.run(), 2):
        assert "columns" in row.row
        assert "blocks" in row.row


def test_an_order_that_gives_another_matrix_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tierd_tools import gpu_layout as orders

    monkeypatch.setattr(orders, "ORDERS", ("columns",))
    monkeypatch.setattr(orders, "stored_copy", lambda dense, order: dense)
    monkeypatch.setattr(gpu_layout, "SMALL", (128, 128))
    with pytest.raises(RuntimeError, match="columns is not expanded to the matrix"):
        gpu_layout.run()


def test_so_many_copies_are_made_that_a_cache_cannot_hold_them() -> None:
    here = gpu_matrices.KernelGround(None, least_bytes=10_000)
    matrix = packed_there(here, torch.eye(64, 128, dtype=torch.bfloat16), "raw")
    copies = copies_of(here, matrix)
    assert (len(copies) - 1) * packed_bytes(matrix) < 10_000 <= len(copies) * packed_bytes(matrix)
    assert len({copy.values.data_ptr() for copy in copies}) == len(copies)


def test_a_process_that_compiles_cannot_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1 is needed" in str(kernel_ground().problem)
