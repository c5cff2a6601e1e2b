"""A day that was run again is read as it was: shares are shares, and waste is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_tools import record_tables

if TYPE_CHECKING:
    import pytest

ROW = {
    "policy": "next-use", "budget_bytes": 4 << 20, "bandwidth": 1 << 30, "uses": 4, "in_time": 3,
    "asked_bytes": 8 << 20, "read_bytes": 6 << 20, "stall_ns": 10**6, "compute_ns": 10**7,
    "elapsed_ns": 10**8, "refused": (), "hit_ratio": 0.25,
}  # fmt: skip


def lines(row: dict[str, object], capsys: pytest.CaptureFixture[str]) -> list[str]:
    record_tables.replay({"trace": "t", "events": 9, "seconds": 1.0, "rows": [row]})
    return capsys.readouterr().out.splitlines()


def test_a_row_says_what_was_there_and_what_was_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(ROW, capsys)[2].split()[:6] == ["next-use", "4.0", "MiB", "25.0%", "6.0", "MiB"]


def test_more_reads_than_uses_are_no_negative_share(capsys: pytest.CaptureFixture[str]) -> None:
    """What was read ahead, and went before anybody used it, was read in vain."""
    printed = lines(ROW | {"read_bytes": 10 << 20, "hit_ratio": -0.25}, capsys)
    assert "0.0%" in printed[2].split()
    assert printed[3] == (
        "next-use at 4.0 MiB read 10.0 MiB for the 8.0 MiB that were asked for: some went before "
        "they were used"
    )
