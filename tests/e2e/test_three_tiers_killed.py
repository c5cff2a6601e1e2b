"""kill -9 of a client, or of the daemon under one, at every step of the protocol on a GPU tier.

The step is in the name of each test. Beside the client that dies lives another one, which holds a
lease all the time and must notice nothing; what the daemon has left afterwards is counted by the
kernel, not by the daemon.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import (
    PATIENCE_S,
    PackOnDisk,
    RawClient,
    RunningDaemon,
    wait_until,
    write_pack,
)
from tests.daemon.test_recovery import FakeSystemd
from tests.e2e.footprint import Footprint
from tests.e2e.gpu_client import GpuClient, GpuModel, Grant, damaged_blocks
from tests.e2e.protocol_steps import STEPS, TIER, Walk
from tierd.recovery import TABLE
from tierd.slots import Slots
from tierd_layouts.slot_entries import SlotState, slot_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_layouts.slot_entries import LeaseEntry

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
#: Two layers share a chunk, and the pack has twice the GPU's budget and 1.5 times DRAM's.
LAYERS, LAYER_BYTES, CHUNK_BYTES = 24, MIB, 2 * MIB
#: Lowered to what two clients need: a chunk each, and one for the largest layer.
GPU_BYTES, LOWERED_BYTES, DRAM_BYTES = 6 * CHUNK_BYTES, 3 * CHUNK_BYTES, 16 * MIB
HELD_LAYER = 5
#: So slow that a layer can be met on its way: 12 ms from the SSD, 12 ms to the GPU.
RATE = "80MiB"
#: Anonymous memory that a daemon may take more of while it serves: heaps grow in steps.
GROWTH_BYTES = 4 * MIB
CHUNKS = "memfd:tierd-gpu"


def flags(models: Path) -> list[str]:
    return [
        *("--models", str(models), "--dram", str(DRAM_BYTES), "--gpu", f"0={GPU_BYTES}"),
        *("--gpu-device", "memfd", "--gpu-chunk", str(CHUNK_BYTES)),
        *("--ssd-bandwidth", RATE, "--gpu-copy-bandwidth", RATE),
    ]


def gpu_of(status: dict[str, Any]) -> dict[str, Any]:
    (gpu,) = status["gpus"]
    assert isinstance(gpu, dict)
    return gpu


@dataclass
class Survivor:
    """A client that holds a lease, answers what the daemon asks, and sees no other byte."""

    client: GpuClient
    model: GpuModel
    pack: PackOnDisk
    held: Grant

    @classmethod
    def connect(cls, daemon: RunningDaemon, pack: PackOnDisk) -> Survivor:
        client = GpuClient(daemon.socket)
        client.greet()
        model = client.open_gpu(pack.name)
        model.plan(LAYERS, lookahead=0)
        held = model.acquire(HELD_LAYER)
        model.map(held)
        return cls(client, model, pack, held)

    def walk(self) -> None:
        """Through all layers but the held one, each of them with the pack's bytes."""
        for layer, record in enumerate(self.pack.index.layers):
            if layer != HELD_LAYER:
                self.attend()
                assert damaged_blocks(self.model.read(layer), record) == [], f"layer {layer}"

    def check_held(self) -> None:
        record = self.pack.index.layers[HELD_LAYER]
        assert damaged_blocks(self.model.bytes_of(self.held), record) == []
        now = self.model.table.generation(self.held["slot"])
        assert now == self.held["generation"], "its slot was given to another layer"

    def attend(self) -> None:
        self.model.attend()

    def leases(self) -> set[int]:
        """Those of all clients of this GPU, as its slot table has them."""
        return {entry.lease for entry in self.table_leases()}

    def table_leases(self) -> list[LeaseEntry]:
        return list(self.model.table.leases())


def check_budgets(daemon: RunningDaemon) -> dict[str, Any]:
    """No tier holds more than it may: the daemon's figures, and the memory that really exists."""
    status = daemon.status()
    gpu, dram = gpu_of(status), status["dram"]
    assert gpu["state"] == "ready", gpu["reason"]
    assert gpu["used_bytes"] <= gpu["budget_bytes"] + gpu["above_budget_bytes"] <= GPU_BYTES
    assert dram["used_bytes"] <= dram["peak_bytes"] <= dram["budget_bytes"]
    footprint = Footprint.of(daemon.pid)
    assert footprint.bytes_of(CHUNKS) <= GPU_BYTES
    assert footprint.bytes_of("memfd:tierd-arena") <= DRAM_BYTES
    return status


# ------------------------------------------------------------------------------------ client killed


@dataclass
class Node:
    daemon: RunningDaemon
    survivor: Survivor


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> PackOnDisk:
    """The pack that survivors read, and beside it one for each step: no tier has any of it."""
    models = tmp_path_factory.mktemp("three-tiers") / "models"
    pack = write_pack(models / "kept", LAYERS, LAYER_BYTES)
    for step in (*STEPS, "one-that-stalls"):
        shutil.copytree(pack.path, models / f"for-{step}", copy_function=os.link)
    return pack


@pytest.fixture(scope="module")
def node(packs: PackOnDisk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One daemon for all steps: what one of them leaks, the next ones find."""
    folder = tmp_path_factory.mktemp("node")
    daemon = RunningDaemon(str(folder / "tierd.sock"), folder / "log", flags(packs.path.parent))
    try:
        daemon.wait_ready()
        survivor = Survivor.connect(daemon, packs)
        survivor.walk()
        yield Node(daemon, survivor)
        survivor.client.close()
    finally:
        daemon.kill()


@pytest.mark.parametrize("step", STEPS)
def test_a_client_killed_here_leaves_nothing_behind(node: Node, step: str) -> None:
    daemon, survivor = node.daemon, node.survivor
    before = Footprint.of(daemon.pid)
    command = [sys.executable, "-m", "tests.e2e.protocol_steps"]
    command += [daemon.socket, f"for-{step}", str(LAYERS), str(LOWERED_BYTES), step]
    victim = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 2 * PATIENCE_S
    while victim.poll() is None:
        survivor.attend()  # a lowered budget waits for everybody's answer
        survivor.check_held()
        assert time.monotonic() < deadline, "the client did not come to its end"
        time.sleep(0.005)
    assert victim.returncode == -signal.SIGKILL, "it failed before it came to its step"

    def alone() -> bool:
        survivor.attend()
        return daemon.status()["clients"] == 1 and survivor.leases() == {survivor.held["lease"]}

    wait_until(alone, "the daemon has forgotten the client")
    check_budgets(daemon)
    survivor.check_held()
    if gpu_of(daemon.status())["budget_bytes"] < GPU_BYTES:
        wait_until(lambda: backed_at_most(node, LOWERED_BYTES), "the memory above is given back")
    daemon.ask("budget", tier=TIER, bytes=GPU_BYTES)
    survivor.walk()  # every slot that can be had is filled again, also those of the dead
    survivor.check_held()
    wait_until(lambda: at_rest(daemon), "nothing is read or copied ahead any more")
    status = check_budgets(daemon)
    assert gpu_of(status)["leased_bytes"] == survivor.held["bytes"]
    assert status["dram"]["leased_bytes"] == 0, "what is copied from is leased in DRAM, no longer"
    wait_until(lambda: Footprint.of(daemon.pid).fds == before.fds, "as many descriptors as before")
    after = Footprint.of(daemon.pid)
    assert after.threads == before.threads
    assert after.bytes_of(CHUNKS) == before.bytes_of(CHUNKS)
    assert after.anonymous_bytes <= before.anonymous_bytes + GROWTH_BYTES


def at_rest(daemon: RunningDaemon) -> bool:
    status = daemon.status()
    return not gpu_of(status)["in_flight_bytes"] and not status["dram"]["in_flight_bytes"]


def backed_bytes(daemon: RunningDaemon) -> int:
    """Memory behind the chunks, counted by the kernel."""
    return Footprint.of(daemon.pid).bytes_of(CHUNKS)


def backed_at_most(node: Node, nbytes: int) -> bool:
    node.survivor.attend()
    return backed_bytes(node.daemon) <= nbytes


# ------------------------------------------------------------------------------------ daemon killed


class Relay:
    """Daemons on one socket, one after the other: each of them serves until it is killed."""

    def __init__(self, pack: PackOnDisk, folder: Path) -> None:
        self.pack = pack
        self._folder = folder
        self._lives = 0
        self.daemon = self._start()

    def kill(self) -> None:
        self.daemon.kill()

    def next(self) -> RunningDaemon:
        self.daemon = self._start()
        return self.daemon

    def _start(self) -> RunningDaemon:
        self._lives += 1
        log = self._folder / f"log-{self._lives}"
        socket = str(self._folder / "tierd.sock")
        daemon = RunningDaemon(socket, log, flags(self.pack.path.parent)).wait_ready()
        wait_until(lambda: gpu_of(daemon.status())["state"] == "ready", "its GPU is ready")
        return daemon


@pytest.fixture(scope="module")
def relay(packs: PackOnDisk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    started = Relay(packs, tmp_path_factory.mktemp("relay"))
    yield started
    started.kill()


@pytest.mark.parametrize("step", STEPS)
def test_a_daemon_killed_here_takes_no_byte_from_its_client_and_the_next_one_serves(
    relay: Relay, step: str
) -> None:
    walk = Walk(relay.daemon.socket, f"for-{step}", LAYERS, LOWERED_BYTES)
    try:
        walk.to(step)
        relay.kill()
        with pytest.raises((EOFError, ConnectionError)):
            walk.client.receive(1 << 40)  # no such request: whatever came is read first
        check_mapped(walk, relay.pack)
        check_served(relay.next(), relay.pack, walk)
        check_mapped(walk, relay.pack)  # and nobody wrote into what it still reads
    finally:
        walk.close()


def check_mapped(walk: Walk, pack: PackOnDisk) -> None:
    """What the client leases and has mapped is whole, although the daemon is no more."""
    if walk.grant is not None and set(walk.model.chunks_of(walk.grant)) <= set(walk.model.chunks):
        assert damaged_blocks(walk.model.bytes_of(walk.grant), pack.index.layers[0]) == []


def check_served(daemon: RunningDaemon, pack: PackOnDisk, walk: Walk) -> None:
    """The next daemon begins with an empty GPU, whatever leases of the last one it is told of."""
    status = check_budgets(daemon)
    assert gpu_of(status)["leased_bytes"] == gpu_of(status)["resident_bytes"] == 0
    client = GpuClient(daemon.socket)
    try:
        client.greet(held=() if walk.grant is None else (walk.grant["lease"],))
        model = client.open_gpu(pack.name)
        model.plan(LAYERS, lookahead=0)
        for layer in range(8):
            model.attend()
            assert damaged_blocks(model.read(layer), pack.index.layers[layer]) == []
        assert list(model.table.leases()) == []
    finally:
        client.close()
    check_budgets(daemon)
    wait_until(lambda: daemon.status()["clients"] == 0, "the client is gone")


@pytest.mark.parametrize("step", ["copying", "computing", "released"])
def test_a_daemon_killed_under_systemd_here_comes_back_with_dram_warm_and_an_empty_gpu(
    packs: PackOnDisk, tmp_path: Path, step: str
) -> None:
    systemd = FakeSystemd(tmp_path / "notify")
    socket, environ = str(tmp_path / "tierd.sock"), {"NOTIFY_SOCKET": systemd.address}
    arguments = flags(packs.path.parent)
    first = RunningDaemon(socket, tmp_path / "first.log", arguments, environ).wait_ready()
    walk = Walk(socket, packs.name, LAYERS, LOWERED_BYTES)
    second: RunningDaemon | None = None
    try:
        walk.to(step)
        first.kill()
        kept = dict(systemd.store)
        assert not [name for name in kept if "gpu" in name], "memory of a GPU dies with the daemon"
        second = RunningDaemon(socket, tmp_path / "second.log", arguments, environ, kept)
        second.wait_ready()
        # At "copying" that may be a layer read ahead: reads of one time end in any order.
        layer = next(iter(layers_in_dram(kept[TABLE], packs)))
        client = GpuClient(socket)
        client.greet()
        model = client.open_gpu(packs.name)
        assert damaged_blocks(model.read(layer), packs.index.layers[layer]) == []
        client.close()
        assert second.status()["ssd"]["read_bytes"] == 0, "it lay in DRAM all the time"
        check_mapped(walk, packs)
    finally:
        walk.close()
        for daemon in (first, second):
            if daemon is not None:
                daemon.kill()
        systemd.close()


def layers_in_dram(table: int, pack: PackOnDisk) -> list[int]:
    """What the daemon that is dead left whole, by the slot table in this descriptor."""
    slots = Slots.adopt(os.dup(table))
    resident = {slot.key for slot in slots.table.slots() if slot.state is SlotState.RESIDENT}
    slots.close()
    keys = [slot_key(pack.index.digest, record.name) for record in pack.index.layers]
    return [layer for layer, key in enumerate(keys) if key in resident]


# ----------------------------------------------------------------------------- a client that stalls


def test_a_client_that_never_answers_keeps_what_it_has_mapped_and_nothing_else(node: Node) -> None:
    daemon, survivor = node.daemon, node.survivor
    walk = Walk(daemon.socket, "for-one-that-stalls", LAYERS, LOWERED_BYTES)
    walk.to("unmap-asked")  # from here on it says nothing
    mapped = {chunk: bytes(walk.model.chunks[chunk]) for chunk in walk.wanted}
    for _ in range(3):
        survivor.attend()
        assert damaged_blocks(survivor.model.read(0), survivor.pack.index.layers[0]) == []
    survivor.check_held()
    assert gpu_of(daemon.status())["budget_bytes"] == LOWERED_BYTES
    assert backed_bytes(daemon) > LOWERED_BYTES, "what it has mapped was not taken from it"
    for chunk, content in mapped.items():
        assert bytes(walk.model.chunks[chunk]) == content, "nor was it given to another layer"
    walk.close()
    wait_until(lambda: backed_at_most(node, LOWERED_BYTES), "it is gone, and the memory is back")
    daemon.ask("budget", tier=TIER, bytes=GPU_BYTES)
    survivor.walk()
    check_budgets(daemon)


def test_a_raw_client_of_dram_beside_it_is_none_of_the_gpus_business(node: Node) -> None:
    client = RawClient(node.daemon.socket)
    try:
        client.hello()
        opened = client.open("kept")
        grant = opened.acquire(1)
        record = node.survivor.pack.index.layers[1]
        assert damaged_blocks(opened.bytes_of(grant), record) == []
        assert node.survivor.leases() == {node.survivor.held["lease"]}
    finally:
        client.close()
