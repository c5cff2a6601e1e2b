"""What does a GPU cost the daemon: memory of its own, and time until READY?

GPU libraries are loaded only where a GPU is configured, and after READY.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tierd_tools.diagnostics import ask
from tierd_tools.gpu_acceptance.promises import MEMORY
from tierd_tools.gpu_ground import WORK, Ground, ground, tiny_pack, wait_ready
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from tierd_tools.benchmark import Row


def run() -> list[Row]:
    here = ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in MEMORY]
    without, with_gpu = _start(here, with_gpu=False), _start(here, with_gpu=True)
    return [
        promise.measured(ours, theirs, here.but)
        for promise, ours, theirs in zip(MEMORY, with_gpu, without, strict=True)
    ]


def _start(here: Ground, *, with_gpu: bool) -> tuple[float, float]:
    """(MB of its own, once the GPU is open; seconds until it answers)."""
    flags = ["--models", str(tiny_pack()), "--dram", "64MiB"]
    if with_gpu:
        flags += ["--gpu", "0=64MiB", "--gpu-device", here.device]
    begin = time.perf_counter()
    with serve(flags, WORK / "log") as daemon:
        seconds = time.perf_counter() - begin
        if with_gpu:
            wait_ready(daemon.socket)
        return ask(daemon.socket, "status")["daemon"]["rss_bytes"] / 1e6, seconds
