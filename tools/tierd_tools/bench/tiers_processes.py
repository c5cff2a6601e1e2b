"""What do two and four processes take of one GPU and of the SSD, against one process?

Each runs through the same model, which the GPU holds.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tierd_tools import random_pack
from tierd_tools.benchmark import Row
from tierd_tools.diagnostics import ask
from tierd_tools.serving import serve

LAYERS, LAYER_BYTES = 24, 8 << 20
SECONDS, COMPUTE_S = 4.0, 0.01
SHARED = 1.05


def run() -> list[Row]:
    pack = Path("build/bench/tiers/packs") / f"{LAYERS}-layers"
    random_pack.write(pack, LAYERS, LAYER_BYTES)
    return rows(pack, Path("build/bench/tiers/log"))


def rows(pack: Path, log: Path) -> list[Row]:
    found = []
    alone = _taken(pack, log, 1, LAYERS + 2)
    for count in (2, 4):
        shared = _taken(pack, log, count, LAYERS + 2)
        for what, ours, theirs in zip(("VRAM", "SSD"), shared, alone, strict=True):
            found.append(
                Row(
                    f"{count} processes, all layers on the GPU, {what} bytes; against one",
                    ours / 2**20, theirs / 2**20, "MiB", at_most=SHARED,
                )
            )  # fmt: skip
    return found


def _taken(pack: Path, log: Path, count: int, gpu_layers: int) -> tuple[int, int]:
    """Bytes that exist on the GPU, and that were read from the SSD, after passes of `count`."""
    flags = ["--pack", str(pack), "--dram", str(LAYERS * LAYER_BYTES), "--gpu-device", "memfd"]
    flags += ["--gpu", f"0={gpu_layers * LAYER_BYTES}"]
    with serve(flags, log) as daemon:
        command = [sys.executable, "-m", "tierd_tools.light_client", "--socket", daemon.socket]
        command += ["--model", pack.name, "--tier", "gpu:0"]
        command += ["--compute", str(COMPUTE_S), "--seconds", str(SECONDS)]
        clients = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]
        for client in clients:
            if client.wait() != 0:
                raise RuntimeError(f"a light client ended with {client.returncode}")
        status = ask(daemon.socket, "status")
    return status["gpus"][0]["backed_bytes"], status["ssd"]["read_bytes"]
