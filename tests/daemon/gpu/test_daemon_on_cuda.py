"""A real daemon on the CUDA devices over the fake driver: all code but NVIDIA's runs."""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import OpenedOnGpu, wait_until, write_pack
from tests.daemon.gpu.test_two_processes import SITE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon.conftest import PackOnDisk, RawClient, RunningDaemon

    Start = Callable[..., RunningDaemon]
    Connect = Callable[..., RawClient]

MIB = 1 << 20
LAYERS, LAYER_BYTES, CHUNK = 6, 3 * MIB, 2 * MIB
BUDGET = 12 * MIB  # three layers


@pytest.fixture
def pack(models: Path) -> PackOnDisk:
    return write_pack(models / "m", LAYERS, LAYER_BYTES)


@pytest.fixture
def start(start_daemon: Start, models: Path, pack: PackOnDisk) -> Start:
    def start(device: str, *more: str, **environ: str) -> RunningDaemon:
        return start_daemon(
            "--models", models, "--dram", str(24 * MIB), "--gpu", f"0={BUDGET}",
            "--gpu-device", device, "--gpu-chunk", str(CHUNK), *more,
            environ={"PYTHONPATH": str(SITE), **environ},
        )  # fmt: skip

    return start


def on_gpu(connect: Connect, daemon: RunningDaemon) -> OpenedOnGpu:
    opened = connect(daemon, tier="gpu:0").open("m")
    assert isinstance(opened, OpenedOnGpu)
    return opened


def gpu_status(daemon: RunningDaemon) -> dict[str, Any]:
    (found,) = daemon.status()["gpus"]
    return dict(found)


def read_handle(opened: OpenedOnGpu, lease: dict[str, Any]) -> bytes:
    """What a handle of CUDA IPC leads to."""
    reply = opened.client.call("chunks", arena=opened.number, chunks=opened.chunks_of(lease))
    _, pid, fd, nbytes = struct.unpack("<4sIIQ44x", reply["handle"])
    assert nbytes == reply["nbytes"] >= lease["offset"] + lease["bytes"]
    memory = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
    try:
        return os.pread(memory, lease["bytes"], lease["offset"])
    finally:
        os.close(memory)


@pytest.mark.parametrize("device", ["cuda_vmm", "cuda_ipc"])
def test_every_layer_is_granted_with_its_bytes(
    start: Start, connect: Connect, pack: PackOnDisk, device: str
) -> None:
    daemon = start(device)
    opened = on_gpu(connect, daemon)
    opened.plan(list(range(LAYERS)))
    for layer in [*range(LAYERS), 2, 0]:
        lease = opened.acquire(layer)
        found = (read_handle if device == "cuda_ipc" else OpenedOnGpu.bytes_of)(opened, lease)
        assert found == pack.content[layer]
        opened.release(lease)
        if device == "cuda_vmm":
            opened.obey()
    status = gpu_status(daemon)
    assert (status["state"], status["device"], status["name"]) == ("ready", device, "Fake GPU")
    assert status["copies"] >= LAYERS
    assert status["backed_bytes"] <= BUDGET


def test_two_groups_of_readers_have_an_arena_each_with_vmm_and_not_with_ipc(
    start: Start, connect: Connect, models: Path, pack: PackOnDisk
) -> None:
    other = write_pack(models / "other", 2, LAYER_BYTES, seed=1)
    (other.path / "tierd.json").chmod(0o600)
    (pack.path / "tierd.json").chmod(0o644)
    daemon = start("cuda_vmm")
    for found in (pack, other):
        opened = connect(daemon, tier="gpu:0").open(found.name)
        assert isinstance(opened, OpenedOnGpu)
        lease = opened.acquire(1)
        assert opened.bytes_of(lease) == found.content[1]
        opened.release(lease)
    daemon.kill()
    daemon = start("cuda_ipc")
    answers = []
    for found in (pack, other):
        client = connect(daemon, tier="gpu:0")
        try:
            answers.append(str(client.open(found.name)))
        except Exception as refused:
            answers.append(str(refused))
    (refusal,) = [answer for answer in answers if "cannot be on gpu:0" in answer]
    assert "take --gpu-device cuda_vmm" in refusal


def test_dram_is_registered_in_the_background_and_copies_are_pinned_then(
    start: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start("cuda_vmm")
    opened = on_gpu(connect, daemon)

    def pinned() -> bool:
        before = gpu_status(daemon)
        for layer in range(LAYERS):
            lease = opened.acquire(layer)
            opened.release(lease)
            opened.obey()
        after = gpu_status(daemon)
        copied = after["copied_bytes"] - before["copied_bytes"]
        return bool(copied and after["unpinned_bytes"] == before["unpinned_bytes"])

    wait_until(pinned, "a pass whose copies were all of registered memory")


def test_a_lower_budget_gives_memory_back_to_the_driver(
    start: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start("cuda_vmm")
    opened = on_gpu(connect, daemon)
    for layer in range(3):
        lease = opened.acquire(layer)
        assert opened.bytes_of(lease) == pack.content[layer]
        opened.release(lease)
    assert gpu_status(daemon)["backed_bytes"] == BUDGET
    daemon.ask("budget", tier="gpu:0", bytes=4 * CHUNK)

    def sunk() -> bool:
        opened.obey()
        return bool(gpu_status(daemon)["backed_bytes"] <= 4 * CHUNK)

    wait_until(sunk, "memory went back")
    lease = opened.acquire(5)
    assert opened.bytes_of(lease) == pack.content[5]


def test_a_lower_budget_is_refused_where_no_memory_can_go_back(
    start: Start, connect: Connect
) -> None:
    daemon = start("cuda_ipc")
    on_gpu(connect, daemon)
    refusal = connect(daemon, greet=False).refusal("budget", tier="gpu:0", bytes=4 * CHUNK)
    assert "cuda_vmm" in refusal.text


@pytest.mark.parametrize("device", ["cuda_vmm", "cuda_ipc"])
def test_without_a_driver_dram_is_served_and_the_reason_said(
    start: Start, connect: Connect, pack: PackOnDisk, device: str
) -> None:
    daemon = start(device, FAKE_CUDA_GPUS="0")
    wait_until(lambda: gpu_status(daemon)["state"] == "failed", "it failed")
    assert "cuInit: CUDA_ERROR_NO_DEVICE (100)" in gpu_status(daemon)["reason"]
    opened = connect(daemon).open("m")
    assert opened.bytes_of(opened.acquire(0)) == pack.content[0]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("cuMemCreate=2", r"chunk \d+ of arena \d+ needs 2.* MiB"),
        ("cuMemMap=1", "cuMemMap"),
        ("cuMemcpyHtoDAsync=1", r"cuMemcpyHtoDAsync \(\d+ bytes from"),
        ("cuEventSynchronize=999", r"cuEventSynchronize: CUDA_ERROR_UNKNOWN \(999\)"),
    ],
)
def test_a_copy_that_the_driver_refuses_is_told_to_the_client_and_works_later(
    start: Start, connect: Connect, pack: PackOnDisk, tmp_path: Path, fault: str, text: str
) -> None:
    flag = tmp_path / "fault"
    daemon = start("cuda_vmm", FAKE_CUDA_FAULTS=f"{flag} {fault}")
    opened = on_gpu(connect, daemon)
    flag.touch()
    refusal = opened.client.refusal("acquire", model_id=opened.model_id, layer=1)
    assert refusal.code == "copy_failed"
    assert re.search(text, refusal.text), refusal.text
    dram = connect(daemon).open("m")
    assert dram.bytes_of(dram.acquire(2)) == pack.content[2]
    flag.unlink()
    lease = opened.acquire(1)
    assert opened.bytes_of(lease) == pack.content[1]


def test_cuda_is_loaded_only_where_a_gpu_is_configured(
    start: Start, start_daemon: Start, models: Path, pack: PackOnDisk, tmp_path: Path
) -> None:
    flag = tmp_path / "loaded"
    daemon = start_daemon(
        "--models", models, "--dram", str(24 * MIB),
        environ={"PYTHONPATH": str(SITE), "FAKE_CUDA_LOADED": str(flag)},
    )  # fmt: skip
    daemon.status()
    daemon.kill()
    assert not flag.exists()
    daemon = start("cuda_vmm", FAKE_CUDA_LOADED=str(flag))
    wait_until(lambda: gpu_status(daemon)["state"] == "ready", "the GPU is open")
    assert flag.exists()
