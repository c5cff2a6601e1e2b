"""When a client is killed in the middle of its compute, how soon can others have its slots?

One process holds all of the GPU that others do not need, and computes with it; one runs a model;
a third asks for layers that only fit when the first is gone. Then the first is killed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import tierd_client
from tierd_tools import random_pack
from tierd_tools.gpu_acceptance.promises import KILLED
from tierd_tools.gpu_ground import TIER, WORK, Ground, ground, models
from tierd_tools.gpu_process import ModelProcess

if TYPE_CHECKING:
    from tierd_tools.benchmark import Row

LAYERS, LAYER_BYTES = 16, 8 << 20
ROOM_BYTES = 64 << 20  # of the GPU, beside the model
BOUND_S = 1.0
PATIENCE_S = 20.0
COMPUTING_S = 0.5
PASSES = 20


def run() -> list[Row]:
    here = ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in KILLED]
    killed, other = ModelProcess(), ModelProcess()
    try:
        return _measure(here, killed, other)
    finally:
        killed.stop()
        other.stop()


def _measure(here: Ground, killed: ModelProcess, other: ModelProcess) -> list[Row]:
    held, wanted = WORK / "held", WORK / "wanted"
    for pack in (held, wanted):
        random_pack.write(pack, LAYERS, LAYER_BYTES)
    large = models() / "packs" / "large"
    size = sum(file.stat().st_size for file in large.iterdir()) * 5 // 4
    dram = size + 2 * LAYERS * LAYER_BYTES + ROOM_BYTES
    packs = ("--pack", str(held), "--pack", str(wanted))
    with here.serve(large, str(dram), str(size + ROOM_BYTES), *packs) as daemon:
        other.call("load", "large", daemon.socket, here.where)
        expected = other.call("logits", 3)
        slots = killed.call("hold", "held", daemon.socket, here.where)
        if not slots:
            raise RuntimeError("the process that is to be killed got no lease")
        with (
            tierd_client.Client(daemon.socket, tier=TIER, name="waiting") as client,
            ThreadPoolExecutor(1) as pool,
        ):
            opened = client.open("wanted")  # imports torch
            killed.begin("compute")
            other.begin("logits", PASSES)
            granted = pool.submit(_wait_granted, opened, slots)
            time.sleep(COMPUTING_S)
            if granted.done():
                raise RuntimeError("there is room on the GPU beside the process to be killed")
            if killed.answered:
                raise RuntimeError(f"the process to be killed did not compute: {killed.end()}")
            begin = time.perf_counter()
            killed.kill()
            seconds = granted.result() - begin
        found = set(other.end()) | set(other.call("logits", 3))
        other.call("close")
    equal = float(found == set(expected) and len(expected) == 1)
    return [
        KILLED[0].measured(seconds, BOUND_S, here.but),
        KILLED[1].measured(equal, 1.0, here.but),
    ]


def _wait_granted(opened: tierd_client.OpenedModel, slots: list[int]) -> float:
    """When a layer was granted in one of these slots, by the clock of `time.perf_counter`. Requests
    wait in the daemon, and are made again when the daemon does not let them wait any longer.

    slots: where they begin in the arena; all of them, and all layers here, have LAYER_BYTES.
    """
    deadline = time.perf_counter() + PATIENCE_S
    leases: list[tierd_client.Lease] = []
    while not any(abs(lease.offset - slot) < LAYER_BYTES for lease in leases for slot in slots):
        try:
            leases.append(opened.acquire(len(leases)))
        except (tierd_client.LeaseLimit, tierd_client.BudgetTooSmall):
            if time.perf_counter() > deadline:
                raise
            time.sleep(0.005)
    at = time.perf_counter()
    for lease in leases:
        lease.release()
    return at
