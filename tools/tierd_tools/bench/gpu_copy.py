"""Are layers copied to the GPU as fast as one large pinned copy?

A model that fits DRAM, but not the GPU, is gone through by a client that does not compute: so all
that limits it is the copies. The other side is one process that copies 1 GiB of pinned memory.
"""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import tierd_client
from tierd_tools import random_pack
from tierd_tools.gpu_acceptance.promises import COPY
from tierd_tools.gpu_ground import TIER, WORK, Ground, gpu, ground
from tierd_tools.light_client import LightClient

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    from tierd_tools.benchmark import Row

LAYERS, LAYER_BYTES = 24, 64 << 20
GPU_BUDGET = 8 * LAYER_BYTES
LOOKAHEAD = 4
SECONDS = 3.0
PINNED_BYTES, PINNED_ROUNDS = 1 << 30, 7
MEMFD_BANDWIDTH = 500_000_000  # of the copies, where shared memory stands for a GPU


def run() -> list[Row]:
    here = ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in COPY]
    layer_bytes = LAYER_BYTES if here.but is None else LAYER_BYTES // 16
    pack = WORK / f"copied-{layer_bytes}" / "copied"
    random_pack.write(pack, LAYERS, layer_bytes)
    budget = GPU_BUDGET * layer_bytes // LAYER_BYTES
    flags = () if here.but is None else ("--gpu-copy-bandwidth", str(MEMFD_BANDWIDTH))
    before = _pinned(here)
    with here.serve(pack, str((LAYERS + 2) * layer_bytes), str(budget), *flags) as daemon:
        _fill_dram(daemon.socket, layer_bytes)
        ours, unpinned = _copied(daemon.socket)
    theirs = max(before, _pinned(here))
    beside = f"{unpinned >> 20} MiB from memory that was not registered yet"
    return [COPY[0].measured(ours / 1e9, theirs / 1e9, here.but, beside)]


def _fill_dram(socket: str, layer_bytes: int) -> None:
    """Everything in DRAM, so that no copy waits for the SSD; and registered, which is done in the
    background a moment later."""
    with tierd_client.Client(socket, name="filling") as client:
        opened = client.open("copied")
        for layer in range(len(opened.index.layers)):
            opened.acquire(layer).release()
    time.sleep(1.0 if layer_bytes == LAYER_BYTES else 0.0)


def _copied(socket: str) -> tuple[float, int]:
    """Bytes per second over a time in which the client never stopped asking, and how many bytes of
    them were not pinned."""
    client = tierd_client.Client(socket, tier=TIER, name="going-through")
    light = LightClient(client.open("copied"), 0.0, LOOKAHEAD)
    runner = threading.Thread(target=light.run, args=(SECONDS + 2.0,))
    runner.start()
    time.sleep(1.0)  # the first pass is over
    begin, first = time.monotonic(), gpu(socket)
    time.sleep(SECONDS)
    last, seconds = gpu(socket), time.monotonic() - begin
    runner.join()
    client.close()
    copied = last["copied_bytes"] - first["copied_bytes"]
    return copied / seconds, last["unpinned_bytes"] - first["unpinned_bytes"]


def _pinned(here: Ground) -> float:
    """Bytes per second of one large copy from pinned memory, in a process of its own."""
    if here.but is not None:
        return MEMFD_BANDWIDTH
    context = multiprocessing.get_context("spawn")
    found: Queue[float] = context.Queue()
    process = context.Process(target=_copy_pinned, args=(found,))
    process.start()
    rate = found.get(timeout=60)
    process.join(10)
    return rate


def _copy_pinned(found: Queue[float]) -> None:
    cuda: Any = importlib.import_module("cuda.bindings.driver")
    _checked(cuda.cuInit(0))
    device = _checked(cuda.cuDeviceGet(0))
    _checked(cuda.cuCtxSetCurrent(_checked(cuda.cuDevicePrimaryCtxRetain(device))))
    host = _checked(cuda.cuMemHostAlloc(PINNED_BYTES, 0))
    there = _checked(cuda.cuMemAlloc(PINNED_BYTES))
    stream = _checked(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
    seconds = []
    for _ in range(PINNED_ROUNDS):
        begin = time.perf_counter()
        _checked(cuda.cuMemcpyHtoDAsync(there, host, PINNED_BYTES, stream))
        _checked(cuda.cuStreamSynchronize(stream))
        seconds.append(time.perf_counter() - begin)
    found.put(PINNED_BYTES / statistics.median(seconds[1:]))


def _checked(result: Any) -> Any:
    code, *values = result
    if int(code):
        raise RuntimeError(f"CUDA: {code}")
    return values[0] if len(values) == 1 else tuple(values)
