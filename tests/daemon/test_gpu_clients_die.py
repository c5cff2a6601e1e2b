"""Clients of a GPU that die, at any step: nothing of them is left, nor used before its fence."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.conftest import wait_until, write_pack
from tests.daemon.gpu_daemon import (
    LAYER_BYTES,
    LAYER_MEMORY,
    LAYERS,
    arguments,
    gpu_status,
    obey_until_kept,
    on_gpu,
)

if TYPE_CHECKING:
    from tests.daemon.conftest import PackOnDisk
    from tests.daemon.gpu_daemon import Connect, Start


@pytest.fixture
def pack(models: Path) -> PackOnDisk:
    return write_pack(models / "m", LAYERS, LAYER_BYTES)


# A client in a process of its own that stops at a step and waits to be killed there.
STEPS = ("hello", "open", "plan", "asked", "granted", "chunks", "mapped", "released", "told")
VICTIM = r"""
import os, sys, time
from tests.daemon.conftest import RawClient

def at(step):
    if step == sys.argv[2]:
        os.write(1, b"here\n")
        time.sleep(60)

client = RawClient(sys.argv[1])
client.hello(tier="gpu:0")
at("hello")
model = client.open("m")
at("open")
model.plan([0, 1, 2, 3, 4, 5])
at("plan")
request = client.send("acquire", model_id=model.model_id, layer=0)
at("asked")
lease = client.receive(request)
at("granted")
client.send("chunks", arena=model.number, chunks=model.chunks_of(lease))
at("chunks")
time.sleep(0.05)
client.receive(client._next_id - 1)
client.take_fds()
model.map(model.chunks_of(lease))
at("mapped")
model.release(lease)
at("released")
for layer in range(6):
    lease = model.acquire(layer)
    model.bytes_of(lease)
    model.release(lease)
os.write(1, b"all\n")
while not model.attend()["unmap"]:
    time.sleep(0.01)
at("told")
"""


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_is_killed_at_any_step_leaves_nothing_behind(
    start_daemon: Start, connect: Connect, models: Path, pack: PackOnDisk, step: str
) -> None:
    gpu = f"0={LAYERS * LAYER_MEMORY}"
    daemon = start_daemon(*arguments(models, gpu), "--gpu-copy-latency-us", "20000")
    observer = on_gpu(connect, daemon)
    fds = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    victim = subprocess.Popen(
        [sys.executable, "-c", VICTIM, daemon.socket, step],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert victim.stdout is not None
        if step == "told":
            assert victim.stdout.readline() == b"all\n"
            daemon.ask("budget", tier="gpu:0", bytes=3 * LAYER_MEMORY)
        assert victim.stdout.readline() == b"here\n"
        victim.stdout.close()
    finally:
        victim.kill()
        begin = time.monotonic()
        victim.wait()
    wait_until(lambda: daemon.status()["clients"] == 1, "it is gone")
    wait_until(lambda: gpu_status(daemon)["unfenced_clients"] == 0, "it is fenced")
    wait_until(
        lambda: (
            not any(
                gpu_status(daemon)[key]
                for key in ("leased_bytes", "quarantined_bytes", "in_flight_bytes")
            )
        ),
        "its slots are free",
    )
    assert time.monotonic() - begin < 3.0
    assert list(observer.table.leases()) == []
    assert daemon.status()["dram"]["leased_bytes"] == 0
    daemon.ask("budget", tier="gpu:0", bytes=LAYER_MEMORY + LAYER_MEMORY)
    for layer in range(LAYERS):
        lease = observer.acquire(layer)
        assert observer.bytes_of(lease) == pack.content[layer]
        observer.release(lease)
        observer.obey()

    obey_until_kept(observer, daemon, "no chunk waits for the dead")
    wait_until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= fds + 4, "descriptors", 5.0)


def test_the_slot_of_a_dead_client_is_quarantined_until_it_is_fenced(
    start_daemon: Start, connect: Connect, models: Path, pack: PackOnDisk
) -> None:
    daemon = start_daemon(*arguments(models))
    leaver = on_gpu(connect, daemon)
    leaver.acquire(0)
    leaver.client.close()
    seen = set()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        status = gpu_status(daemon)
        seen.add((status["quarantined_bytes"], status["unfenced_clients"]))
        if daemon.status()["clients"] == 0 and not status["unfenced_clients"]:
            break
    assert (LAYER_MEMORY, 1) in seen
    assert gpu_status(daemon)["quarantined_bytes"] == 0
