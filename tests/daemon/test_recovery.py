"""Warm starts: what an earlier daemon left is used, checked, and not taken from who reads it."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import PackOnDisk, RawClient, RunningDaemon, wait_until, write_pack
from tierd.access import AccessGroup
from tierd.core.model import LayerKey, Read
from tierd.io.process import start_time
from tierd.recovery import Orphans, arena_name, living, match
from tierd.slots import Slots
from tierd_layouts.slot_entries import LeaseEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Connect = Callable[..., RawClient]

MIB = 1 << 20


class FakeSystemd:
    """Keeps what a service stores, and passes it to the next one."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.store: dict[str, int] = {}
        self.said: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4 * 16))
            fds = array.array("i")
            for _, _, packed in ancillary:
                fds.frombytes(packed)
            lines = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "END" in lines:
                return
            if "FDSTOREREMOVE" in lines and lines["FDNAME"] in self.store:
                os.close(self.store.pop(lines["FDNAME"]))
            if "FDSTORE" in lines:
                assert lines["FDPOLL"] == "0"
                self.store[lines["FDNAME"]] = fds[0]
            self.said += data.decode().splitlines()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"END=1", self.address)
        self._thread.join()
        self._socket.close()
        for fd in self.store.values():
            os.close(fd)


@dataclass
class Service:
    """A daemon that a fake systemd starts again and again."""

    systemd: FakeSystemd
    start_daemon: Callable[..., RunningDaemon]
    arguments: list[str]
    environ: dict[str, str] = field(default_factory=dict)

    def start(self, **options: Any) -> RunningDaemon:
        environ = {"NOTIFY_SOCKET": self.systemd.address, **self.environ}
        descriptors = dict(self.systemd.store)
        starts = self.systemd.said.count("READY=1")
        daemon = self.start_daemon(
            *self.arguments, environ=environ, descriptors=descriptors, **options
        )
        # READY comes after everything that is to be stored.
        wait_until(lambda: self.systemd.said.count("READY=1") > starts, "systemd heard READY")
        return daemon


@pytest.fixture
def service(
    tmp_path: Path, start_daemon: Callable[..., RunningDaemon], models: Path
) -> Iterator[Service]:
    systemd = FakeSystemd(tmp_path / "notify")
    yield Service(systemd, start_daemon, ["--models", str(models), "--dram", "4MiB"])
    systemd.close()


# A process that survives the daemon: it goes on reading its lease, and does what it is told.
ORPHAN = """
import sys
from tests.daemon.conftest import RawClient
client = RawClient(sys.argv[1])
client.hello()
model = client.open(sys.argv[2])
lease = model.acquire(0)
content = model.bytes_of(lease)
print(lease["lease"], lease["slot"], lease["generation"], flush=True)
for line in sys.stdin:
    match line.split():
        case ["check"]:
            same = model.bytes_of(lease) == content
            alive = model.table.generation(lease["slot"]) == lease["generation"]
            print(same and alive, flush=True)
        case ["hello", *held]:
            client.sock.close()
            again = RawClient(sys.argv[1])
            again.hello(tuple(int(number) for number in held))
            client = again
            print("done", flush=True)
        case ["release", number]:
            client.call("release", leases=[int(number)])
            print("done", flush=True)
"""


class Orphan:
    def __init__(self, daemon: RunningDaemon, model: str) -> None:
        root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        self.process = subprocess.Popen(
            [sys.executable, "-c", ORPHAN, daemon.socket, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        self.lease, self.slot, self.generation = (int(word) for word in self._line().split())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def orphan() -> Iterator[Callable[[RunningDaemon, str], Orphan]]:
    orphans: list[Orphan] = []

    def make(daemon: RunningDaemon, model: str) -> Orphan:
        orphans.append(Orphan(daemon, model))
        return orphans[-1]

    yield make
    for each in orphans:
        each.end()


def read_all(client: RawClient, pack: PackOnDisk) -> list[dict[str, Any]]:
    opened = client.open(pack.name)
    leases = []
    for layer, content in enumerate(pack.content):
        lease = opened.acquire(layer)
        assert opened.bytes_of(lease) == content
        client.call("release", leases=[lease["lease"]])
        leases.append(lease)
    return leases


def test_a_killed_daemon_starts_again_without_reading_what_was_resident(
    service: Service, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 8)
    first = service.start()
    before = read_all(connect(first), pack)
    assert {"table", arena_name(0, AccessGroup.of(os.stat(pack.path / "tierd.json")))} == set(
        service.systemd.store
    )
    first.kill()
    second = service.start()
    after = read_all(connect(second), pack)
    status = second.status()
    assert status["ssd"]["read_bytes"] == 0
    assert status["dram"]["resident_bytes"] == pack.index.pack_bytes
    assert status["dram"]["populated_bytes"] <= status["dram"]["budget_bytes"]
    assert [lease["generation"] for lease in after] == [lease["generation"] for lease in before]
    assert min(lease["lease"] for lease in after) > max(lease["lease"] for lease in before)
    assert status["daemon"]["epoch"] != 0
    assert second.stop() == 0
    third = service.start()  # and after a clean stop
    read_all(connect(third), pack)
    assert third.status()["ssd"]["read_bytes"] == 0


def test_generations_and_leases_go_on_above_those_of_the_earlier_daemon(
    service: Service, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 8, MIB)
    first = service.start()
    client = connect(first)
    before = read_all(client, pack)
    pack.path.rename(models / ".aside")
    client.call("reload")  # no slot is left that could tell
    assert first.status()["dram"]["resident_bytes"] == 0
    first.kill()
    (models / ".aside").rename(pack.path)
    after = read_all(connect(service.start()), pack)
    for counter in ("generation", "lease"):
        assert min(lease[counter] for lease in after) > max(lease[counter] for lease in before)


def test_the_slot_of_an_orphan_is_never_overwritten_until_it_exits(
    service: Service, models: Path, connect: Connect, orphan: Callable[..., Orphan]
) -> None:
    pack = write_pack(models / "tiny", 8, MIB)
    reader = orphan(first := service.start(), "tiny")
    first.kill()
    second = service.start()
    assert second.status()["dram"]["quarantined_bytes"] >= MIB
    assert any("quarantine" in note for note in second.status()["notes"])
    client = connect(second)
    for _ in range(3):
        read_all(client, pack)
    assert reader.tell("check") == "True"
    reader.end()
    wait_until(lambda: not second.status()["dram"]["quarantined_bytes"], "the quarantine ends")
    read_all(client, pack)
    assert second.status()["dram"]["quarantined_bytes"] == 0


def test_an_orphans_slot_of_a_pack_that_is_gone_stays_until_it_exits(
    service: Service, models: Path, connect: Connect, orphan: Callable[..., Orphan]
) -> None:
    gone = write_pack(models / "gone", 2, MIB)
    pack = write_pack(models / "tiny", 8, MIB, seed=1)
    reader = orphan(first := service.start(), "gone")
    first.kill()
    shutil.rmtree(gone.path)
    second = service.start()
    for _ in range(3):
        read_all(connect(second), pack)
    assert reader.tell("check") == "True"
    reader.end()
    wait_until(lambda: not second.status()["dram"]["quarantined_bytes"], "the quarantine ends")


def test_a_holder_that_says_hello_keeps_only_what_it_lists(
    service: Service, models: Path, connect: Connect, orphan: Callable[..., Orphan]
) -> None:
    pack = write_pack(models / "tiny", 8, MIB)
    first = service.start()
    keeps, drops = orphan(first, "tiny"), orphan(first, "tiny")
    first.kill()
    second = service.start()
    assert drops.tell("hello") == "done"
    assert keeps.tell(f"hello {keeps.lease}") == "done"
    client = connect(second)
    assert second.status()["dram"]["quarantined_bytes"] >= MIB
    for _ in range(2):
        read_all(client, pack)
    assert keeps.tell("check") == "True"
    assert keeps.tell(f"release {keeps.lease}") == "done"
    assert second.status()["dram"]["quarantined_bytes"] == 0
    table = client.open("tiny").table
    assert {keeps.lease, drops.lease}.isdisjoint(held.lease for held in table.leases())


def test_a_lease_outlives_two_daemons(
    service: Service, models: Path, connect: Connect, orphan: Callable[..., Orphan]
) -> None:
    pack = write_pack(models / "tiny", 8, MIB)
    reader = orphan(daemon := service.start(), "tiny")
    for _ in range(2):
        daemon.kill()
        daemon = service.start()
        read_all(connect(daemon), pack)
        assert reader.tell("check") == "True"


def test_a_layer_in_quarantine_is_granted_to_others(
    service: Service, models: Path, connect: Connect, orphan: Callable[..., Orphan]
) -> None:
    pack = write_pack(models / "tiny", 2, MIB)
    reader = orphan(first := service.start(), "tiny")
    first.kill()
    opened = connect(service.start()).open("tiny")
    lease = opened.acquire(0)
    assert (lease["slot"], lease["generation"]) == (reader.slot, reader.generation)
    assert opened.bytes_of(lease) == pack.content[0]


def test_a_pack_that_was_replaced_meanwhile_is_read_again(
    service: Service, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 4)
    first = service.start()
    read_all(connect(first), pack)
    first.kill()
    shutil.rmtree(pack.path)
    new = write_pack(pack.path, 4, seed=2)
    second = service.start()
    read_all(connect(second), new)
    assert second.status()["ssd"]["read_bytes"] == new.index.pack_bytes


def test_a_layer_is_not_carried_over_to_other_readers(
    service: Service, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 4)
    first = service.start()
    read_all(connect(first), pack)
    first.kill()
    (pack.path / "tierd.json").chmod(0o600)
    second = service.start()
    read_all(connect(second), pack)
    assert second.status()["ssd"]["read_bytes"] == pack.index.pack_bytes


def test_a_smaller_budget_is_kept_after_a_warm_start(
    service: Service, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 4, MIB)
    first = service.start()
    read_all(connect(first), pack)
    first.kill()
    service.arguments[-1] = "2MiB"
    second = service.start()
    wait_until(lambda: second.status()["dram"]["populated_bytes"] <= 2 * MIB, "it fits")
    read_all(connect(second), pack)
    assert second.status()["dram"]["populated_bytes"] <= 2 * MIB


def test_memory_that_no_slot_was_in_is_given_back_before_anything_is_read(
    service: Service, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 4, MIB)
    first = service.start()
    wait_until(lambda: first.status()["dram"]["populated_bytes"] == 4 * MIB, "it is populated")
    connect(first).open("tiny").acquire(0)
    first.kill()
    second = service.start()
    wait_until(lambda: second.status()["dram"]["populated_bytes"] <= MIB, "only the slot is kept")
    read_all(connect(second), pack)
    assert second.status()["dram"]["populated_bytes"] <= 4 * MIB


@pytest.mark.parametrize("spoil", ["table", "arena", "both", "foreign"])
def test_what_does_not_fit_together_is_a_cold_start_that_says_why(
    service: Service, models: Path, connect: Connect, spoil: str
) -> None:
    pack = write_pack(models / "tiny", 4)
    first = service.start()
    read_all(connect(first), pack)
    first.kill()
    store = service.systemd.store
    arena = next(name for name in store if name != "table")
    if spoil == "table":  # a slot beyond the header's generation
        os.pwrite(store["table"], b"\xff" * 8, 64)
    elif spoil == "arena":
        os.close(store.pop(arena))
    elif spoil == "both":
        os.close(store.pop("table"))
    else:
        with open(pack.path / "config.json", "rb") as file:
            os.dup2(file.fileno(), store[arena])
    second = service.start()
    read_all(connect(second), pack)
    assert second.status()["ssd"]["read_bytes"] == pack.index.pack_bytes
    assert "cold start: " in second.log_text()
    assert set(store) == {"table", arena}
    second.kill()
    third = service.start()  # what the cold start stored is good
    read_all(connect(third), pack)
    assert third.status()["ssd"]["read_bytes"] == 0


# A machine on which the operator enabled larger pages between two starts.
WITH_LARGER_GRANULES = """
import sys
from tierd.__main__ import main
from tierd.io.pages import Pages
Pages.page_bytes = property(lambda pages: 2 << 20)
sys.exit(main())
"""


def test_slots_that_do_not_fit_the_pages_of_today_are_a_cold_start(
    service: Service, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 2, 3 * MIB)
    service.arguments[-1] = "8MiB"
    first = service.start()
    read_all(connect(first), pack)
    first.kill()
    second = service.start(program=("-c", WITH_LARGER_GRANULES))
    assert "cold start: " in second.log_text()
    read_all(connect(second), pack)
    assert second.status()["ssd"]["read_bytes"] == pack.index.pack_bytes
    second.kill()
    third = service.start(program=("-c", WITH_LARGER_GRANULES))
    read_all(connect(third), pack)
    assert third.status()["ssd"]["read_bytes"] == 0


def test_systemd_hears_ready_watchdog_and_stopping(service: Service, models: Path) -> None:
    write_pack(models / "tiny")
    service.environ = {"WATCHDOG_USEC": "150000"}
    daemon = service.start()
    wait_until(lambda: service.systemd.said.count("WATCHDOG=1") >= 3, "the watchdog is pinged")
    assert "READY=1" in service.systemd.said
    assert any(line.startswith("STATUS=1 models") for line in service.systemd.said)
    assert daemon.stop() == 0
    wait_until(lambda: "STOPPING=1" in service.systemd.said, "systemd knows that it stops")


# ------------------------------------------------------------------------------- without a daemon


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots.create(epoch=1)
    yield slots
    slots.close()


def lease_entry(lease: int, pid: int) -> LeaseEntry:
    return LeaseEntry(0, lease, start_time(pid), pid, 0, 1)


def test_a_lease_of_a_reused_pid_is_dead(slots: Slots) -> None:
    me = os.getpid()
    slots.filling(Read(0, 1, LayerKey(0, 0), 0, 0, 4096, "demand"), b"k" * 16)
    slots.resident(0)
    slots.lease(1, pid=me, start_time=start_time(me), slot=0, generation=1)
    slots.lease(2, pid=me, start_time=start_time(me) - 1, slot=0, generation=1)
    slots.lease(3, pid=2**22 + 1, start_time=1, slot=0, generation=1)
    assert [held.lease for held in living(slots)] == [1]
    assert [held.lease for held in slots.table.leases()] == [1]


def test_a_slot_that_was_being_filled_is_forgotten(slots: Slots) -> None:
    slots.filling(Read(7, 1, LayerKey(0, 0), 0, 0, 4096, "demand"), b"k" * 16)
    found = match(slots, (), {0: AccessGroup(0, 0, 0o444)}, ())
    assert found.adopted == []
    assert found.forgotten == [7]


async def test_leases_end_when_their_process_does() -> None:
    ended: list[int] = []
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:  # noqa: ASYNC220
        held = [lease_entry(1, process.pid), lease_entry(2, process.pid)]
        orphans = Orphans(asyncio.get_running_loop(), held, ended.append)
        await asyncio.sleep(0.05)
        assert ended == []
        process.kill()
        for _ in range(500):
            await asyncio.sleep(0.01)
            if len(ended) == 2:
                break
        assert sorted(ended) == [1, 2]
        assert len(orphans) == 0
        orphans.close()


async def test_two_connections_of_a_holder_must_both_close_before_its_lease_ends() -> None:
    ended: list[int] = []
    me = (os.getpid(), start_time(os.getpid()))
    held = [lease_entry(1, me[0]), lease_entry(2, me[0]), lease_entry(3, me[0])]
    orphans = Orphans(asyncio.get_running_loop(), held, ended.append)
    assert orphans.hello(10, me, [1, 2, 99]) == [1, 2]
    assert ended == [3]
    assert orphans.hello(11, me, [1, 2]) == [1, 2]
    orphans.client_gone(10)
    assert ended == [3]
    assert orphans.release(me, 2)
    assert not orphans.release(me, 2)
    assert not orphans.release((me[0], me[1] + 1), 1)
    assert ended == [3, 2]
    orphans.client_gone(11)
    assert ended == [3, 2, 1]
    orphans.close()
