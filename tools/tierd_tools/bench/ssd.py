"""Do the daemon's readers, which verify every block, read as fast as fio?

Both sides read one file sequentially with O_DIRECT, blocks of 4 MiB and the same number of threads:
fio into its own buffers, the readers into an arena of the daemon, with xxh3 of every block.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from tierd.io.arena import Arena
from tierd.io.ssd import ReaderPool
from tierd.io.ssd_job import ExtentRead, ReadJob
from tierd_layouts.records import BLOCK_BYTES
from tierd_tools.benchmark import Row

if TYPE_CHECKING:
    from tierd.errors import ReadError
    from tierd.io.ssd_job import ReadResult

FILE = Path("build/bench/ssd/data")
FILE_BYTES = 1 << 30
LAYER_BYTES = 64 << 20
READERS = 4
ROUNDS = 5


def run() -> list[Row]:
    hashes = _write_file()
    arena = Arena.create(0, FILE_BYTES, "bench-ssd")
    try:
        arena.populate_step(0, FILE_BYTES)
        rates: dict[str, list[float]] = {"readers": [], "fio": []}
        cpu_ms_per_gb = []
        for _ in range(ROUNDS):
            before = time.process_time()
            rates["readers"].append(FILE_BYTES / asyncio.run(_read(arena, hashes)))
            cpu_ms_per_gb.append((time.process_time() - before) * 1e3 / (FILE_BYTES / 1e9))
            if shutil.which("fio"):
                rates["fio"].append(_fio())
        pages = arena.pages.text
    finally:
        arena.close()
    ours = statistics.median(rates["readers"]) / 1e6
    theirs = statistics.median(rates["fio"]) / 1e6 if rates["fio"] else None
    return [
        Row(
            f"sequential read, 4 MiB blocks, {READERS} threads, {pages}, against fio",
            ours,
            theirs,
            "MB/s",
            not_applicable=None if theirs else "fio is not installed",
        ),
        Row("daemon CPU, every block verified", statistics.median(cpu_ms_per_gb), None, "ms/GB"),
    ]


def _write_file() -> list[int]:
    """A file of random blocks and the hash of each."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(BLOCK_BYTES)
    with FILE.open("wb") as file:
        for number in range(FILE_BYTES // BLOCK_BYTES):
            file.write(block[number:] + block[:number])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return [
        xxhash.xxh3_64_intdigest(block[number:] + block[:number])
        for number in range(FILE_BYTES // BLOCK_BYTES)
    ]


async def _read(arena: Arena, hashes: list[int]) -> float:
    """Seconds for the whole file as layers of 64 MiB, two in flight as in the daemon."""
    pool = ReaderPool(READERS)
    fd = os.open(FILE, os.O_RDONLY | os.O_DIRECT)
    done: asyncio.Queue[ReadResult | ReadError] = asyncio.Queue()
    try:
        begin = time.perf_counter()
        waiting = 0
        for offset in range(0, FILE_BYTES, LAYER_BYTES):
            first = offset // BLOCK_BYTES
            extent = ExtentRead(
                fd=fd,
                file=FILE.name,
                offset=offset,
                nbytes=LAYER_BYTES,
                xxh3=tuple(hashes[first : first + LAYER_BYTES // BLOCK_BYTES]),
            )
            target = arena.buffer(offset, LAYER_BYTES)
            pool.submit(ReadJob("bench", str(offset), (extent,), target), done.put_nowait)
            waiting += 1
            while waiting >= 2:
                _raise(await done.get())
                waiting -= 1
        for _ in range(waiting):
            _raise(await done.get())
        return time.perf_counter() - begin
    finally:
        pool.close()
        os.close(fd)


def _raise(outcome: ReadResult | ReadError) -> None:
    if isinstance(outcome, Exception):
        raise outcome


def _fio() -> float:
    """Bytes per second of fio with as many threads, each on its part of the file."""
    part = FILE_BYTES // READERS
    argv = ["fio", "--name=read", f"--filename={FILE}", "--rw=read", "--direct=1", "--bs=4M"]
    argv += ["--ioengine=psync", "--thread", f"--numjobs={READERS}", f"--size={part}"]
    argv += [f"--offset_increment={part}", "--group_reporting", "--output-format=json"]
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out[out.index("{") :])["jobs"][0]["read"]["bw_bytes"])
