"""Daemons that read into GPUs past DRAM, over a CUDA driver and a libcufile that are played.

The played cuFile counts its reads as the real one does; "GPU memory" is memory of the daemon.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import OpenedOnGpu, Refused, wait_until, write_pack
from tests.daemon.gpu.test_daemon_on_cuda import read_handle
from tests.daemon.gpu.test_two_processes import SITE
from tests.daemon.gpu_daemon import gpu_status
from tests.daemon.played_cufile import build
from tierd.gpu_settings import PLAYED_VARIABLE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.daemon.conftest import PackOnDisk, RunningDaemon
    from tests.daemon.gpu_daemon import Connect, Start

MIB = 1 << 20
LAYERS, LAYER_BYTES, CHUNK = 6, 5 * MIB, 2 * MIB  # a block and a part of one, over three chunks
BUDGET = 18 * MIB  # three layers
KINDS = ["cuda_vmm", "cuda_ipc", "memfd"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cufile"))


@pytest.fixture
def pack(models: Path) -> PackOnDisk:
    return write_pack(models / "m", LAYERS, LAYER_BYTES)


@pytest.fixture
def start(start_daemon: Start, models: Path, pack: PackOnDisk, library: Path) -> Start:
    def start(device: str, *more: str, **environ: str) -> RunningDaemon:
        return start_daemon(
            "--models", models, "--dram", str(BUDGET), "--gpu", f"0={BUDGET}",
            "--gpu-device", device, "--gpu-chunk", str(CHUNK), "--gpu-direct", *more,
            environ={"PYTHONPATH": str(SITE), PLAYED_VARIABLE: str(library), **environ},
        )  # fmt: skip

    return start


def on_gpu(connect: Connect, daemon: RunningDaemon, tier: str = "gpu:0") -> OpenedOnGpu:
    wait_until(lambda: gpu_status(daemon, int(tier[-1]))["state"] != "opening", "it is open")
    opened = connect(daemon, tier=tier).open("m")
    assert isinstance(opened, OpenedOnGpu)
    return opened


def content(opened: OpenedOnGpu, lease: dict[str, Any], kind: str) -> bytes:
    return (read_handle if kind == "cuda_ipc" else OpenedOnGpu.bytes_of)(opened, lease)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_arrives_with_its_bytes_and_nothing_of_it_passes_dram(
    start: Start, connect: Connect, pack: PackOnDisk, kind: str
) -> None:
    daemon = start(kind)
    opened = on_gpu(connect, daemon)
    opened.plan(list(range(LAYERS)))
    for layer in [*range(LAYERS), 2, 0]:
        lease = opened.acquire(layer)
        assert content(opened, lease, kind) == pack.content[layer]
        opened.release(lease)
        if kind != "cuda_ipc":
            opened.obey()
    status = daemon.status()
    (gpu,) = status["gpus"]
    assert gpu["direct"]["layers"] >= LAYERS
    assert gpu["direct"]["bytes"] == gpu["direct"]["layers"] * LAYER_BYTES
    assert gpu["direct"]["cufile_bytes"] >= gpu["direct"]["bytes"]
    assert gpu["direct"]["cufile_direct_reads"] > gpu["direct"]["layers"]
    assert (gpu["direct"]["cufile_posix_reads"], gpu["direct"]["failed"]) == (0, 0)
    assert (gpu["copies"], gpu["copied_bytes"]) == (0, 0)
    assert (status["dram"]["resident_bytes"], status["ssd"]["reads"]) == (0, 0)
    assert any("cuFile is played by" in note for note in status["notes"])
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log_text()


def test_a_layer_that_dram_has_is_copied_from_there(
    start: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start("cuda_vmm")
    here, there = connect(daemon).open("m"), on_gpu(connect, daemon)
    held = here.acquire(3)
    lease = there.acquire(3)
    assert there.bytes_of(lease) == here.bytes_of(held) == pack.content[3]
    gpu = gpu_status(daemon)
    assert (gpu["copies"], gpu["direct"]["layers"]) == (1, 0)
    lease = there.acquire(4)
    assert there.bytes_of(lease) == pack.content[4]
    assert gpu_status(daemon)["direct"]["layers"] == 1


def test_two_gpus_are_read_into_by_one_thread_that_proves_each_layer(
    start: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start("cuda_vmm", "--gpu", f"1={BUDGET}", FAKE_CUDA_GPUS="2")
    models = [on_gpu(connect, daemon, tier) for tier in ("gpu:0", "gpu:1")]
    requests = [
        (model, layer, model.client.send("acquire", model_id=model.model_id, layer=layer))
        for layer in (0, 1)
        for model in models
    ]
    for model, layer, request in requests:
        assert model.bytes_of(model.client.receive(request)) == pack.content[layer]
    for number in (0, 1):
        direct = gpu_status(daemon, number)["direct"]
        assert (direct["layers"], direct["failed"]) == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_that_was_not_direct_fails_its_layer_and_all_later_ones_aloud(
    start: Start, connect: Connect, kind: str
) -> None:
    daemon = start(kind, FAKE_POSIX="1")
    opened = on_gpu(connect, daemon)
    for layer, said in ((0, "this is not direct"), (1, "is not read: cuFile counted 0 direct")):
        refusal = opened.client.refusal("acquire", model_id=opened.model_id, layer=layer)
        assert refusal.code == "read_failed"
        assert said in refusal.text
        assert f"'model.layers.{layer}'" in refusal.text
    gpu = gpu_status(daemon)
    assert "cuFile counted 0 direct reads and" in gpu["reason"]
    assert (gpu["direct"]["failed"], gpu["direct"]["layers"]) == (2, 0)
    assert gpu["direct"]["cufile_posix_reads"] > 0
    assert daemon.status()["ssd"]["reads"] == 0, "it was not read another way"
    why = daemon.ask("why", model="m", layer=0, tier="gpu:0")
    assert "this is not direct" in str(why["history"])


def test_a_machine_where_it_does_not_work_does_not_serve_the_gpu_and_says_why(
    start: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start("cuda_vmm", FAKE_OPEN="5001")
    wait_until(lambda: gpu_status(daemon)["state"] == "failed", "it failed")
    reason = gpu_status(daemon)["reason"]
    assert reason.startswith("gpu_direct: cuFileDriverOpen: the nvidia-fs driver is not loaded")
    refusal = connect(daemon, greet=False).refusal("hello", version=1, client="x", tier="gpu:0")
    assert refusal.code == "tier_unavailable"
    assert "the nvidia-fs driver is not loaded" in refusal.text
    dram = connect(daemon).open("m")
    assert dram.bytes_of(dram.acquire(0)) == pack.content[0]


def test_without_the_library_the_gpu_is_not_served(start: Start, tmp_path: Path) -> None:
    daemon = start("cuda_vmm", **{PLAYED_VARIABLE: str(tmp_path / "none.so")})
    wait_until(lambda: gpu_status(daemon)["state"] == "failed", "it failed")
    assert "gpu_direct: cuFile cannot be loaded" in gpu_status(daemon)["reason"]


def test_a_corrupt_layer_is_refused_and_the_others_are_served(
    start: Start, connect: Connect, pack: PackOnDisk
) -> None:
    pack.flip_byte(2, at=LAYER_BYTES - 1)
    daemon = start("cuda_vmm")
    opened = on_gpu(connect, daemon)
    refusal = opened.client.refusal("acquire", model_id=opened.model_id, layer=2)
    assert refusal.code == "checksum_mismatch"
    assert "block 1 of 2" in refusal.text
    for layer in (0, 1, 3):
        lease = opened.acquire(layer)
        assert opened.bytes_of(lease) == pack.content[layer]
        opened.release(lease)
        opened.obey()
    assert gpu_status(daemon)["in_flight_bytes"] == 0


def test_a_gpu_without_memory_fails_the_layer_before_anything_is_read(
    start: Start, connect: Connect, pack: PackOnDisk, tmp_path: Path
) -> None:
    flag = tmp_path / "fault"
    daemon = start("cuda_vmm", FAKE_CUDA_FAULTS=f"{flag} cuMemCreate=2")
    opened = on_gpu(connect, daemon)
    flag.touch()
    refusal = opened.client.refusal("acquire", model_id=opened.model_id, layer=1)
    assert refusal.code == "copy_failed"
    assert gpu_status(daemon)["direct"]["cufile_bytes"] == 0
    flag.unlink()
    lease = opened.acquire(1)
    assert opened.bytes_of(lease) == pack.content[1]


def test_a_model_that_is_replaced_is_read_from_its_new_files_and_the_old_ones_are_closed(
    start: Start, connect: Connect, pack: PackOnDisk, models: Path
) -> None:
    daemon = start("cuda_vmm")
    opened = on_gpu(connect, daemon)
    opened.release(opened.acquire(0))
    pack.path.rename(models.parent / "old")
    new = write_pack(models / "m", LAYERS, LAYER_BYTES, seed=9)
    assert daemon.ask("reload")["replaced"] == ["m"]
    opened.client.close()
    again = on_gpu(connect, daemon)
    lease = again.acquire(0)
    assert again.bytes_of(lease) == new.content[0]

    def kept() -> bool:
        fds = f"/proc/{daemon.pid}/fd"
        paths = []
        for fd in os.listdir(fds):
            try:
                paths.append(os.readlink(f"{fds}/{fd}"))
            except FileNotFoundError:
                continue
        return not any(path.startswith(str(models.parent / "old")) for path in paths)

    wait_until(kept, "no file of the old one is open")


def test_a_clean_stop_while_layers_are_read_answers_who_waits(
    start: Start, connect: Connect
) -> None:
    daemon = start("cuda_vmm", FAKE_READ_MS="60")
    opened = on_gpu(connect, daemon)
    requests = [
        opened.client.send("acquire", model_id=opened.model_id, layer=layer) for layer in (0, 1)
    ]
    wait_until(lambda: gpu_status(daemon)["in_flight_bytes"], "it is being read")
    daemon.process.terminate()
    for request in requests:
        with pytest.raises(Refused) as refused:
            opened.client.receive(request)
        assert refused.value.code == "shutting_down"
    assert daemon.process.wait(30) == 0
    assert "Traceback" not in daemon.log_text()
