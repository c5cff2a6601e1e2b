"""Do two and four processes share one copy of the weights on the GPU, read once from the SSD?"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from tierd_tools.diagnostics import ask
from tierd_tools.gpu_acceptance.promises import BESIDE, SHARED
from tierd_tools.gpu_ground import Ground, gpu, ground, models
from tierd_tools.gpu_process import ModelProcess

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tierd_tools.benchmark import Row

TOKENS = 4
COUNTS = (1, 2, 4)
MIB = 1 << 20


def run() -> list[Row]:
    here = ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in (*SHARED, *BESIDE)]
    pack = models() / "packs" / "large"
    processes = [ModelProcess() for _ in range(max(COUNTS))]
    try:
        for process in processes:
            process.begin("warm")
        for process in processes:
            process.end()
        # One after the other: a process has a CUDA context from its first model on.
        found = [_measure(here, pack, processes[:count]) for count in COUNTS]
    finally:
        for process in processes:
            process.stop()
    alone, others = found[0], found[1:]
    weights = iter(SHARED)
    rows = [
        next(weights).measured(several[which], alone[which], here.but)
        for several in others
        for which in (0, 1)
    ]
    for promise, several in zip(BESIDE, others, strict=True):
        but = here.but if alone[2] else "nvidia-smi does not say how much memory is used"
        rows.append(promise.measured(several[2], alone[2], but))
    return rows


def _measure(
    here: Ground, pack: Path, processes: Sequence[ModelProcess]
) -> tuple[float, float, float | None]:
    """MiB: weight arenas on the GPU, bytes read from the SSD, what else is used on the GPU."""
    size = sum(file.stat().st_size for file in pack.iterdir()) * 5 // 4 + (64 << 20)
    with here.serve(pack, str(size), str(size)) as daemon:
        before = ask(daemon.socket, "status")["ssd"]["read_bytes"]
        for process in processes:
            process.begin("load", pack.name, daemon.socket, here.where)
        for process in processes:
            process.end()
        for process in processes:
            process.begin("generate", TOKENS)
        texts = [process.end()[0] for process in processes]
        if any(text != texts[0] for text in texts):
            raise RuntimeError(f"{len(processes)} processes give different tokens: {texts}")
        backed = gpu(daemon.socket)["backed_bytes"]
        read = ask(daemon.socket, "status")["ssd"]["read_bytes"] - before
        used = _used_mib()
        for process in processes:
            process.call("close")
    return backed / MIB, read / MIB, None if used is None else used - backed / MIB


def _used_mib() -> float | None:
    """On GPU 0, by all processes."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    done = subprocess.run(
        [command, "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return float(done.stdout) if done.returncode == 0 else None
