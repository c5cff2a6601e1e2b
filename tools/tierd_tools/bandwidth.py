"""How fast this machine reads and copies memory: what a memory-bound kernel is held against."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes), default=32 << 20)


def read_bandwidth(threads: int, nbytes: int, *, rounds: int = 5) -> tuple[float, str]:
    """Bytes per second of the fastest of several ways to read `nbytes` once, and its name.

    Each way takes its best of `rounds`: the bound is what the memory can do, not what it usually
    does. Compared with a loop of 64-byte loads in C++ with and without prefetch (33 to 37 GB/s with
    one Zen 5 core, 44 to 48 with two), torch's sum of int64 was as fast.
    """
    memory = torch.ones(nbytes // 8, dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ways: dict[str, Callable[[], object]] = {
            "torch sum of int64": memory.sum,
            "torch max of float32": memory.view(torch.float32).max,
            "numpy or of int64": lambda: _numpy_or(memory.numpy(), threads),
        }
        seconds = {name: _best(way, rounds) for name, way in ways.items()}
    finally:
        torch.set_num_threads(before)
    fastest = min(seconds, key=lambda name: seconds[name])
    return nbytes / seconds[fastest], fastest


def _best(way: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        way()
        times.append(time.perf_counter() - begin)
    return min(times)


def _numpy_or(memory: np.ndarray, threads: int) -> None:
    """Each thread ors its part; numpy releases the GIL for that."""
    parts = np.array_split(memory, threads)
    others = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts[1:]]
    for other in others:
        other.start()
    np.bitwise_or.reduce(parts[0])
    for other in others:
        other.join()
