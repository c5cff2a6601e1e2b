"""The demo's table and its JSON file."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_tools.demo.rows import Row, Setting

MIB = 1 << 20


def as_json(setting: Setting, rows: list[Row], throttled: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "cap_bytes": setting.cap_bytes,
        "cap_enforced": setting.cap_enforced,
        "dense_bytes": setting.dense_bytes,
        "pack_bytes": setting.pack_bytes,
        "largest_layer_bytes": setting.largest_layer_bytes,
        "dram_budget_bytes": setting.dram_budget_bytes,
        "threads": setting.threads,
        "new_tokens": setting.new_tokens,
        "rows": [dataclasses.asdict(row) for row in rows],
        "throttled": throttled,
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _mib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / MIB:,.0f}"


def print_table(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    for heading in (
        *("row", "compute", "clients", "s/token", "tokens/s", "SSD MiB/token", "stall"),
        *("DRAM peak MiB", "peak MiB", "page cache MiB", "bound by", "tokens equal"),
    ):
        right = heading not in ("row", "compute", "bound by", "tokens equal")
        table.add_column(heading, justify="right" if right else "left")
    for row in rows:
        equal = "yes" if row.tokens_equal else f"differs at {row.first_difference}"
        if row.reference_gap is not None:
            equal += f" (gap {row.reference_gap:.3g})"
        table.add_row(
            row.name,
            row.compute,
            str(row.clients),
            f"{row.seconds_per_token:.3f}",
            f"{row.tokens_per_second:.2f}",
            _mib(row.ssd_bytes_per_token),
            "-" if row.stall_share is None else f"{row.stall_share:.0%}",
            _mib(row.dram_peak_bytes),
            _mib(row.peak_memory_bytes),
            _mib(row.page_cache_bytes),
            row.binding_stage,
            equal,
        )
    # A log has no width of its own; the table needs about this much.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150)
    console.print(table)
