"""Do the copy of a layer, the read of the next one and the compute of the last one overlap?

One client runs through a model that fits neither the GPU nor DRAM. The GPU is shared memory
(`memfd`); the SSD and the copies have bandwidths that were set, the compute sleeps. What a pass
takes is held against its slowest stage alone: the bytes that this stage really moved, at the
bandwidth that was set. In the last of these rows nothing is set and the compute is a model's.

Beside it: how long one layer takes from the SSD to the GPU; what two and four processes take of the
GPU and of the SSD, against one; and what a lease costs on the GPU, against one in DRAM.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tierd_client
from tierd_tools import random_model, random_pack
from tierd_tools.bench import tiers_latency, tiers_processes
from tierd_tools.benchmark import Row, interleaved
from tierd_tools.diagnostics import ask
from tierd_tools.light_client import LightClient
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_client import OpenedModel

WORK = Path("build/bench/tiers")
TIER = "gpu:0"
LAYERS, LAYER_BYTES = tiers_processes.LAYERS, tiers_processes.LAYER_BYTES
DRAM_LAYERS, GPU_LAYERS = 8, 4
LOOKAHEAD = 2
STEP_S = 0.02  #: what the slowest stage takes for a layer
FASTER = 2.0  #: how much faster the other stages are where one binds
WARM_PASSES, PASSES = 3, 6
SLOWEST_STAGE, ACQUIRE = 1.15, 1.1
BURST, BURSTS = 50, 20
#: 0.2 GB of bf16, packed to a third: for the run with real stages.
REAL = random_model.SMALL
REAL_TOKENS = 9


@dataclass(frozen=True, slots=True)
class Stages:
    """What a pass of the three stages takes, each alone."""

    ssd_s: float
    copy_s: float
    compute_s: float

    @property
    def slowest_s(self) -> float:
        return max(self.ssd_s, self.copy_s, self.compute_s)

    def __str__(self) -> str:
        return f"SSD {self.ssd_s:.3f} s, copies {self.copy_s:.3f} s, compute {self.compute_s:.3f} s"


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes of one pass, and its median time."""

    ssd_bytes: float
    copied_bytes: float
    seconds: float


def run() -> list[Row]:
    pack = WORK / "packs" / f"{LAYERS}-layers"
    random_pack.write(pack, LAYERS, LAYER_BYTES)
    return [
        *_overlap(pack),
        *tiers_latency.run(),
        _real_stages(),
        *tiers_processes.rows(pack, WORK / "log"),
        *_acquire(pack),
    ]


# ----------------------------------------------------------------------------------------- overlap


def _overlap(pack: Path) -> list[Row]:
    # How many bytes of a pass come from where is the scheduler's decision: it is asked first.
    quick = LAYER_BYTES / STEP_S * FASTER
    found = _measure(pack, quick, quick, STEP_S / FASTER)
    pass_s = LAYERS * STEP_S
    ssd, copy = found.ssd_bytes / pass_s, found.copied_bytes / pass_s
    settings = {
        "the SSD binds": (ssd, copy * FASTER, STEP_S / FASTER),
        "copies bind": (ssd * FASTER, copy, STEP_S / FASTER),
        "compute binds": (ssd * FASTER, copy * FASTER, STEP_S),
        "all three take the same": (ssd, copy, STEP_S),
    }
    rows = []
    for name, (ssd_rate, copy_rate, step_s) in settings.items():
        moved = _measure(pack, ssd_rate, copy_rate, step_s)
        stages = Stages(
            moved.ssd_bytes / int(ssd_rate), moved.copied_bytes / int(copy_rate), LAYERS * step_s
        )
        rows.append(
            Row(
                f"a pass, {name} ({stages}); against the slowest stage",
                moved.seconds, stages.slowest_s, "s", at_most=SLOWEST_STAGE,
            )
        )  # fmt: skip
    return rows


def _measure(pack: Path, ssd_rate: float, copy_rate: float, step_s: float) -> Moved:
    """A pass in the steady state, with bandwidths in bytes per second."""
    rates = ["--ssd-bandwidth", str(int(ssd_rate)), "--gpu-copy-bandwidth", str(int(copy_rate))]
    with (
        serve([*gpu_flags(pack, DRAM_LAYERS, GPU_LAYERS), *rates], WORK / "log") as daemon,
        tierd_client.Client(daemon.socket, name="bench", tier=TIER) as client,
    ):
        light = LightClient(client.open(pack.name), step_s, LOOKAHEAD)
        light.run_layers(WARM_PASSES * LAYERS)
        before = ask(daemon.socket, "status")
        light.run_layers(PASSES * LAYERS + 1)
        after = ask(daemon.socket, "status")
    return Moved(
        (after["ssd"]["read_bytes"] - before["ssd"]["read_bytes"]) / PASSES,
        (after["gpus"][0]["copied_bytes"] - before["gpus"][0]["copied_bytes"]) / PASSES,
        statistics.median(_pass_seconds(light)),
    )


def _pass_seconds(light: LightClient) -> list[float]:
    """Of the last passes: from the grant of the first layer to that of the next pass."""
    starts = light.at_s[WARM_PASSES * LAYERS :: LAYERS]
    return [end - begin for begin, end in pairwise(starts)]


def gpu_flags(pack: Path, dram_layers: int, gpu_layers: int) -> list[str]:
    """Of a daemon with one GPU of shared memory, budgets in layers of the random pack."""
    return [
        *("--pack", str(pack), "--dram", str(dram_layers * LAYER_BYTES)),
        *("--gpu", f"0={gpu_layers * LAYER_BYTES}", "--gpu-device", "memfd"),
    ]


def _real_stages() -> Row:
    """A real model, nothing set: printed, since all three stages share this machine's cores."""
    pack = WORK / "packs" / "model"
    random_model.write_pack(pack, REAL)
    nbytes = sum(file.stat().st_size for file in pack.glob("*.safetensors"))
    flags = ["--pack", str(pack), "--gpu-device", "memfd"]
    small = [*flags, "--dram", str(nbytes // 2), "--gpu", f"0={nbytes // 3 >> 21 << 21}"]
    large = [*flags, "--dram", str(2 * nbytes), "--gpu", f"0={2 * nbytes >> 21 << 21}"]
    import torch

    torch.set_num_threads(1)  # the copies have the other core
    with _model(large) as (_, resident), _model(small) as (socket, streamed):
        before = ask(socket, "status")
        seconds = interleaved(
            {"resident": lambda: _token(resident), "streamed": lambda: _token(streamed)},
            rounds=REAL_TOKENS, warmup=0,
        )  # fmt: skip
        after = ask(socket, "status")
    ssd_ns = after["ssd"]["busy_ns"] - before["ssd"]["busy_ns"]
    copied = after["gpus"][0]["copied_bytes"] - before["gpus"][0]["copied_bytes"]
    copy_s = copied / after["gpus"][0]["copy_bytes_per_s"]
    stages = Stages(ssd_ns / 1e9 / REAL_TOKENS, copy_s / REAL_TOKENS, seconds["resident"])
    return Row(
        f"a token of a real model, 1 thread, nothing set ({stages}); against the slowest stage",
        seconds["streamed"], stages.slowest_s, "s",
    )  # fmt: skip


@contextlib.contextmanager
def _model(flags: list[str]) -> Iterator[tuple[str, Any]]:
    with serve(flags, WORK / "log") as daemon:
        model: Any = tierd_client.load_model("model", "fused", daemon.socket, tier=TIER)
        with model.tierd:
            for _ in range(2):
                _token(model)
            yield daemon.socket, model


def _token(model: Any) -> None:
    import torch

    with torch.inference_mode():
        model(torch.tensor([[5]]))


# ----------------------------------------------------------------------------------------- acquire


def _acquire(pack: Path) -> list[Row]:
    """Leases on one resident layer, taking turns between the tiers."""
    seconds: dict[str, list[float]] = {TIER: [], "dram": []}
    with (
        serve(gpu_flags(pack, LAYERS + 2, GPU_LAYERS), WORK / "log") as daemon,
        tierd_client.Client(daemon.socket, name="gpu", tier=TIER) as gpu,
        tierd_client.Client(daemon.socket, name="dram") as dram,
    ):
        opened = {TIER: gpu.open(pack.name), "dram": dram.open(pack.name)}
        for model in opened.values():
            model.plan([0], lookahead=0)
            model.acquire(0).release()
        for _ in range(BURSTS):
            for tier, model in opened.items():
                seconds[tier] += _burst(model)
    rows = []
    for percent in (50, 99):
        ours, theirs = (
            statistics.quantiles(seconds[tier], n=100)[percent - 1] * 1e6 for tier in (TIER, "dram")
        )
        rows.append(
            Row(
                f"acquire of a layer on the GPU (memfd), p{percent}; against one in DRAM",
                ours, theirs, "us", at_most=ACQUIRE if percent == 50 else None,
            )
        )  # fmt: skip
    return rows


def _burst(model: OpenedModel) -> list[float]:
    seconds = []
    for _ in range(BURST):
        begin = time.perf_counter()
        lease = model.acquire(0)
        seconds.append(time.perf_counter() - begin)
        lease.release()
    return seconds
