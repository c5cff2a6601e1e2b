"""What do two and four processes take of one GPU and of the SSD, against one process?

Each runs through the same model: once where the GPU holds all of it, once where both the GPU and
DRAM hold half of it, so that it streams. The first is bounded; the second is printed: there it
depends on how well the processes keep in phase.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tierd_tools import random_pack
from tierd_tools.benchmark import Row
from tierd_tools.diagnostics import ask
from tierd_tools.serving import serve

LAYERS, LAYER_BYTES = 24, 8 << 20
SECONDS, COMPUTE_S = 4.0, 0.01
SHARED = 1.05


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes: behind the arena on the GPU, read from the SSD, copied; and passes of each process."""

    vram: int
    ssd: int
    copied: int
    passes: float


def run() -> list[Row]:
    pack = Path("build/bench/tiers/packs") / f"{LAYERS}-layers"
    random_pack.write(pack, LAYERS, LAYER_BYTES)
    return rows(pack, Path("build/bench/tiers/log"))


def rows(pack: Path, log: Path) -> list[Row]:
    found = []
    alone = _taken(pack, log, 1, LAYERS + 2)
    for count in (2, 4):
        shared = _taken(pack, log, count, LAYERS + 2)
        name = f"{count} processes, all layers on the GPU"
        found += [
            _row(f"{name}: VRAM; against one", shared.vram, alone.vram, SHARED),
            _row(f"{name}: SSD bytes; against one", shared.ssd, alone.ssd, SHARED),
        ]
    alone = _taken(pack, log, 1, LAYERS // 2)
    for count in (2, 4):
        shared = _taken(pack, log, count, LAYERS // 2)
        name = f"{count} processes, half of the layers on the GPU"
        found += [
            _row(f"{name}: VRAM; against one", shared.vram, alone.vram, SHARED),
            _row(
                f"{name}: copied while each makes a pass; against one",
                shared.copied / shared.passes, alone.copied / alone.passes, None,
            ),
        ]  # fmt: skip
    return found


def _row(text: str, ours: float, theirs: float, at_most: float | None) -> Row:
    return Row(text, ours / 2**20, theirs / 2**20, "MiB", at_most=at_most)


def _taken(pack: Path, log: Path, count: int, layers: int) -> Taken:
    """What `count` processes took that ran for a while. layers: that each of the tiers holds."""
    flags = ["--pack", str(pack), "--dram", str(min(layers, LAYERS) * LAYER_BYTES)]
    flags += ["--gpu", f"0={layers * LAYER_BYTES}", "--gpu-device", "memfd"]
    with serve(flags, log) as daemon:
        command = [sys.executable, "-m", "tierd_tools.light_client", "--socket", daemon.socket]
        command += ["--model", pack.name, "--tier", "gpu:0"]
        command += ["--compute", str(COMPUTE_S), "--seconds", str(SECONDS)]
        clients = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        steps = []
        for client in clients:
            said, _ = client.communicate()
            if client.returncode != 0:
                raise RuntimeError(f"a light client ended with {client.returncode}")
            steps.append(len(json.loads(said)["at_s"]))
        status = ask(daemon.socket, "status")
    gpu = status["gpus"][0]
    return Taken(
        gpu["backed_bytes"],
        status["ssd"]["read_bytes"],
        gpu["copied_bytes"],
        sum(steps) / count / LAYERS,
    )
