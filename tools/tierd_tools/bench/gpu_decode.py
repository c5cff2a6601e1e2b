"""Are tokens of a model twice as large as the memory for it made 4 times as fast as by Accelerate?

A model twice the VRAM budget, streamed from pinned DRAM, against cpu_offload; then twice the DRAM
budget, with room for four layers on the GPU, streamed from the SSD, against disk_offload. The pack
is twice the budget: the dense model is three times it. One token at a time, the processes taking
turns. cpu_offload and disk_offload, which the promise names, keep nothing where it fits; so
Accelerate with a device map, which fills the same budgets, is measured beside them.

On a node with more memory than the budget the kernel would keep Accelerate's files in its page
cache: they leave it before each of its steps. The daemon reads past that cache.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
from typing import TYPE_CHECKING, Any

from tierd_layouts.container import open_pack
from tierd_tools.diagnostics import ask
from tierd_tools.gpu_acceptance.promises import DECODE_SSD, DECODE_VRAM
from tierd_tools.gpu_ground import WORK, Ground, ground, offloaded
from tierd_tools.gpu_process import ModelProcess

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_tools.benchmark import Row

STEPS, ROUNDS = 5, 3
SLOTS = 4  #: largest layers that the GPU holds where all is streamed from the SSD
ROOM_BYTES = 64 << 20
PEERS = (("cpu_offload", "device_map"), ("disk_offload", "device_map"))


def run() -> list[Row]:
    here = ground()
    promised = (*DECODE_VRAM, *DECODE_SSD)
    if here.problem:
        return [promise.not_run(here.problem) for promise in promised]
    folder = offloaded(here)
    index = open_pack(folder / "pack")
    largest = max(layer.nbytes for layer in index.layers)
    room = ROOM_BYTES if here.but is None else largest
    half = index.pack_bytes // 2
    budgets = ((half, index.pack_bytes + room), (SLOTS * largest, half))
    rows: list[Row] = []
    for promises, peers, (gpu, dram) in zip((DECODE_VRAM, DECODE_SSD), PEERS, budgets, strict=True):
        found = _Race(here, folder, gpu, dram, promises is DECODE_SSD).run(peers)
        ours = found["tierd"]
        for promise, peer in zip(promises, peers, strict=True):
            rows.append(
                promise.measured(
                    ours.seconds, found[peer].seconds, here.but,
                    beside=f"{ours.bytes_text} against {found[peer].bytes_text}",
                )
            )  # fmt: skip
    return rows


class _Side:
    """What one of those that take turns was measured with."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.read_bytes = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.steps)

    @property
    def bytes_text(self) -> str:
        """Of the disk, for each token."""
        return f"{self.read_bytes / max(len(self.steps), 1) / 1e6:.0f} MB read a token"


class _Race:
    """gpu, dram: bytes of the tiers, the same for all sides. cold: what others keep in files comes
    from the disk."""

    def __init__(self, here: Ground, folder: Path, gpu: int, dram: int, cold: bool) -> None:
        self._here = here
        self._folder = folder
        self._gpu = gpu
        self._dram = dram
        self._cold = cold

    def run(self, peers: tuple[str, str]) -> dict[str, _Side]:
        processes = {name: ModelProcess() for name in ("tierd", *peers)}
        try:
            for peer in peers:
                processes[peer].begin("load_offloaded", peer, *self._arguments(peer))
            with self._here.serve(self._folder / "pack", str(self._dram), str(self._gpu)) as daemon:
                where = self._here.where
                processes["tierd"].call("load", "pack", daemon.socket, where, None)
                for peer in peers:
                    processes[peer].end()
                found = self._turns(processes, daemon.socket)
                processes["tierd"].call("close")
            return found
        finally:
            for name, process in processes.items():
                process.stop()
                shutil.rmtree(self._files(name), ignore_errors=True)

    def _turns(self, processes: dict[str, ModelProcess], socket: str) -> dict[str, _Side]:
        sides = {name: _Side() for name in processes}
        for number, (name, process) in itertools.product(range(ROUNDS + 1), processes.items()):
            theirs = [self._folder / "model", self._files(name)]
            forget = theirs if self._cold and name != "tierd" else []
            before = _read_bytes(socket)
            steps, read = process.call("steps", STEPS, forget)
            if not number:  # kernels are chosen and compiled, arenas registered
                continue
            sides[name].steps += steps
            if name == "tierd":  # the daemon reads for the prompt too, as much as for a token
                read = (_read_bytes(socket) - before) * STEPS // (STEPS + 1)
            sides[name].read_bytes += read
        return sides

    def _arguments(self, peer: str) -> tuple[Any, ...]:
        model, device = self._folder / "model", self._here.where["device"]
        if peer == "cpu_offload":
            return model, device
        if peer == "disk_offload":
            return model, device, self._files(peer)
        return model, device, self._gpu, self._dram, self._files(peer)

    def _files(self, peer: str) -> Path:
        """Where what a peer keeps on disk is."""
        return (WORK / "offload" / f"{peer}-{os.getpid()}-{self._dram}").absolute()


def _read_bytes(socket: str) -> int:
    return int(ask(socket, "status")["ssd"]["read_bytes"])
