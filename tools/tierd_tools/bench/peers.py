"""Is tierd 6 times as fast per token as the best of its peers, under one memory cap?

Accelerate's disk offload, transformers' device map with disk, llama.cpp with a mapped file, and
tierd with the codecs that lose nothing; a model four times the cap less the runtimes. All run once,
the fastest again twice; then all once more, slowed by the kernel to the reads of a modest SSD.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_tools.benchmark import Row
from tierd_tools.demo import rows
from tierd_tools.demo.memory_cap import CapUnavailable, MemoryCap
from tierd_tools.demo.model_processes import WorkerFailed
from tierd_tools.demo.read_limit import limited_reads
from tierd_tools.peers import comparison, table
from tierd_tools.peers.comparison import LLAMA, TRANSFORMERS, tierd_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tierd_tools.peers.comparison import Reference

WORK_DIR = Path("build/bench/peers")
DETAILS = Path("build/bench/peers-runs.json")
AT_LEAST = 6.0
ROUNDS = 3
#: What a SATA SSD reads.
SLOW_BYTES_PER_SECOND = 500_000_000
SLOW_NEW_TOKENS = 5
OURS = tierd_name("lossless", "fused")
#: Measured in every round: ours, and who may be the best of the others.
CONTENDERS = (TRANSFORMERS, LLAMA, OURS, tierd_name("lossless", "dense"))

Runs = dict[str, list[rows.Row]]
Failures = dict[str, str]  #: why a peer has no figure


def run() -> list[Row]:
    shutil.rmtree(WORK_DIR, ignore_errors=True)
    try:
        return _run()
    finally:
        shutil.rmtree(WORK_DIR, ignore_errors=True)


def _run() -> list[Row]:
    uncapped = _reason(with_reads=False)
    files = comparison.write_files(WORK_DIR)
    settings = {
        codec: comparison.setting(files, codec, cap_enforced=uncapped is None)
        for codec in files.packs
    }
    table.print_settings(settings["lossless"], rows.RUNTIME_BYTES)
    reference = rows.run_memory(settings["lossless"])
    missing = comparison.llama_missing()
    failed: Failures = {LLAMA: missing} if missing else {}
    fast = measure(comparison.systems(files, settings, reference), failed)
    table.print_rows(fast, "The disk as it is")
    judged = judge(fast, "", AT_LEAST, uncapped or failed.get(LLAMA))
    no_limit = uncapped or _reason(with_reads=True)
    slow: Runs = {}
    if no_limit is None:
        slow = measure(_slow_systems(files, settings, reference), failed, rounds=1)
        table.print_rows(slow, f"Reads of each limited to {SLOW_BYTES_PER_SECOND / 1e6:.0f} MB/s")
        where = f", {SLOW_BYTES_PER_SECOND / 1e6:.0f} MB/s"
        judged += judge(slow, where, None, failed.get(LLAMA))
    else:
        judged.append(_absent("the same with reads limited by the kernel", no_limit))
    _write(fast, slow)
    judged += [_absent(name, reason) for name, reason in failed.items()]
    return [*judged, *promises(fast, slow, settings["lossless"].dram_budget_bytes)]


def measure(
    systems: Mapping[str, Callable[[], rows.Row]], failed: Failures, rounds: int = ROUNDS
) -> Runs:
    """Every system once, then the contenders again, in turns.

    A peer that dies, under the cap most likely, goes to `failed` with what it said and is not run
    again; when tierd does, WorkerFailed is raised.
    """
    runs: Runs = {}
    for number in range(rounds):
        for name, once in systems.items():
            if name in failed or (number and name not in CONTENDERS):
                continue
            try:
                runs.setdefault(name, []).append(_told(once()))
            except WorkerFailed as error:
                if name.startswith("tierd"):
                    raise
                failed[name] = str(error)
                print(f"{name} failed: {error}", flush=True)
    return {name: repeats for name, repeats in runs.items() if repeats}


def _slow_systems(
    files: comparison.Files, settings: dict[str, rows.Setting], reference: Reference
) -> comparison.Systems:
    """All but tierd's other forms, with the same limit on what they read, for fewer tokens."""
    limited = {
        codec: dataclasses.replace(
            setting, read_limit=SLOW_BYTES_PER_SECOND, new_tokens=SLOW_NEW_TOKENS
        )
        for codec, setting in settings.items()
    }
    short = (reference[0][:SLOW_NEW_TOKENS], reference[1][:SLOW_NEW_TOKENS])
    return {
        name: once
        for name, once in comparison.systems(files, limited, short).items()
        if name == OURS or not name.startswith("tierd")
    }


def _told(row: rows.Row) -> rows.Row:
    print(f"{row.name}: {row.seconds_per_token:.3f} s/token", flush=True)
    return row


def judge(runs: Runs, where: str, at_least: float | None, reason: str | None) -> list[Row]:
    """Ours against the best of the others, then against each. reason: why the best is not known."""
    middles = {name: comparison.middle(repeats) for name, repeats in runs.items()}
    others = {name: row for name, row in middles.items() if not name.startswith("tierd")}
    if not others:
        return []  # all of them failed, and have a row each that says why
    best = min(others, key=lambda name: others[name].seconds_per_token)
    judged = [
        Row(
            row=f"{name} against the best of the others ({best}){where}",
            ours=row.seconds_per_token,
            theirs=others[best].seconds_per_token,
            unit="s/token",
            at_least=at_least if name == OURS else None,
            not_applicable=reason,
            invert=True,
        )
        for name, row in middles.items()
        if name not in others
    ]
    judged += [
        Row(
            row=f"{OURS} against {name}{where}",
            ours=middles[OURS].seconds_per_token,
            theirs=row.seconds_per_token,
            unit="s/token",
            invert=True,
        )
        for name, row in others.items()
        if name != best
    ]
    return judged


def promises(fast: Runs, slow: Runs, budget_bytes: int) -> list[Row]:
    """The same tokens from everybody, and never more in DRAM than the budget."""
    every = [row for runs in (fast, slow) for repeats in runs.values() for row in repeats]
    held = [row.dram_peak_bytes for row in every if row.dram_peak_bytes is not None]
    return [
        Row(
            row="runs with the in-memory model's tokens (up to its first near tie), of all runs",
            ours=sum(map(comparison.same_tokens, every)),
            theirs=len(every),
            unit="runs",
            at_least=1.0,
        ),
        Row(
            row="most that a tierd daemon held in DRAM, against its budget",
            ours=max(held),
            theirs=budget_bytes,
            unit="bytes",
            at_most=1.0,
        ),
    ]


def _absent(row: str, reason: str) -> Row:
    return Row(row=row, ours=None, theirs=None, unit="s/token", not_applicable=reason)


def _reason(*, with_reads: bool) -> str | None:
    """Why no cap, or no limit on reads, can be set here; None where it can."""
    try:
        with MemoryCap("tierd-peers-probe", 64 << 20) as group:
            if with_reads:
                with limited_reads(group, WORK_DIR, SLOW_BYTES_PER_SECOND):
                    pass
    except CapUnavailable as reason:
        return str(reason)
    return None


def _write(fast: Runs, slow: Runs) -> None:
    plain = {
        where: {name: [dataclasses.asdict(row) for row in rows] for name, rows in runs.items()}
        for where, runs in (("fast", fast), ("slow", slow))
    }
    DETAILS.parent.mkdir(parents=True, exist_ok=True)
    DETAILS.write_text(json.dumps(plain, indent=1) + "\n")
