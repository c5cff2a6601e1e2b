"""`make demo`: write or take a model, prune and pack it, and compare under one memory cap.

Exit code 1 when a `compute="dense"` row generates other tokens than the in-memory pruned model, or
when a daemon held more than its DRAM budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from tierd_layouts import container
from tierd_layouts.errors import FormatError
from tierd_tools import pack, progress, random_model, unpack
from tierd_tools.demo import report, rows
from tierd_tools.demo.memory_cap import CapUnavailable, MemoryCap
from tierd_tools.demo.model_processes import WorkerFailed
from tierd_tools.errors import ToolError

SIZES = {"full": random_model.FULL, "small": random_model.SMALL}
#: Reading takes this many times the compute of one client in the throttled rows.
THROTTLE = 2.2


def prepare(arguments: argparse.Namespace) -> rows.Setting:
    """The dense model, its pack at 50 %, and the pruned model as an ordinary checkpoint."""
    work_dir = arguments.work_dir / arguments.size
    work_dir.mkdir(parents=True, exist_ok=True)
    if arguments.model is None:
        model_dir = work_dir / "random-llama"
        print(f"writing a random Llama to {model_dir}", flush=True)
        random_model.write(model_dir, SIZES[arguments.size])
    else:
        model_dir = arguments.model.resolve()
    # A folder may have any name, a model that is served may not.
    name = re.sub(r"[^A-Za-z0-9]+", "-", model_dir.name).strip("-")[:80] or "model"
    pack_dir = work_dir / f"{name}-50"
    pruned_dir = work_dir / f"{name}-50-unpacked"
    watch = progress.for_stream(sys.stderr)
    pack.pack(model_dir, pack_dir, prune="magnitude", sparsity=0.5, progress=watch)
    shutil.rmtree(pruned_dir, ignore_errors=True)
    unpack.unpack(pack_dir, pruned_dir, progress=watch)
    index = container.open_pack(pack_dir)
    return rows.Setting(
        pruned_dir=pruned_dir,
        pack_dir=pack_dir,
        work_dir=work_dir,
        dense_bytes=index.dense_bytes,
        pack_bytes=index.pack_bytes,
        largest_layer_bytes=max(
            layer.nbytes for layer in index.layers if layer.name.rpartition(".")[2].isdigit()
        ),
        dram_budget_bytes=index.pack_bytes // 2,
        threads=len(os.sched_getaffinity(0)),
        prompt_tokens=32,
        new_tokens=16,
        cap_enforced=cap_works(),
    )


def cap_works() -> bool:
    try:
        with MemoryCap("tierd-demo-probe", 64 << 20):
            return True
    except CapUnavailable as reason:
        print(f"no memory cap can be set, so no ratio is claimed: {reason}")
        return False


def compare(
    setting: rows.Setting, with_throttled: bool
) -> tuple[list[rows.Row], dict[str, Any] | None]:
    """All rows; then, if wanted, one and two clients again with the SSD throttled."""
    reference = rows.run_memory(setting)
    table = [rows.run_accelerate(setting, reference)]
    report_row(table[-1])
    for clients in (1, 2):
        for compute in ("dense", "fused"):
            table.append(rows.run_tierd(setting, clients, compute, reference))
            report_row(table[-1])
    return table, throttled(setting, table, reference) if with_throttled else None


def throttled(
    setting: rows.Setting, table: list[rows.Row], reference: tuple[list[int], list[float]]
) -> dict[str, Any]:
    """One client against two when reading takes 2.2 times the compute of one."""
    alone = next(row for row in table if row.name == "tierd-1" and row.compute == "fused")
    assert alone.stall_share is not None
    compute_seconds = alone.seconds_per_token * (1 - alone.stall_share)
    read_bytes = alone.ssd_bytes_per_token or setting.pack_bytes - setting.dram_budget_bytes
    bandwidth = int(read_bytes / (THROTTLE * compute_seconds))
    pair = [
        rows.run_tierd(setting, clients, "fused", reference, ssd_bandwidth=bandwidth)
        for clients in (1, 2)
    ]
    report.print_table(pair, f"SSD throttled to {bandwidth / 1e6:.0f} MB/s")
    unthrottled = [row for row in table if row.compute == "fused"]
    return {
        "ssd_bandwidth": bandwidth,
        "rows": [dataclasses.asdict(row) for row in pair],
        "throughput_ratio": pair[1].tokens_per_second / pair[0].tokens_per_second,
        "unthrottled_throughput_ratio": unthrottled[1].tokens_per_second
        / unthrottled[0].tokens_per_second,
    }


def report_row(row: rows.Row) -> None:
    print(f"{row.name} {row.compute}: {row.seconds_per_token:.3f} s/token", flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    setting = prepare(arguments)
    # The small size is a test of the way, within 90 s; its figures mean little.
    table, slow = compare(setting, with_throttled=arguments.size == "full")
    capped = "" if setting.cap_enforced else " (cap NOT enforced)"
    cap = f"{setting.cap_bytes >> 20} MiB + 350 MiB per model process{capped}"
    report.print_table(table, f"cap {cap}, DRAM {setting.dram_budget_bytes >> 20} MiB")
    result = report.as_json(setting, table, slow)
    report.write_json(arguments.json, result)
    accelerate, fused = table[0], next(r for r in table if r.compute == "fused")
    if setting.cap_enforced:
        ratio = accelerate.seconds_per_token / fused.seconds_per_token
        print(f"one tierd client is {ratio:.1f}x as fast per token as Accelerate disk offload")
    if slow is not None and setting.cap_enforced:
        ratio = slow["throughput_ratio"]
        print(f"two clients have {ratio:.2f}x the throughput of one, SSD throttled")
    print(f"written to {arguments.json}")
    return result


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--model", type=Path, help="a local checkpoint instead of a random one")
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo"))
    parser.add_argument("--json", type=Path, default=Path("build/demo.json"))
    return parser


def main() -> int:
    try:
        result = run(parser().parse_args())
    except (ToolError, FormatError, WorkerFailed) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    broken = broken_promises(result)
    for text in broken:
        print(text)
    return 1 if broken else 0


def broken_promises(result: dict[str, Any]) -> list[str]:
    """What no run may show: a budget exceeded, or other tokens from the same bits."""
    budget = result["dram_budget_bytes"]
    throttled = result["throttled"]["rows"] if result["throttled"] else []
    broken = [
        f"{row['name']} {row['compute']}: {row['dram_peak_bytes']} bytes were in DRAM, "
        f"the budget is {budget}"
        for row in [*result["rows"], *throttled]
        if row["dram_peak_bytes"] is not None and row["dram_peak_bytes"] > budget
    ]
    broken += [
        f"{row['name']} dense: the tokens differ from the in-memory model's"
        for row in result["rows"]
        if row["name"] != "accelerate" and row["compute"] == "dense" and not row["tokens_equal"]
    ]
    return broken


if __name__ == "__main__":
    sys.exit(main())
