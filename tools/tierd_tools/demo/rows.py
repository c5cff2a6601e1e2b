"""Rows of the comparison: each runs its processes inside one memory cap and is measured there."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tierd_tools.demo import ssd_counter
from tierd_tools.demo.memory_cap import MemoryCap, Peak
from tierd_tools.demo.model_processes import run_workers
from tierd_tools.demo.read_limit import limited_reads
from tierd_tools.diagnostics import ask
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
#: What torch and transformers take in a process before any weight, granted to each model process.
RUNTIME_BYTES = 350 * MIB
#: Share of the time; what clients wait below it is the round trips and the jitter of the reads.
BOUND_STALL = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for every row."""

    pruned_dir: Path  #: the pruned model as an ordinary checkpoint
    pack_dir: Path
    work_dir: Path
    dense_bytes: int
    pack_bytes: int
    largest_layer_bytes: int  #: of the decoder layers, compressed
    dram_budget_bytes: int
    threads: int
    prompt_tokens: int
    new_tokens: int
    cap_enforced: bool
    cap_divisor: int = 2  #: the dense model is this many times the cap less the runtimes
    read_limit: int | None = None  #: bytes per second that the kernel lets a row read

    @property
    def cap_bytes(self) -> int:
        return self.dense_bytes // self.cap_divisor


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Times are of steady state: every token but the first."""

    name: str
    clients: int
    compute: str
    threads_per_client: int
    cap_bytes: int
    seconds_per_token: float  #: median over the tokens of all clients
    tokens_per_second: float  #: of all clients together
    ssd_bytes_per_token: int | None  #: what the device read, over the tokens of all clients
    stall_share: float | None  #: of the time, what clients waited for layers
    peak_memory_bytes: int | None
    page_cache_bytes: int | None
    binding_stage: str
    tokens_equal: bool
    dram_peak_bytes: int | None = None  #: the daemon's own count, to be held against its budget
    first_difference: int | None = None
    reference_gap: float | None = None
    tokens: list[list[int]] = field(default_factory=list)


def run_memory(setting: Setting) -> tuple[list[int], list[float]]:
    """The reference, outside any cap: tokens of the in-memory pruned model, and at each the
    distance of its two best logits."""
    argv = worker_argv(setting, "memory", setting.threads, "--model", str(setting.pruned_dir))
    (result,) = run_workers([[*argv, "--gaps"]], setting.work_dir / "memory.log")
    return result["tokens"], result["gaps"]


def run_accelerate(
    setting: Setting,
    reference: tuple[list[int], list[float]],
    environment: dict[str, str] | None = None,
) -> Row:
    """Accelerate with the same DRAM budget for whole layers and the rest on disk."""
    return _run_offloading(setting, "accelerate", reference, environment)


def run_transformers(setting: Setting, reference: tuple[list[int], list[float]]) -> Row:
    """transformers' own device map with the same DRAM budget, the rest read from the checkpoint."""
    return _run_offloading(setting, "transformers", reference, None)


def _run_offloading(
    setting: Setting,
    kind: str,
    reference: tuple[list[int], list[float]],
    environment: dict[str, str] | None,
) -> Row:
    offload = setting.work_dir / "offload"
    shutil.rmtree(offload, ignore_errors=True)
    offload.mkdir()
    ssd_counter.drop_from_page_cache(setting.pruned_dir)
    with capped(setting, kind, 1) as group:
        argv = worker_argv(
            setting,
            kind,
            setting.threads,
            *("--model", str(setting.pruned_dir), "--offload", str(offload)),
            *("--dram-bytes", str(setting.dram_budget_bytes)),
        )
        # The offload copies are written inside the cap; what is left of them in the page cache
        # goes before the clock starts.
        results = run_workers(
            [group.command(argv)],
            setting.work_dir / f"{kind}.log",
            before_go=lambda: ssd_counter.drop_from_page_cache(offload),
            environment=environment,
        )
    row = summarise(setting, kind, "dense", group, results, [reference])
    shutil.rmtree(offload)
    return row


def run_tierd(
    setting: Setting,
    clients: int,
    compute: str,
    reference: tuple[list[int], list[float]],
    ssd_bandwidth: int | None = None,
) -> Row:
    """A daemon and `clients` model processes, together inside one cap."""
    ssd_counter.drop_from_page_cache(setting.pack_dir)
    threads = max(1, setting.threads // clients)
    flags = ["--pack", str(setting.pack_dir), "--dram", str(setting.dram_budget_bytes)]
    if ssd_bandwidth is not None:
        flags += ["--ssd-bandwidth", str(ssd_bandwidth)]
    with (
        capped(setting, f"tierd-{clients}", clients) as group,
        serve(flags, setting.work_dir / "tierd.log", group.command) as served,
    ):
        argv = worker_argv(
            setting,
            "tierd",
            threads,
            *("--model", setting.pack_dir.name, "--socket", served.socket),
            *("--compute", compute),
        )
        commands = [group.command(argv) for _ in range(clients)]
        results = run_workers(commands, setting.work_dir / f"tierd-{clients}.log")
        dram_peak_bytes = ask(served.socket, "status")["dram"]["peak_bytes"]
    row = summarise(setting, f"tierd-{clients}", compute, group, results, [reference])
    return replace(row, dram_peak_bytes=dram_peak_bytes)


# --------------------------------------------------------------------------------------------------
# Processes


class Uncapped:
    """Stands in for MemoryCap where no cgroup can be written: caps nothing, claims nothing."""

    limit_bytes = 0

    def command(self, argv: list[str]) -> list[str]:
        return argv

    def peak(self) -> Peak | None:
        return None


@contextlib.contextmanager
def capped(setting: Setting, name: str, clients: int) -> Iterator[MemoryCap | Uncapped]:
    if not setting.cap_enforced:
        yield Uncapped()
        return
    limit_bytes = setting.cap_bytes + clients * RUNTIME_BYTES
    with (
        MemoryCap(f"tierd-demo-{name}", limit_bytes) as group,
        limited_reads(group, setting.work_dir, setting.read_limit)
        if setting.read_limit is not None
        else contextlib.nullcontext(),
    ):
        yield group


def worker_argv(setting: Setting, kind: str, threads: int, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "tierd_tools.demo.worker", kind, "--threads", str(threads)]
    argv += ["--prompt-tokens", str(setting.prompt_tokens)]
    argv += ["--new-tokens", str(setting.new_tokens)]
    stat = ssd_counter.stat_file(setting.work_dir)
    return [*argv, *(("--stat", str(stat)) if stat else ()), *more]


# --------------------------------------------------------------------------------------------------
# Figures


def summarise(
    setting: Setting,
    name: str,
    compute: str,
    group: MemoryCap | Uncapped,
    results: list[dict[str, Any]],
    references: list[tuple[list[int], list[float]]],
) -> Row:
    """Steady state: from the first new token to the last one, over all clients."""
    gaps = [
        (after - before) / 1e9
        for result in results
        for before, after in zip(result["at_ns"], result["at_ns"][1:], strict=False)
    ]
    begin = min(result["at_ns"][0] for result in results)
    end = max(result["at_ns"][-1] for result in results)
    steady_tokens = sum(len(result["at_ns"]) - 1 for result in results)
    read = max(result["ssd_bytes"][-1] for result in results) - min(
        result["ssd_bytes"][0] for result in results
    )
    has_device = ssd_counter.stat_file(setting.work_dir) is not None
    stall = None
    if all(result["waited_ns"] is not None for result in results):
        passed_ns, waited_ns = (
            sum(result[key][-1] - result[key][0] for result in results)
            for key in ("at_ns", "waited_ns")
        )
        stall = waited_ns / passed_ns
    tokens, reference_gaps = references[0]
    different = [
        position
        for result in results
        for position, (ours, theirs) in enumerate(zip(result["tokens"], tokens, strict=True))
        if ours != theirs
    ]
    first = min(different) if different else None
    peak = group.peak()
    return Row(
        name=name,
        clients=len(results),
        compute=compute,
        threads_per_client=max(1, setting.threads // len(results)),
        cap_bytes=group.limit_bytes,
        seconds_per_token=statistics.median(gaps),
        tokens_per_second=steady_tokens / ((end - begin) / 1e9),
        ssd_bytes_per_token=read // steady_tokens if has_device else None,
        stall_share=stall,
        peak_memory_bytes=peak.memory_bytes if peak else None,
        page_cache_bytes=peak.page_cache_bytes if peak else None,
        binding_stage=binding_stage(stall),
        tokens_equal=first is None,
        first_difference=first,
        reference_gap=reference_gaps[first] if first is not None and reference_gaps else None,
        tokens=[result["tokens"] for result in results],
    )


def binding_stage(stall_share: float | None) -> str:
    """Which stage the row waits for. tierd reads while it computes, so a token takes as long as the
    longer of the two, and clients wait for layers only where that is the reading. Accelerate does
    not overlap its stages: all count in full."""
    if stall_share is None:
        return "ssd + copy + compute, one after the other"
    return "ssd" if stall_share > BOUND_STALL else "compute"
