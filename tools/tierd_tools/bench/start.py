"""How soon does the daemon answer after its start, and how much memory does it need for itself?

The budget does not matter: its memory is populated in the background.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tierd_tools import random_model
from tierd_tools.benchmark import Row
from tierd_tools.diagnostics import ask
from tierd_tools.serving import serve

PACK = Path("build/bench/start/tiny")
READY_SECONDS, OWN_BYTES = 0.5, 80e6
ROUNDS = 7


def run() -> list[Row]:
    random_model.write_pack(PACK, random_model.TINY)
    seconds, own_bytes = [], []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        with serve(["--pack", str(PACK), "--dram", "4GiB"], PACK.parent / "log") as daemon:
            seconds.append(time.perf_counter() - begin)
            own_bytes.append(ask(daemon.socket, "status")["daemon"]["rss_bytes"])
    return [
        Row(
            "from exec to the first answer, 4 GiB budget, against the bound",
            statistics.median(seconds),
            READY_SECONDS,
            "s",
            at_most=1.0,
        ),
        Row(
            "memory of its own beside the arena, against the bound",
            statistics.median(own_bytes) / 1e6,
            OWN_BYTES / 1e6,
            "MB",
            at_most=1.0,
        ),
    ]
