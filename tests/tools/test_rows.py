"""The figures of the demo's rows, from what its model processes report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tierd_tools.demo.rows import Row, Setting, Uncapped, binding_stage, summarise

if TYPE_CHECKING:
    from pathlib import Path

SECOND = 10**9


def setting(folder: Path) -> Setting:
    return Setting(
        pruned_dir=folder,
        pack_dir=folder,
        work_dir=folder,
        dense_bytes=1000,
        pack_bytes=600,
        largest_layer_bytes=100,
        dram_budget_bytes=300,
        threads=2,
        prompt_tokens=4,
        new_tokens=3,
        cap_enforced=False,
    )


def result(first_s: float, waited_s: float, tokens: list[int]) -> dict[str, Any]:
    """A process whose tokens come a second apart, and which waited long before the first one."""
    return {
        "tokens": tokens,
        "at_ns": [int((first_s + n) * SECOND) for n in range(3)],
        "ssd_bytes": [5000, 5400, 5800],
        "waited_ns": [int((50 + n * waited_s) * SECOND) for n in range(3)],
    }


def summed(folder: Path, *results: dict[str, Any]) -> Row:
    references = [([7, 8, 9], [0.5, 0.25, 0.125])]
    return summarise(setting(folder), "tierd-2", "fused", Uncapped(), list(results), references)


def test_figures_are_of_the_tokens_after_the_first(tmp_path: Path) -> None:
    row = summed(tmp_path, result(10.0, 0.25, [7, 8, 9]))
    assert row.seconds_per_token == 1.0
    assert row.tokens_per_second == 1.0
    assert row.stall_share == 0.25, "what the first token waited for counts"
    assert row.ssd_bytes_per_token in (400, None)
    assert row.tokens_equal


def test_clients_at_once_share_the_time_and_the_bytes(tmp_path: Path) -> None:
    row = summed(tmp_path, result(10.0, 0.5, [7, 8, 9]), result(10.5, 0.0, [7, 8, 9]))
    assert row.tokens_per_second == pytest.approx(4 / 2.5)
    assert row.ssd_bytes_per_token in (200, None)
    assert row.stall_share == 0.25


def test_the_first_other_token_is_shown_with_the_references_gap(tmp_path: Path) -> None:
    row = summed(tmp_path, result(1.0, 0.0, [7, 8, 9]), result(1.0, 0.0, [7, 1, 9]))
    assert not row.tokens_equal
    assert (row.first_difference, row.reference_gap) == (1, 0.25)


def test_who_waits_while_it_could_compute_is_bound_by_the_ssd() -> None:
    assert binding_stage(0.0) == "compute"
    assert binding_stage(0.3) == "ssd"
