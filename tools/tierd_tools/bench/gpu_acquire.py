"""Is the round trip of a lease on a GPU-resident layer as short as that on a DRAM-resident one?

The same processes ask both tiers of the same daemon, in turns.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import TYPE_CHECKING

import tierd_client
from tierd_tools.gpu_acceptance.promises import ACQUIRE
from tierd_tools.gpu_ground import TIER, ground, tiny_pack

if TYPE_CHECKING:
    from multiprocessing.queues import Queue
    from multiprocessing.synchronize import Barrier

    from tierd_tools.benchmark import Row

TRIPS, BURST = 4000, 50
LAYER = "model.layers.0"
_TIERS = (TIER, "dram")


def run() -> list[Row]:
    here = ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in ACQUIRE]
    rows = []
    with here.serve(tiny_pack(), "64MiB", "64MiB") as daemon:
        for promises, clients in ((ACQUIRE[:2], 1), (ACQUIRE[2:], 4)):
            ours, theirs = _measure(daemon.socket, clients)
            for promise, (mine, other) in zip(
                promises, zip(ours, theirs, strict=True), strict=True
            ):
                rows.append(promise.measured(mine, other, here.but))
    return rows


def _measure(socket: str, clients: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(p50, p99) in microseconds on the GPU, and in DRAM, over all clients."""
    context = multiprocessing.get_context("spawn")
    found: Queue[tuple[list[float], list[float]]] = context.Queue()
    together = context.Barrier(clients)
    processes = [
        context.Process(target=_client, args=(socket, together, found)) for _ in range(clients)
    ]
    for process in processes:
        process.start()
    trips: tuple[list[float], list[float]] = ([], [])
    for _ in processes:
        for all_of_them, its in zip(trips, found.get(timeout=60), strict=True):
            all_of_them.extend(its)
    for process in processes:
        process.join(10)
    on_gpu, in_dram = (_percentiles(values) for values in trips)
    return on_gpu, in_dram


def _percentiles(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), sorted(values)[len(values) * 99 // 100]


def _client(socket: str, together: Barrier, found: Queue[tuple[list[float], list[float]]]) -> None:
    clients = [tierd_client.Client(socket, tier=tier, name=f"asking-{tier}") for tier in _TIERS]
    opened = [client.open("small") for client in clients]
    layers = [model.layer_index(LAYER) for model in opened]
    kept = [model.acquire(layer) for model, layer in zip(opened, layers, strict=True)]
    trips: list[list[float]] = [[], []]
    together.wait(60)
    while len(trips[0]) < TRIPS:
        for model, layer, client, us in zip(opened, layers, clients, trips, strict=True):
            leases = []
            for _ in range(BURST):
                begin = time.perf_counter_ns()
                leases.append(model.acquire(layer))
                us.append((time.perf_counter_ns() - begin) / 1e3)
            for lease in leases:
                lease.release()
            client.ask("config")  # answered after all releases
    together.wait(60)
    for lease in kept:
        lease.release()
    for client in clients:
        client.close()
    found.put((trips[0], trips[1]))
