"""Do a real daemon's reads keep the device busy, and at what cost to the machine?

One client of a real daemon runs through a model larger than the budget. Beside it fio reads one of
the model's shards sequentially with O_DIRECT: same chunk size, same number of chunks in flight,
into memory of the same pages as the daemon's. Both take turns; medians count.

The layers have 128 MiB: between the decoder layers of a 3B model and an 8B model, 50 % pruned and
lossless.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

import tierd_client
from tierd.io.arena import Arena
from tierd.io.pages import choose_pages
from tierd_layouts.records import BLOCK_BYTES
from tierd_tools import fio, random_pack
from tierd_tools.benchmark import Row
from tierd_tools.diagnostics import ask
from tierd_tools.serving import Serving, serve

if TYPE_CHECKING:
    from tierd_client.opened import OpenedModel

WORK = Path("build/bench/scheduler")
LAYERS, LAYER_BYTES = 12, 128 << 20
BUDGET_LAYERS = 5
READERS, CHUNK_BYTES = 4, 16 << 20
ROUNDS = 7
#: One step of a client that computes, in times of what reading a layer takes.
COMPUTE_PER_READ = 2.0
COMPUTE_PASSES = 5
IDLE_SECONDS = 5.0
SSD_SHARE, STALL_SHARE, CPU_MS_PER_GB, IDLE_SHARE = 0.95, 0.03, 50.0, 0.01


@dataclass(slots=True)
class Reading:
    """Rounds of a client that does nothing but ask, and of fio in between."""

    rates: list[float] = field(default_factory=list)  #: bytes per second from the SSD
    cpu_ms_per_gb: list[float] = field(default_factory=list)
    xxh3_ms_per_gb: list[float] = field(default_factory=list)
    fio_rates: list[float] = field(default_factory=list)


def run() -> list[Row]:
    pack = WORK / "packs" / f"{LAYERS}-layers"
    random_pack.write(pack, LAYERS, LAYER_BYTES)
    flags = ["--pack", str(pack), "--dram", str(BUDGET_LAYERS * LAYER_BYTES)]
    # Given, not chosen by the daemon: a row that is about the readers, not about the choice.
    flags += ["--readers", str(READERS), "--read-chunk", str(CHUNK_BYTES)]
    with (
        serve(flags, WORK / "log") as daemon,
        tierd_client.Client(daemon.socket, name="bench") as client,
    ):
        pages = _wait_for_population(daemon)
        idle = _idle_share(daemon)
        opened = client.open(pack.name)
        opened.plan(range(LAYERS))
        _walk(opened, LAYERS)
        reading = _read(daemon, opened, pack)
        layer_seconds = LAYER_BYTES / statistics.median(reading.rates)
        stall = _stall_share(opened, COMPUTE_PER_READ * layer_seconds)
    ours = statistics.median(reading.rates) / 1e6
    theirs = statistics.median(reading.fio_rates) / 1e6 if reading.fio_rates else None
    chunks = f"{CHUNK_BYTES >> 20} MiB chunks, {READERS} in flight, {pages}"
    cpu = statistics.median(reading.cpu_ms_per_gb)
    small = "4 KiB" in pages
    return [
        Row(
            f"one client bound by the SSD: {chunks}; against fio", ours, theirs, "MB/s",
            at_least=SSD_SHARE, not_applicable=None if theirs else "fio is not installed",
        ),
        Row(
            f"stall of a client that computes {COMPUTE_PER_READ:g} times as long as a layer takes "
            f"to read, after the first pass, {pages}; against the bound",
            100 * stall, 100 * STALL_SHARE, "%", at_most=1.0,
        ),
        Row(
            f"daemon CPU per GB read, all of it verified, {pages}; against the bound",
            cpu, CPU_MS_PER_GB, "ms/GB", at_most=1.0,
            not_applicable="the bound is for 2 MiB pages" if small else None,
        ),
        Row(
            f"daemon CPU per GB read, {pages}; against xxh3 alone at the same time",
            cpu, statistics.median(reading.xxh3_ms_per_gb), "ms/GB",
        ),
        Row(
            "daemon CPU while one client is connected and asks nothing; against the bound",
            100 * idle, 100 * IDLE_SHARE, "% of a core", at_most=1.0,
        ),
    ]  # fmt: skip


def _read(daemon: Serving, opened: OpenedModel, pack: Path) -> Reading:
    reading = Reading()
    shard = next(pack.glob("*.safetensors"))
    pages = choose_pages(READERS * CHUNK_BYTES)
    memory = Arena.create(0, 4 * READERS * CHUNK_BYTES, "bench-fio", pages=pages)
    try:
        memory.populate_step(0, memory.span_bytes)
        for _ in range(ROUNDS):
            read, cpu, begin = _read_bytes(daemon), cpu_seconds(daemon.pid), time.monotonic()
            _walk(opened, LAYERS)
            seconds = time.monotonic() - begin
            cpu, read = cpu_seconds(daemon.pid) - cpu, _read_bytes(daemon) - read
            reading.rates.append(read / seconds)
            reading.cpu_ms_per_gb.append(cpu * 1e3 / (read / 1e9))
            reading.xxh3_ms_per_gb.append(_xxh3_ms_per_gb(memory))
            if shutil.which("fio"):
                reading.fio_rates.append(
                    fio.read_rate(
                        shard, CHUNK_BYTES, READERS, f"/proc/{os.getpid()}/fd/{memory.fd}"
                    )
                )
    finally:
        memory.close()
    return reading


def _xxh3_ms_per_gb(memory: Arena) -> float:
    """CPU of one thread that hashes memory once, block after block, more than a cache holds."""
    begin = time.thread_time()
    for offset in range(0, memory.span_bytes, BLOCK_BYTES):
        xxhash.xxh3_64_intdigest(memory.buffer(offset, BLOCK_BYTES))
    return (time.thread_time() - begin) * 1e3 / (memory.span_bytes / 1e9)


def _walk(opened: OpenedModel, layers: int, seconds: float = 0.0) -> float:
    """Take and give back one layer after the other, resting for `seconds` with each. Returns the
    seconds that were waited for them."""
    waited = 0.0
    for number in range(layers):
        begin = time.perf_counter()
        lease = opened.acquire(number % LAYERS)
        waited += time.perf_counter() - begin
        if seconds:
            time.sleep(seconds)
        lease.release()
    return waited


def _stall_share(opened: OpenedModel, step_seconds: float) -> float:
    """Of the time of a pass of a client that computes longer than its reads take, after the first
    pass."""
    _walk(opened, LAYERS, step_seconds)
    shares = []
    for _ in range(COMPUTE_PASSES):
        begin = time.perf_counter()
        waited = _walk(opened, LAYERS, step_seconds)
        shares.append(waited / (time.perf_counter() - begin))
    return statistics.median(shares)


def _idle_share(daemon: Serving) -> float:
    before = cpu_seconds(daemon.pid)
    time.sleep(IDLE_SECONDS)
    return (cpu_seconds(daemon.pid) - before) / IDLE_SECONDS


def _wait_for_population(daemon: Serving) -> str:
    """Returns the pages that the daemon got. It ends as soon as its memory exists."""
    while True:
        dram = ask(daemon.socket, "status")["dram"]
        if dram["populated_bytes"] >= dram["budget_bytes"]:
            return str(dram["pages"])
        time.sleep(0.05)


def _read_bytes(daemon: Serving) -> int:
    return int(ask(daemon.socket, "status")["ssd"]["read_bytes"])


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far, to the nanosecond.

    The clock's number is that of clock_getcpuclockid(3): the inverted pid and CPUCLOCK_SCHED.
    """
    return time.clock_gettime((~pid << 3) | 2)
