"""Layers that are copied to a GPU while they are read: real daemons, disks that hang and fail.

The disk stops before a block that the test names. So what has to be on the GPU by then is known.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import OpenedOnGpu, Refused, wait_until, write_pack
from tests.daemon.gpu.test_daemon_on_cuda import read_handle
from tests.daemon.gpu.test_two_processes import SITE
from tests.daemon.gpu_daemon import gpu_status, on_gpu
from tests.e2e.footprint import memfd_bytes
from tierd.gpu.kinds import KINDS
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from tests.daemon.conftest import PackOnDisk, RunningDaemon
    from tests.daemon.gpu_daemon import Connect, Start

MIB = 1 << 20
BLOCKS, LAYERS = 3, 3
LAYER_BYTES = BLOCKS * BLOCK_BYTES
BUDGET = 2 * LAYER_BYTES

#: `python -m tierd` whose reads at an offset wait or fail while a file says so.
_DISK = """
import os, sys, time
from pathlib import Path
said, really = Path({said!r}), os.preadv

def preadv(fd, targets, offset):
    while True:
        try:
            what, at = said.read_text().split()
        except FileNotFoundError:
            break
        if offset != int(at):
            break
        if what == "fail":
            raise OSError(5, "Input/output error")
        time.sleep(0.005)
    return really(fd, targets, offset)

os.preadv = preadv
{more}
from tierd.__main__ import main
sys.exit(main())
"""


class Disk:
    def __init__(self, folder: Path, pack: PackOnDisk) -> None:
        self.said = folder / "disk"
        self._pack = pack

    def do(self, what: str, layer: int, block: int) -> None:
        """ "wait" before a block of a layer, or "fail" there."""
        (extent,) = self._pack.index.layers[layer].extents
        new = self.said.with_suffix(".new")
        new.write_text(f"{what} {extent.offset + block * BLOCK_BYTES}")
        new.rename(self.said)

    def go_on(self) -> None:
        self.said.unlink()


@pytest.fixture
def pack(models: Path) -> PackOnDisk:
    return write_pack(models / "m", LAYERS, LAYER_BYTES)


@pytest.fixture
def disk(tmp_path: Path, pack: PackOnDisk) -> Disk:
    return Disk(tmp_path, pack)


@pytest.fixture
def start(start_daemon: Start, models: Path, disk: Disk) -> Start:
    def start(*more: str, device: str = "memfd", body: str = "", **options: Any) -> RunningDaemon:
        program = _DISK.format(said=str(disk.said), more=body)
        return start_daemon(
            "--models", models, "--dram", str(BUDGET), "--gpu", f"0={BUDGET}",
            "--gpu-device", device, "--gpu-chunk", str(2 * MIB),
            "--readers", "2", "--read-chunk", str(BLOCK_BYTES), *more,
            program=("-c", program), environ={"PYTHONPATH": str(SITE)}, **options,
        )  # fmt: skip

    return start


def ask(opened: OpenedOnGpu, layer: int) -> int:
    return opened.client.send("acquire", model_id=opened.model_id, layer=layer)


def wait_copied(daemon: RunningDaemon, blocks: int, gpu: int = 0) -> None:
    nbytes = blocks * BLOCK_BYTES
    wait_until(
        lambda: gpu_status(daemon, gpu)["copied_bytes"] == nbytes, f"{blocks} blocks are there"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_verified_is_on_the_gpu_before_the_rest_is_read_and_the_grant_waits_for_all(
    start: Start, connect: Connect, disk: Disk, pack: PackOnDisk, kind: str
) -> None:
    daemon = start(device=kind)
    opened = on_gpu(connect, daemon)
    disk.do("wait", layer=1, block=2)
    request = ask(opened, 1)
    wait_copied(daemon, 2)
    status = gpu_status(daemon)
    assert (status["copies"], status["resident_bytes"]) == (0, 0)
    assert status["in_flight_bytes"] == LAYER_BYTES
    assert opened.client.call("status")["ssd"]["read_bytes"] >= 2 * BLOCK_BYTES
    disk.go_on()
    lease = opened.client.receive(request)
    read = read_handle if kind == "cuda_ipc" else OpenedOnGpu.bytes_of
    assert read(opened, lease) == pack.content[1]
    assert gpu_status(daemon)["copied_bytes"] == LAYER_BYTES
    assert gpu_status(daemon)["copies"] == 1


def test_two_gpus_follow_one_read(
    start: Start, connect: Connect, disk: Disk, pack: PackOnDisk
) -> None:
    daemon = start("--gpu", f"1={BUDGET}")
    wait_until(lambda: gpu_status(daemon, 1)["state"] == "ready", "it is open")
    models = [connect(daemon, tier=f"gpu:{number}").open("m") for number in (0, 1)]
    disk.do("wait", layer=0, block=2)
    requests = [model.client.send("acquire", model_id=model.model_id, layer=0) for model in models]
    for number in (0, 1):
        wait_copied(daemon, 2, number)
    disk.go_on()
    for model, request in zip(models, requests, strict=True):
        assert model.bytes_of(model.client.receive(request)) == pack.content[0]
    assert daemon.status()["ssd"]["reads"] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["the disk fails", "the last block is corrupt"])
def test_a_read_that_fails_at_its_last_block_is_the_answer_and_the_slot_is_used_again(
    start: Start, connect: Connect, disk: Disk, pack: PackOnDisk, kind: str, how: str
) -> None:
    daemon = start(device=kind)
    opened = on_gpu(connect, daemon)
    disk.do("wait", layer=1, block=2)
    request = ask(opened, 1)
    wait_copied(daemon, 2)
    if how == "the disk fails":
        disk.do("fail", layer=1, block=2)
    else:
        pack.flip_byte(1, at=LAYER_BYTES - 1)
        disk.go_on()
    with pytest.raises(Refused) as refused:
        opened.client.receive(request)
    if how == "the disk fails":
        assert refused.value.code == "read_failed"
        assert "EIO" in refused.value.text
        disk.go_on()
    else:
        assert refused.value.code == "checksum_mismatch"
        assert "block 2 of 3" in refused.value.text
    assert daemon.log_text().count("ERROR") == 1, "said once, by the reader"
    read = read_handle if kind == "cuda_ipc" else OpenedOnGpu.bytes_of
    for layer in (2, 0) if how == "the last block is corrupt" else (1, 2, 0):
        lease = opened.acquire(layer)
        assert read(opened, lease) == pack.content[layer]
        opened.release(lease)
    status = gpu_status(daemon)
    assert (status["copies_failed"], status["in_flight_bytes"]) == (1, 0)


def test_a_gpu_that_refuses_a_block_while_the_disk_reads_on_fails_that_layer_alone(
    start: Start, connect: Connect, disk: Disk, pack: PackOnDisk, tmp_path: Path
) -> None:
    flag = tmp_path / "refuse"
    body = f"""
from tierd.gpu import memfd_device
from tierd.gpu.errors import DeviceError
copying = memfd_device.MemfdDevice.copy
def copy(self, arena, offset, source):
    if os.path.exists({str(flag)!r}):
        raise DeviceError("gpu:0: no copy")
    return copying(self, arena, offset, source)
memfd_device.MemfdDevice.copy = copy
"""
    daemon = start(body=body)
    opened, dram = on_gpu(connect, daemon), connect(daemon).open("m")
    disk.do("wait", layer=0, block=1)
    request = ask(opened, 0)
    waits = dram.client.send("acquire", model_id=dram.model_id, layer=0)
    wait_until(lambda: gpu_status(daemon)["copied_bytes"] > 0, "a block is there")
    flag.touch()
    disk.do("wait", layer=0, block=2)  # and the second is read, so copied
    wait_until(lambda: "no copy" in daemon.log_text(), "it was refused")
    disk.go_on()
    with pytest.raises(Refused, match=r"copy_failed: .*gpu:0: no copy"):
        opened.client.receive(request)
    lease = dram.client.receive(waits)
    assert dram.bytes_of(lease) == pack.content[0]
    flag.unlink()
    lease = opened.acquire(0)
    assert opened.bytes_of(lease) == pack.content[0]


def test_a_model_that_is_removed_while_it_is_copied_frees_the_gpu_before_its_read_ends(
    start: Start, connect: Connect, disk: Disk, pack: PackOnDisk, models: Path
) -> None:
    other = write_pack(models / "other", 2, LAYER_BYTES, seed=5)
    daemon = start()
    opened, others = on_gpu(connect, daemon), on_gpu(connect, daemon, "other")
    disk.do("wait", layer=1, block=2)
    request = ask(opened, 1)
    wait_copied(daemon, 2)
    pack.path.rename(models.parent / "aside")
    assert daemon.ask("reload")["removed"] == ["m"]
    with pytest.raises(Refused) as refused:
        opened.client.receive(request)
    assert refused.value.code == "model_removed"
    wait_until(lambda: gpu_status(daemon)["in_flight_bytes"] == 0, "the copy was stopped")
    assert daemon.status()["dram"]["in_flight_bytes"] == LAYER_BYTES, "its read goes on"
    lease = others.acquire(0)
    assert others.bytes_of(lease) == other.content[0]
    disk.go_on()
    wait_until(lambda: daemon.status()["dram"]["in_flight_bytes"] == 0, "the read has ended")
    others.release(lease)
    lease = others.acquire(1)
    assert others.bytes_of(lease) == other.content[1]
    assert gpu_status(daemon)["copies_failed"] == 0
    assert "Traceback" not in daemon.log_text()


def test_a_client_that_dies_while_its_layer_is_copied_leaves_nothing_taken(
    start: Start, connect: Connect, disk: Disk, pack: PackOnDisk
) -> None:
    daemon = start()
    opened, other = on_gpu(connect, daemon), on_gpu(connect, daemon)
    disk.do("wait", layer=0, block=2)
    ask(opened, 0)
    wait_copied(daemon, 2)
    opened.client.close()
    disk.go_on()
    wait_until(lambda: gpu_status(daemon)["in_flight_bytes"] == 0, "the copy has ended")
    for layer in (1, 2, 0):
        lease = other.acquire(layer)
        assert other.bytes_of(lease) == pack.content[layer]
        other.release(lease)
        other.obey()
    status = daemon.status()
    assert status["dram"]["leased_bytes"] == status["gpus"][0]["leased_bytes"] == 0


def test_a_clean_stop_in_the_middle_of_a_read_answers_who_waits(
    start: Start, connect: Connect
) -> None:
    daemon = start("--ssd-bandwidth", "4MiB/s")  # the first block at once, the others in 2 s
    opened = on_gpu(connect, daemon)
    request = ask(opened, 0)
    wait_until(lambda: gpu_status(daemon)["copied_bytes"] > 0, "a block is there")
    daemon.process.terminate()
    with pytest.raises(Refused) as refused:
        opened.client.receive(request)
    assert refused.value.code == "shutting_down"
    assert daemon.process.wait(20) == 0
    assert "Traceback" not in daemon.log_text()


def test_a_daemon_that_is_killed_in_the_middle_leaves_no_memory_and_its_successor_serves(
    start: Start, connect: Connect, disk: Disk, pack: PackOnDisk
) -> None:
    daemon = start()
    opened = on_gpu(connect, daemon)
    disk.do("wait", layer=1, block=2)
    ask(opened, 1)
    wait_copied(daemon, 2)
    assert memfd_bytes((daemon.pid,), "tierd-gpu") == LAYER_BYTES
    daemon.kill()
    assert memfd_bytes((os.getpid(),), "tierd-gpu") == 0, "nobody was handed a part of it"
    with pytest.raises((EOFError, ConnectionResetError, BrokenPipeError)):
        opened.client.call("status")
    disk.go_on()
    successor = start()
    again = on_gpu(connect, successor)
    for layer in (1, 0, 2):
        lease = again.acquire(layer)
        assert again.bytes_of(lease) == pack.content[layer]
        again.release(lease)
        again.obey()
