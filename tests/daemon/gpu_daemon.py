"""A daemon with GPUs made of ordinary memory, and what its tests ask of it.

The pack has LAYERS layers of LAYER_BYTES, each of which needs LAYER_CHUNKS chunks on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.daemon.conftest import OpenedOnGpu, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon.conftest import RawClient, RunningDaemon

    Start = Callable[..., RunningDaemon]
    Connect = Callable[..., RawClient]

MIB = 1 << 20
LAYERS, LAYER_BYTES, CHUNK = 6, 3 * MIB, 2 * MIB
LAYER_CHUNKS = 2
LAYER_MEMORY = LAYER_CHUNKS * CHUNK


def arguments(models: Path, gpu: str = f"0={12 * MIB}", dram: int = 12 * MIB) -> list[Any]:
    return ["--models", models, "--dram", str(dram), "--gpu", gpu, "--gpu-device", "memfd",
        "--gpu-chunk", str(CHUNK)]  # fmt: skip


def on_gpu(connect: Connect, daemon: RunningDaemon, model: str = "m") -> OpenedOnGpu:
    opened = connect(daemon, tier="gpu:0").open(model)
    assert isinstance(opened, OpenedOnGpu)
    return opened


def gpu_status(daemon: RunningDaemon, number: int = 0) -> dict[str, Any]:
    (found,) = [gpu for gpu in daemon.status()["gpus"] if gpu["tier"] == f"gpu:{number}"]
    return dict(found)


def obey_until_kept(opened: OpenedOnGpu, daemon: RunningDaemon, what: str, *seconds: float) -> None:
    """Wait, giving back what is asked for, until nothing is above the budget."""

    def kept() -> bool:
        opened.obey()
        return bool(gpu_status(daemon)["above_budget_bytes"] == 0)

    wait_until(kept, what, *seconds)
