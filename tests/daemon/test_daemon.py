"""What happens when clients die, bytes rot, permissions differ, and the daemon is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.daemon import as_nobody
from tests.daemon.conftest import RawClient, Refused, RunningDaemon, wait_until, write_pack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Start = Callable[..., RunningDaemon]
    Connect = Callable[..., RawClient]

MIB = 1 << 20

# A client in a process of its own: takes a lease, says so, waits. With "fork" it leaves a child
# that keeps the connection open.
HOLDER = r"""
import os, sys, time
from tests.daemon.conftest import RawClient
client = RawClient(sys.argv[1])
client.hello()
model = client.open(sys.argv[2])
lease = model.acquire(int(sys.argv[3]))
if sys.argv[4] == "fork" and os.fork() == 0:
    os.write(1, b"%d\n" % os.getpid())
    time.sleep(60)
    os._exit(0)
os.write(1, b"%d\n" % lease["lease"])  # one write: the child writes too
time.sleep(60)
"""


def hold(daemon: RunningDaemon, model: str, layer: int, how: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, daemon.socket, model, str(layer), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_root())


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def test_a_client_that_is_killed_in_the_middle_of_a_lease_frees_everything(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    write_pack(models / "tiny")
    daemon = start_daemon("--models", models, "--dram", "16MiB")
    observer = connect(daemon)
    table = observer.open("tiny").table
    holder = hold(daemon, "tiny", 0)
    assert holder.stdout is not None
    lease = int(holder.stdout.readline())
    assert lease in {held.lease for held in table.leases()}
    assert daemon.status()["dram"]["leased_bytes"] > 0
    holder.kill()
    holder.wait()
    wait_until(lambda: observer.call("status")["clients"] == 1, "the client is gone", 1.0)
    assert daemon.status()["dram"]["leased_bytes"] == 0
    assert list(table.leases()) == []
    holder.stdout.close()


def test_the_slot_table_says_how_many_processes_work_with_leases(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    write_pack(models / "tiny")
    daemon = start_daemon("--models", models, "--dram", "16MiB")
    first, second = connect(daemon).open("tiny"), connect(daemon).open("tiny")
    table = first.table
    assert table.holders == 0
    leases = [opened.acquire(layer)["lease"] for opened in (first, second) for layer in (0, 1)]
    assert table.holders == 1, "two clients of one process count as one"
    holder = hold(daemon, "tiny", 2)
    assert holder.stdout is not None
    holder.stdout.readline()
    assert table.holders == 2
    first.client.call("release", leases=leases[:2])
    assert table.holders == 2
    second.client.call("release", leases=leases[2:])
    assert table.holders == 1
    wait_until(lambda: table.holders == 0, "a silent process with a single lease does not count")
    first.acquire(0)
    assert table.holders == 1
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_a_killed_client_frees_everything_although_its_forked_child_holds_the_socket(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    write_pack(models / "tiny")
    daemon = start_daemon("--models", models, "--dram", "16MiB")
    observer = connect(daemon)
    table = observer.open("tiny").table
    holder = hold(daemon, "tiny", 0, "fork")
    assert holder.stdout is not None
    numbers = {int(holder.stdout.readline()), int(holder.stdout.readline())}
    leases = {held.lease for held in table.leases()}
    assert len(leases) == 1
    (child,) = numbers - leases
    try:
        holder.kill()
        holder.wait()
        wait_until(lambda: observer.call("status")["clients"] == 1, "the client is gone", 1.0)
        assert list(table.leases()) == []
        os.kill(child, 0)  # and the child is still there
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_the_death_of_a_client_lets_another_have_its_memory(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 2, MIB)
    daemon = start_daemon("--models", models, "--dram", str(3 * MIB // 2))
    holder = hold(daemon, "tiny", 0)
    assert holder.stdout is not None
    holder.stdout.readline()
    opened = connect(daemon).open("tiny")
    with pytest.raises(Refused) as caught:
        opened.acquire(1)
    assert caught.value.code == "budget_too_small"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    wait_until(lambda: daemon.status()["clients"] == 1, "the client is gone")
    assert opened.bytes_of(opened.acquire(1)) == pack.content[1]


def test_sigterm_answers_what_waits_ends_connections_and_removes_the_socket(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    write_pack(models / "slow", 2, 16 * MIB)
    daemon = start_daemon("--models", models, "--dram", "64MiB", "--ssd-bandwidth", "1MiB")
    opened = connect(daemon).open("slow")
    waiting = opened.client.send("acquire", model_id=opened.model_id, layer=0)
    wait_until(lambda: daemon.status()["dram"]["in_flight_bytes"], "the read began")
    daemon.process.send_signal(signal.SIGTERM)
    with pytest.raises(Refused) as caught:
        opened.client.receive(waiting)
    assert caught.value.code == "shutting_down"
    with pytest.raises(EOFError):
        opened.client.receive(999)
    assert daemon.process.wait(20) == 0
    assert not os.path.exists(daemon.socket)
    assert "fault" not in daemon.log_text()


def test_the_end_of_the_daemon_is_the_end_of_the_connection(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    daemon = start_daemon("--models", models, "--dram", "16MiB")
    client = connect(daemon)
    daemon.kill()
    with pytest.raises((EOFError, OSError)):
        client.call("status")


def test_a_rotten_layer_is_never_granted_and_the_others_still_are(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "rotten", 4)
    pack.flip_byte(layer=1)
    daemon = start_daemon("--models", models, "--dram", "16MiB")
    opened = connect(daemon).open("rotten")
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            opened.acquire(1)
        assert caught.value.code == "checksum_mismatch"
        assert "rotten" in caught.value.text
        assert "model.layers.1" in caught.value.text
    for layer in (0, 2, 3):
        assert opened.bytes_of(opened.acquire(layer)) == pack.content[layer]
    assert daemon.status()["ssd"]["failed"] == 2
    pack.flip_byte(layer=1)  # repaired
    assert opened.bytes_of(opened.acquire(1)) == pack.content[1]


def test_a_shard_that_is_cut_short_while_it_is_served_fails_only_what_is_missing(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "short", 4)
    daemon = start_daemon("--models", models, "--dram", "16MiB")
    opened = connect(daemon).open("short")
    shard = pack.path / "tierd-00001.safetensors"
    os.truncate(shard, pack.index.layers[3].extents[0].offset + 4096)
    with pytest.raises(Refused) as caught:
        opened.acquire(3)
    assert caught.value.code == "read_failed"
    assert "model.layers.3" in caught.value.text
    assert opened.bytes_of(opened.acquire(0)) == pack.content[0]


def test_a_budget_smaller_than_a_layer_is_said_at_the_start_and_at_the_plan(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    write_pack(models / "huge", 2, 4 * MIB)
    write_pack(models / "tiny", 2)
    daemon = start_daemon("--models", models, "--dram", "2MiB")
    assert "budget too small" in daemon.log_text()
    states = {row["name"]: row["state"] for row in daemon.ask("models")["models"]}
    assert states["huge"].startswith("budget too small: layer 'model.layers.0' needs 4194304")
    assert states["tiny"] == "served"
    opened = connect(daemon).open("huge")
    plan = opened.client.refusal("plan", model_id=opened.model_id, order=[0, 1])
    assert plan.code == "budget_too_small"
    assert "4194304" in plan.text
    with pytest.raises(Refused) as caught:
        opened.acquire(0)
    assert caught.value.code == "budget_too_small"


OPEN_AND_ACQUIRE = """
from tests.daemon.conftest import RawClient, Refused
become_nobody()
client = RawClient(sys.argv[1])
client.hello()
for model in sys.argv[2:]:
    try:
        print(model, client.open(model).acquire(0)["arena"])
    except Refused as refused:
        print(model, refused.code)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_gets_what_it_may_read_and_no_descriptor_of_the_rest(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    for name, mode in (("open", 0o644), ("private", 0o600), ("staff", 0o640)):
        write_pack(models / name)
        (models / name / "tierd.json").chmod(mode)
    # pytest's directory is for its owner only; the socket must be reachable.
    path = f"/tmp/tierd-test-{os.getpid()}.sock"
    daemon = start_daemon(
        "--models", models, "--dram", "16MiB", "--socket-mode", "0666", socket=path
    )
    printed = as_nobody.lines(OPEN_AND_ACQUIRE, path, "open", "private", "staff")
    arenas = {name: connect(daemon).open(name).acquire(0)["arena"] for name in ("open", "private")}
    assert printed == [
        f"open {arenas['open']}", "private access_denied", "staff access_denied",
    ]  # fmt: skip
    assert arenas["open"] != arenas["private"]
    assert daemon.stop() == 0


def test_eight_clients_out_of_phase_all_get_every_layer(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "tiny", 8)
    daemon = start_daemon("--models", models, "--dram", str(9 * (256 << 10)))
    clients = [connect(daemon).open("tiny") for _ in range(8)]
    for opened in clients:
        opened.client.call("plan", model_id=opened.model_id, order=list(range(8)))
    for step in range(16):
        asked = []
        for number, opened in enumerate(clients):
            layer = (step + number) % 8
            request = opened.client.send("acquire", model_id=opened.model_id, layer=layer)
            asked.append((opened, layer, request))
        for opened, layer, request in asked:
            lease = opened.client.receive(request)
            assert opened.bytes_of(lease) == pack.content[layer]
            assert opened.table.generation(lease["slot"]) == lease["generation"]
            opened.client.call("release", leases=[lease["lease"]])
    status = daemon.status()
    assert status["dram"]["peak_bytes"] <= status["dram"]["budget_bytes"]
    assert status["dram"]["populated_bytes"] <= status["dram"]["budget_bytes"]
    assert status["scheduler"]["grants"] == 8 * 16


def test_memory_that_exists_never_exceeds_the_budget_with_layers_of_many_sizes(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    budget = 6 * MIB
    packs = [
        write_pack(models / f"m{number}", 3, size, seed=number)
        for number, size in enumerate((12 << 10, 300 << 10, 2 * MIB, 3 * MIB))
    ]
    daemon = start_daemon("--models", models, "--dram", str(budget))
    opened = [connect(daemon).open(pack.name) for pack in packs]
    deadline = time.monotonic() + 3
    turn = 0
    while time.monotonic() < deadline and turn < 300:
        model = opened[turn * 7 % 4]
        layer = turn * 5 % 3
        lease = model.acquire(layer)
        assert model.bytes_of(lease) == packs[turn * 7 % 4].content[layer]
        model.client.call("release", leases=[lease["lease"]])
        assert daemon.status()["dram"]["populated_bytes"] <= budget
        turn += 1
    assert daemon.status()["scheduler"]["evictions"] > 0
