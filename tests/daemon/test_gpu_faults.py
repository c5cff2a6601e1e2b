"""GPUs that do not open, that refuse memory or copies, that hang."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import Refused, wait_until, write_pack
from tests.daemon.gpu_daemon import (
    CHUNK,
    LAYER_BYTES,
    LAYER_MEMORY,
    LAYERS,
    arguments,
    gpu_status,
    obey_until_kept,
    on_gpu,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.daemon.conftest import PackOnDisk, RunningDaemon
    from tests.daemon.gpu_daemon import Connect, Start


#: `python -m tierd` whose memfd device does what {body} makes of it while a file exists.
_FAULTY = """
import sys, time
from pathlib import Path
from tierd.gpu import memfd_device
from tierd.gpu.errors import DeviceError, DeviceLost, DeviceUnavailable, OutOfDeviceMemory

flag, Device = Path({flag!r}), memfd_device.MemfdDevice
really = {{name: getattr(Device, name) for name in ("open", "back", "free", "export", "copy")}}

{body}
from tierd.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def pack(models: Path) -> PackOnDisk:
    return write_pack(models / "m", LAYERS, LAYER_BYTES)


@pytest.fixture
def start_faulty(start_daemon: Start, models: Path, pack: PackOnDisk, tmp_path: Path) -> Start:
    """Starts a daemon whose device has the faults of a text while the file "fault" exists."""
    flag = tmp_path / "fault"
    flag.touch()

    def start(body: str, *more: str, **options: Any) -> RunningDaemon:
        program = _FAULTY.format(flag=str(flag), body=body)
        return start_daemon(*arguments(models), *more, program=("-c", program), **options)

    return start


def test_a_device_that_does_not_open_is_said_to_be_and_dram_is_served(
    start_faulty: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start_faulty(
        """
def open(self):
    raise DeviceUnavailable("there is no driver", "install one")
Device.open = open
"""
    )
    wait_until(lambda: gpu_status(daemon)["state"] == "failed", "it failed")
    assert gpu_status(daemon)["reason"] == "there is no driver: install one"
    assert "tier gpu:0 is not served: there is no driver: install one" in daemon.status()["notes"]
    refusal = connect(daemon, greet=False).refusal(
        "hello", version=1, client="x", capabilities=[], held=[], tier="gpu:0"
    )
    assert refusal.code == "tier_unavailable"
    assert "there is no driver: install one" in refusal.text
    refusal = connect(daemon, greet=False).refusal("budget", tier="gpu:0", bytes=CHUNK)
    assert refusal.code == "tier_unavailable"
    opened = connect(daemon).open("m")
    assert opened.bytes_of(opened.acquire(0)) == pack.content[0]


_SLOW_TO_OPEN = """
def open(self):
    while flag.exists():
        time.sleep(0.01)
    return really["open"](self)
Device.open = open
"""


def test_the_daemon_is_ready_before_its_gpu_and_clients_of_that_wait(
    start_faulty: Start, connect: Connect, pack: PackOnDisk, tmp_path: Path
) -> None:
    daemon = start_faulty(_SLOW_TO_OPEN)
    assert gpu_status(daemon)["state"] == "opening"
    dram = connect(daemon).open("m")
    assert dram.bytes_of(dram.acquire(1)) == pack.content[1]
    client, gone = connect(daemon, greet=False), connect(daemon, greet=False)
    hello: dict[str, Any] = {"version": 1, "client": "x", "capabilities": [], "tier": "gpu:0"}
    request = client.send("hello", **hello)
    gone.send("hello", **hello)
    assert client.refusal("hello", **hello).code == "bad_request"
    assert client.refusal("open", model="m").code == "bad_request"
    assert client.refusal("budget", tier="gpu:0", bytes=CHUNK).code == "tier_unavailable"
    gone.close()
    (tmp_path / "fault").unlink()
    assert client.receive(request)["tier"] == "gpu:0"
    opened = client.open("m")
    assert opened.bytes_of(opened.acquire(2)) == pack.content[2]
    assert len(daemon.ask("clients")["clients"]) == 2


def test_only_so_many_requests_of_a_connection_wait_for_a_gpu(
    start_faulty: Start, connect: Connect, tmp_path: Path
) -> None:
    """A model of other readers: its arena is made while clients open it."""
    daemon = start_faulty(
        """
def add_arena(self, arena, span_bytes):
    while flag.exists():
        time.sleep(0.01)
    return Device.adding(self, arena, span_bytes)
Device.adding, Device.add_arena = Device.add_arena, add_arena
"""
    )
    client = connect(daemon, tier="gpu:0")
    requests = [client.send("open", model="m") for _ in range(16)]
    refusal = client.refusal("open", model="m")
    assert (refusal.code, refusal.text) == (
        "bad_request",
        "16 requests wait for gpu:0, which is the limit",
    )
    (tmp_path / "fault").unlink()
    assert {client.receive(request)["model_id"] for request in requests} == {1}
    for fd in client.take_fds():
        os.close(fd)


def test_who_waits_for_a_gpu_is_answered_when_the_daemon_stops(
    start_faulty: Start, connect: Connect, tmp_path: Path
) -> None:
    daemon = start_faulty(_SLOW_TO_OPEN)
    client = connect(daemon, greet=False)
    request = client.send("hello", version=1, client="x", capabilities=[], tier="gpu:0")
    client.call("status")
    daemon.process.terminate()
    time.sleep(0.3)
    (tmp_path / "fault").unlink()
    with pytest.raises(Exception, match="shutting_down"):
        client.receive(request)
    assert daemon.process.wait(20) == 0


def test_a_copy_that_fails_is_an_answer_and_the_next_one_works(
    start_faulty: Start, connect: Connect, pack: PackOnDisk, tmp_path: Path
) -> None:
    daemon = start_faulty(
        """
def back(self, arena, first, count):
    if flag.exists():
        raise OutOfDeviceMemory("no memory for a chunk")
    really["back"](self, arena, first, count)
Device.back = back
"""
    )
    opened = on_gpu(connect, daemon)
    refusal = opened.client.refusal("acquire", model_id=opened.model_id, layer=0)
    assert refusal.code == "copy_failed"
    assert "'model.layers.0'" in refusal.text
    assert "no memory for a chunk" in refusal.text
    assert gpu_status(daemon)["reason"] == "no memory for a chunk"
    assert daemon.status()["dram"]["leased_bytes"] == 0, "the copy's lease in DRAM ended"
    (tmp_path / "fault").unlink()
    lease = opened.acquire(0)
    assert opened.bytes_of(lease) == pack.content[0]
    assert gpu_status(daemon)["reason"] == ""


def test_chunks_that_cannot_be_exported_are_refused_and_not_waited_for(
    start_faulty: Start, connect: Connect, pack: PackOnDisk, tmp_path: Path
) -> None:
    daemon = start_faulty(
        """
def export(self, arena, chunk):
    if flag.exists() and chunk % 2:
        raise DeviceError("no descriptor is left")
    return really["export"](self, arena, chunk)
Device.export = export
"""
    )
    opened = on_gpu(connect, daemon)
    lease = opened.acquire(0)
    numbers = opened.chunks_of(lease)
    before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    refusal = opened.client.refusal("chunks", arena=opened.number, chunks=numbers)
    assert (refusal.code, refusal.text) == ("copy_failed", "no descriptor is left")
    assert len(os.listdir(f"/proc/{daemon.pid}/fd")) == before
    (tmp_path / "fault").unlink()
    assert opened.bytes_of(lease) == pack.content[0]


def test_a_client_that_asks_for_chunks_and_reads_no_answer_costs_few_descriptors(
    start_faulty: Start, connect: Connect, tmp_path: Path
) -> None:
    daemon = start_faulty(
        """
def export(self, arena, chunk):
    while flag.exists():
        time.sleep(0.01)
    return really["export"](self, arena, chunk)
Device.export = export
"""
    )
    opened = on_gpu(connect, daemon)
    numbers = opened.chunks_of(opened.acquire(0))
    requests = [
        opened.client.send("chunks", arena=opened.number, chunks=numbers) for _ in range(17)
    ]
    with pytest.raises(Refused, match="16 requests for chunks wait already"):
        opened.client.receive(requests.pop())
    (tmp_path / "fault").unlink()
    for request in requests:
        opened.client.receive(request)
    for fd in opened.client.take_fds():
        os.close(fd)
    before = len(os.listdir(f"/proc/{daemon.pid}/fd"))
    opened.client.sock.settimeout(0.2)
    with contextlib.suppress(OSError):
        while True:
            opened.client.send("chunks", arena=opened.number, chunks=numbers)
            assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < before + 400
    wait_until(lambda: daemon.status()["clients"] == 0, "it is disconnected")
    assert "256 descriptors" in daemon.log_text()


def test_memory_that_the_driver_does_not_take_back_counts_until_it_does(
    start_faulty: Start, connect: Connect, tmp_path: Path
) -> None:
    daemon = start_faulty(
        """
def free(self, arena, first, count):
    if flag.exists():
        raise DeviceError("the driver is busy")
    really["free"](self, arena, first, count)
Device.free = free
"""
    )
    opened = on_gpu(connect, daemon)
    for layer in range(3):
        opened.release(opened.acquire(layer))
    assert gpu_status(daemon)["used_bytes"] == 3 * LAYER_MEMORY
    daemon.ask("budget", tier="gpu:0", bytes=2 * LAYER_MEMORY)
    wait_until(lambda: gpu_status(daemon)["reason"] == "the driver is busy", "it failed")
    assert gpu_status(daemon)["above_budget_bytes"] == LAYER_MEMORY
    (tmp_path / "fault").unlink()
    wait_until(lambda: gpu_status(daemon)["above_budget_bytes"] == 0, "it was offered again")
    assert gpu_status(daemon)["backed_bytes"] == 2 * LAYER_MEMORY
    assert gpu_status(daemon)["reason"] == ""


def test_a_gpu_that_is_lost_takes_no_more_clients(
    start_faulty: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start_faulty(
        """
def copy(self, arena, offset, source):
    raise DeviceLost("the context is broken")
Device.copy = copy
"""
    )
    opened = on_gpu(connect, daemon)
    refusal = opened.client.refusal("acquire", model_id=opened.model_id, layer=0)
    assert refusal.code == "copy_failed"
    status = gpu_status(daemon)
    assert (status["state"], status["reason"]) == ("failed", "the context is broken")
    refusal = connect(daemon, greet=False).refusal("hello", version=1, client="x", tier="gpu:0")
    assert refusal.code == "tier_unavailable"
    dram = connect(daemon).open("m")
    assert dram.bytes_of(dram.acquire(1)) == pack.content[1]


def test_a_gpu_that_hangs_is_named_and_the_others_are_served(
    start_faulty: Start, connect: Connect, pack: PackOnDisk, tmp_path: Path
) -> None:
    daemon = start_faulty(
        """
from tierd.gpu import worker
worker.SILENT_NS = 0
def back(self, arena, first, count):
    while flag.exists() and self.number == 0:
        time.sleep(0.01)
    really["back"](self, arena, first, count)
Device.back = back
""",
        "--gpu", f"1={12 << 20}",
    )  # fmt: skip
    opened = on_gpu(connect, daemon)
    request = opened.client.send("acquire", model_id=opened.model_id, layer=0)
    wait_until(
        lambda: [note for note in daemon.status()["notes"] if "gpu:0" in note], "it is named"
    )
    other = connect(daemon, tier="gpu:1").open("m")
    dram = connect(daemon).open("m")
    for layer in range(LAYERS):
        for model in (other, dram):
            lease = model.acquire(layer)
            assert model.bytes_of(lease) == pack.content[layer]
            model.release(lease)
    (tmp_path / "fault").unlink()
    assert opened.bytes_of(opened.client.receive(request)) == pack.content[0]


def test_a_gpu_that_is_full_is_opened_when_its_memory_is_free(
    start_faulty: Start, connect: Connect, pack: PackOnDisk, tmp_path: Path
) -> None:
    daemon = start_faulty(
        """
from tierd import gpu_tier
from tierd.gpu.errors import DeviceFull
gpu_tier.RETRY_SECONDS = 0.1
def open(self):
    if flag.exists():
        raise DeviceFull("1 GiB of 20 are free", "wait")
    return really["open"](self)
Device.open = open
"""
    )
    wait_until(lambda: gpu_status(daemon)["state"] == "failed", "it failed")
    refusal = connect(daemon, greet=False).refusal("hello", version=1, client="x", tier="gpu:0")
    assert "1 GiB of 20 are free" in refusal.text
    time.sleep(0.5)
    assert daemon.log_text().count("1 GiB of 20 are free") == 1, "it is said once"
    (tmp_path / "fault").unlink()
    wait_until(lambda: gpu_status(daemon)["state"] == "ready", "it was tried again")
    assert gpu_status(daemon)["reason"] == ""
    opened = on_gpu(connect, daemon)
    assert opened.bytes_of(opened.acquire(0)) == pack.content[0]


def test_a_client_that_never_answers_is_disconnected_and_the_others_go_on(
    start_faulty: Start, connect: Connect, pack: PackOnDisk
) -> None:
    daemon = start_faulty("from tierd import gpu_memory\ngpu_memory.PATIENCE_SECONDS = 0.5")
    wait_until(lambda: gpu_status(daemon)["state"] == "ready", "it is open")
    daemon.ask("budget", tier="gpu:0", bytes=LAYERS * LAYER_MEMORY)
    stopped, other = on_gpu(connect, daemon), on_gpu(connect, daemon)
    for layer in range(LAYERS):
        lease = stopped.acquire(layer)
        stopped.bytes_of(lease)
        stopped.release(lease)
    daemon.ask("budget", tier="gpu:0", bytes=3 * LAYER_MEMORY)
    for layer in (3, 4, 5, 0):
        lease = other.acquire(layer)
        assert other.bytes_of(lease) == pack.content[layer]
        other.release(lease)
        other.obey()

    obey_until_kept(other, daemon, "the budget is kept")
    assert "and did not answer for" in daemon.log_text()
    with pytest.raises((EOFError, ConnectionResetError, BrokenPipeError)):
        stopped.client.call("status")


def test_a_daemon_whose_copy_never_ends_stops_all_the_same(
    start_faulty: Start, connect: Connect
) -> None:
    daemon = start_faulty(
        """
from tierd.gpu.worker import GpuWorker
GpuWorker.close.__defaults__ = (0.3,)
def back(self, arena, first, count):
    print("under way", flush=True)
    time.sleep(60)
Device.back = back
"""
    )
    opened = on_gpu(connect, daemon)
    opened.client.send("acquire", model_id=opened.model_id, layer=0)
    wait_until(lambda: "under way" in daemon.log_text(), "the copy is under way")
    begin = time.monotonic()
    assert daemon.stop() == 1
    assert time.monotonic() - begin < 15
    assert "stopped all the same" in daemon.log_text()
    assert "Traceback" not in daemon.log_text()
