"""How long does one layer take from the SSD to the GPU, when both stages are equally fast?

Each block is copied as soon as it was read and verified. So it should take one stage and the copy
of the last block, not the sum of both. Nothing is read ahead: the client has no plan, and each
layer is asked for when neither DRAM nor the GPU has it.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import tierd_client
from tierd_layouts.records import BLOCK_BYTES
from tierd_tools import random_pack
from tierd_tools.benchmark import Row
from tierd_tools.diagnostics import ask
from tierd_tools.serving import serve

WORK = Path("build/bench/tiers")
TIER = "gpu:0"
LAYERS, LAYER_BYTES = 9, 32 << 20
BYTES_PER_S = 200_000_000
STAGE_AND_BLOCK = 1.15


def run() -> list[Row]:
    pack = WORK / "packs" / f"{LAYERS}-large-layers"
    random_pack.write(pack, LAYERS, LAYER_BYTES)
    return [row(pack, WORK / "log")]


def row(pack: Path, log: Path) -> Row:
    seconds = statistics.median(_latencies(pack, log))
    stage_s, block_s = LAYER_BYTES / BYTES_PER_S, BLOCK_BYTES / BYTES_PER_S
    return Row(
        f"one layer of {LAYER_BYTES >> 20} MiB from the SSD to the GPU, stages of {stage_s:.3f} s "
        f"each ({2 * stage_s:.3f} s in turn); against one stage and one block",
        seconds, stage_s + block_s, "s", at_most=STAGE_AND_BLOCK,
    )  # fmt: skip


def _latencies(pack: Path, log: Path) -> list[float]:
    """Of every layer but the first, which waits for what a daemon does once."""
    flags = [
        *("--pack", str(pack), "--dram", str(3 * LAYER_BYTES)),
        *("--gpu", f"0={2 * LAYER_BYTES}", "--gpu-device", "memfd"),
        *("--ssd-bandwidth", str(BYTES_PER_S), "--gpu-copy-bandwidth", str(BYTES_PER_S)),
    ]
    seconds = []
    with (
        serve(flags, log) as daemon,
        tierd_client.Client(daemon.socket, name="bench", tier=TIER) as client,
    ):
        opened = client.open(pack.name)
        for layer in range(LAYERS):
            begin = time.perf_counter()
            opened.acquire(layer).release()
            seconds.append(time.perf_counter() - begin)
            _wait_idle(daemon.socket)
    return seconds[1:]


def _wait_idle(socket: str) -> None:
    """Until nothing is read or copied, and the limit of the SSD has a block to give."""
    while any(
        tier["in_flight_bytes"]
        for status in [ask(socket, "status")]
        for tier in (status["dram"], *status["gpus"])
    ):
        time.sleep(0.005)
    time.sleep(BLOCK_BYTES / BYTES_PER_S)
