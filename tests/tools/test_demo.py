"""What makes `make demo` fail."""

from __future__ import annotations

from typing import Any

import pytest

from tierd_tools.demo.__main__ import broken_promises


def row(name: str, compute: str, *, equal: bool = True, peak: int | None = 100) -> dict[str, Any]:
    return {"name": name, "compute": compute, "tokens_equal": equal, "dram_peak_bytes": peak}


def result(*rows: dict[str, Any], throttled: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"dram_budget_bytes": 100, "rows": list(rows), "throttled": throttled}


@pytest.mark.parametrize("throttled", [None, {"rows": [row("tierd-1", "fused")]}])
def test_rows_within_the_budget_and_with_the_same_tokens_are_fine(
    throttled: dict[str, Any] | None,
) -> None:
    rows = (row("accelerate", "dense", peak=None), row("tierd-1", "dense"))
    assert broken_promises(result(*rows, throttled=throttled)) == []


def test_other_tokens_of_a_dense_row_are_named_and_of_a_fused_one_only_reported() -> None:
    (text,) = broken_promises(
        result(row("tierd-1", "dense", equal=False), row("tierd-1", "fused", equal=False))
    )
    assert text.startswith("tierd-1 dense")


def test_a_peak_above_the_budget_is_named_in_every_row() -> None:
    rows = result(
        row("tierd-2", "fused", peak=101), throttled={"rows": [row("tierd-1", "fused", peak=102)]}
    )
    first, second = broken_promises(rows)
    assert "101" in first
    assert "102" in second
