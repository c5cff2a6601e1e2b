"""What the benchmarks of the GPU tier run on: a GPU, or shared memory in its place to try them out.

TIERD_BENCH_DEVICE names the device (default cuda_vmm). Figures of `memfd` are printed, but say
nothing about a GPU, and no row of them counts.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tierd_tools import random_model
from tierd_tools.diagnostics import ask
from tierd_tools.doctor import nvidia
from tierd_tools.errors import NoDaemon
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_tools.serving import Serving

WORK: Final = Path("build/bench/gpu")
TIER: Final = "gpu:0"
OPEN_SECONDS: Final = 60.0
SMALL_OFFLOADED: Final = random_model.Shape(
    hidden=512, intermediate=1024, layers=6, heads=8, kv_heads=4, vocabulary=1000
)
"""Of a few MB a layer: a GPU's budget is at least 2 MiB."""
_DEVICES: Final = ("cuda_vmm", "cuda_ipc", "memfd")


@dataclass(frozen=True, slots=True)
class Ground:
    device: str  #: as --gpu-device takes it
    problem: str | None  #: why nothing can be measured on it

    @property
    def but(self) -> str | None:
        """Why figures measured here do not count."""
        return "measured on shared memory, not on a GPU" if self.device == "memfd" else None

    @property
    def where(self) -> dict[str, str]:
        """What load_model is told."""
        return {"device": "cpu", "tier": TIER} if self.device == "memfd" else {"device": "cuda"}

    @contextlib.contextmanager
    def serve(self, pack: Path, dram: str, gpu: str | None, *flags: str) -> Iterator[Serving]:
        """A daemon for the packs in a folder, or a pack, whose GPU is open. gpu: its budget, None =
        no GPU. Raises NoDaemon."""
        what = ["--models" if not (pack / "tierd.json").is_file() else "--pack", str(pack)]
        given = [*what, "--dram", dram, *flags]
        if gpu is not None:
            given += ["--gpu", f"0={gpu}", "--gpu-device", self.device]
        with serve(given, WORK / "log") as daemon:
            if gpu is not None:
                wait_ready(daemon.socket)
            yield daemon


def ground() -> Ground:
    """Raises ValueError for a device that there is none of."""
    device = os.environ.get("TIERD_BENCH_DEVICE", _DEVICES[0])
    if device not in _DEVICES:
        raise ValueError(f"TIERD_BENCH_DEVICE={device!r}: expected one of {', '.join(_DEVICES)}")
    if device == "memfd":
        return Ground(device, None)
    problem = nvidia.look().problem
    return Ground(device, problem and f"no GPU: {problem}")


def models() -> Path:
    """The folder with `packs/large`, `packs/small` and `reference`. TIERD_GPU_MODELS names it."""
    from tierd_tools.gpu_acceptance.models import prepare

    folder = Path(os.environ.get("TIERD_GPU_MODELS", WORK / "models"))
    if not (folder / "packs").is_dir():
        prepare(folder, None)
    return folder


def offloaded(here: Ground) -> Path:
    """The folder with `model` and `pack`: small where shared memory plays the GPU."""
    from tierd_tools.gpu_acceptance.models import OFFLOADED, prepare_offloaded

    if here.but is not None:
        folder = WORK / "small"
        prepare_offloaded(folder, SMALL_OFFLOADED)
    else:
        folder = Path(os.environ.get("TIERD_GPU_MODELS", WORK / "models"))
        prepare_offloaded(folder, OFFLOADED)
    return folder / "offloaded"


def wait_ready(socket: str) -> None:
    """Until the GPU is open. Raises NoDaemon with the daemon's reason."""
    deadline = time.monotonic() + OPEN_SECONDS
    while (state := gpu(socket))["state"] != "ready":
        if state["state"] == "failed":
            raise NoDaemon(f"{state['tier']} ({state['device']}) failed: {state['reason']}")
        if time.monotonic() > deadline:
            raise NoDaemon(f"{state['tier']} was not open within {OPEN_SECONDS:g} s")
        time.sleep(0.02)


def gpu(socket: str) -> dict[str, Any]:
    """What the daemon says of its GPU."""
    found: dict[str, Any] = ask(socket, "status")["gpus"][0]
    return found


def tiny_pack() -> Path:
    """A pack of a few MB, in a folder of its own, returned."""
    random_model.write_pack(WORK / "tiny" / "small", random_model.TINY)
    return WORK / "tiny"
