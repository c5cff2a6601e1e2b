"""The comparison as a table, with the settings that everybody had."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tierd_tools.demo.memory_cap import CapUnavailable
from tierd_tools.demo.read_limit import disk_of
from tierd_tools.peers import comparison

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tierd_tools.demo.rows import Row, Setting

MIB = 1 << 20
_HEADINGS = (
    *("system", "s/token", "runs", "SSD MiB/token", "MB/s", "stall"),
    *("peak MiB", "page cache MiB", "tokens as in memory"),
)


def print_rows(runs: Mapping[str, Sequence[Row]], title: str) -> None:
    """One line a system: the run in the middle, and the seconds per token of all runs."""
    table = Table(title=title)
    for heading in _HEADINGS:
        left = heading in ("system", "tokens as in memory")
        table.add_column(heading, justify="left" if left else "right")
    for name, repeats in runs.items():
        table.add_row(name, *_cells(comparison.middle(repeats), repeats))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150).print(table)


def _cells(row: Row, repeats: Sequence[Row]) -> tuple[str, ...]:
    ssd = row.ssd_bytes_per_token
    equal = "yes" if row.tokens_equal else f"differ at {row.first_difference}"
    if row.reference_gap is not None:
        equal += f" (gap {row.reference_gap:.3g})"
    return (
        f"{row.seconds_per_token:.3f}",
        " ".join(f"{run.seconds_per_token:.3f}" for run in repeats),
        "-" if ssd is None else f"{ssd / MIB:,.0f}",
        "-" if ssd is None else f"{ssd / row.seconds_per_token / 1e6:,.0f}",
        "-" if row.stall_share is None else f"{row.stall_share:.0%}",
        "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / MIB:,.0f}",
        "-" if row.page_cache_bytes is None else f"{row.page_cache_bytes / MIB:,.0f}",
        equal,
    )


def print_settings(setting: Setting, runtime_bytes: int) -> None:
    """What everybody had, and what each peer was given beyond it."""
    budget = f"{setting.dram_budget_bytes / MIB:,.0f} MiB"
    environment = " ".join(f"{k}={v}" for k, v in comparison.ACCELERATE_ENVIRONMENT.items())
    print(
        f"model {setting.dense_bytes / MIB:,.0f} MiB in bf16, half of it zeros; cap "
        f"{setting.cap_bytes / MIB:,.0f} + {runtime_bytes / MIB:,.0f} MiB for runtimes; "
        f"{setting.threads} threads, {setting.prompt_tokens} prompt tokens, "
        f"{setting.new_tokens - 1} timed; read-ahead of the disk {_read_ahead(setting.work_dir)}\n"
        f"  Accelerate: {budget} for whole layers, one file a layer, {environment}\n"
        f"  transformers: {budget} for whole layers, the rest mapped from the checkpoint\n"
        "  llama.cpp: BF16 GGUF mapped, not locked; all of the cap is its page cache\n"
        f"  tierd: DRAM {budget}",
        flush=True,
    )


def _read_ahead(path: Path) -> str:
    try:
        disk = disk_of(path)
    except CapUnavailable as reason:
        return f"unknown ({reason})"
    file = Path("/sys/dev/block") / disk / "queue" / "read_ahead_kb"
    return f"{int(file.read_text())} KiB"
