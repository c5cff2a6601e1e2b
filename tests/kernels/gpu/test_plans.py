"""Every plan that can be chosen cuts a matrix into parts that are there; there are few of them."""

from __future__ import annotations

import pytest

from tierd_kernels.gpu.plans import (
    MOST_SPLITS,
    MOST_TOKENS,
    TOKEN_BLOCKS,
    VARIANTS,
    candidates,
    default_plan,
    token_block,
)
from tierd_layouts.tile_grid import TileGrid

SHAPES = [(1, 1), (64, 64), (70, 300), (8192, 8192), (28672, 8192), (128256, 4096), (64, 2**20)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_split_is_empty_and_no_plan_is_there_twice(shape: tuple[int, int]) -> None:
    grid = TileGrid(*shape)
    for tokens in (1, 16, 17, 64):
        plans = candidates(grid, "raw", tokens)
        assert len(set(plans)) == len(plans) <= 3 * len(VARIANTS)
        for plan in [*plans, default_plan(grid, tokens)]:
            assert 1 <= plan.splits <= min(grid.tile_cols, MOST_SPLITS)
            assert plan.tokens >= tokens or plan.tokens == max(TOKEN_BLOCKS)
            assert (plan.warps, plan.stages, plan.variant) in VARIANTS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_default_is_one_of_the_candidates(shape: tuple[int, int]) -> None:
    grid = TileGrid(*shape)
    for tokens in (1, 20, 64):
        assert default_plan(grid, tokens, 108) in candidates(grid, "int8", tokens, 108)


def test_all_numbers_of_tokens_have_the_same_orders_to_choose_from() -> None:
    grid = TileGrid(8192, 8192)
    orders = [
        {plan.order for plan in candidates(grid, "raw", n)} for n in range(1, MOST_TOKENS + 1)
    ]
    assert all(found == orders[0] for found in orders)


def test_every_multiprocessor_has_programs_and_none_has_one_more_than_fit() -> None:
    for rows in (4096, 8192, 28672):
        plan = default_plan(TileGrid(rows, 8192), 1, processors=132)
        assert 4 * 132 <= rows // 64 * plan.splits <= 7 * 132


def test_tokens_are_blocked_by_what_tensor_cores_take() -> None:
    assert [token_block(n) for n in (1, 16, 17, 32, 33, 64)] == [16, 16, 32, 32, 64, 64]
