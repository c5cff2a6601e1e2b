"""The socket: one daemon a path, nobody can bring it down, and nothing grows."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import stat
import struct
from typing import TYPE_CHECKING

import msgpack  # type: ignore[import-untyped]
import pytest

from tests.daemon.conftest import RawClient, RunningDaemon, wait_until, write_pack
from tierd_layouts.wire import MAX_REQUEST_BYTES, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Start = Callable[..., RunningDaemon]
    Connect = Callable[..., RawClient]


@pytest.fixture
def daemon(start_daemon: Start, models: Path) -> RunningDaemon:
    return start_daemon("--models", models, "--dram", "16MiB")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """One daemon for all tests that try to bring it down: none may succeed."""
    place = tmp_path_factory.mktemp("attacked")
    write_pack(place / "models" / "tiny")
    arguments = ["--models", str(place / "models"), "--dram", "16MiB", "--log-level", "debug"]
    daemon = RunningDaemon(str(place / "tierd.sock"), place / "log", arguments).wait_ready()
    yield daemon
    assert daemon.stop() == 0
    assert "fault" not in daemon.log_text()


def test_a_second_instance_on_the_same_socket_is_refused_by_name(
    start_daemon: Start, daemon: RunningDaemon, models: Path
) -> None:
    second = start_daemon("--models", models, "--dram", "16MiB", wait=False)
    assert second.process.wait(20) == 1
    last = second.log_text().splitlines()[-1]
    assert daemon.socket in last
    assert "another" in last
    daemon.status()  # and the first one did not notice


def test_a_foreign_listener_without_our_lock_is_not_thrown_out(
    start_daemon: Start, models: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "tierd.sock")
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(path)
        foreign.listen()
        daemon = start_daemon("--models", models, "--dram", "16MiB", wait=False)
        assert daemon.process.wait(20) == 1
        assert path in daemon.log_text().splitlines()[-1]
        assert os.path.exists(path)


def test_a_daemon_that_holds_the_lock_but_does_not_listen_yet_is_respected(
    start_daemon: Start, models: Path, tmp_path: Path
) -> None:
    with (tmp_path / "tierd.sock.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        daemon = start_daemon("--models", models, "--dram", "16MiB", wait=False)
        assert daemon.process.wait(20) == 1
    assert "another tierd" in daemon.log_text().splitlines()[-1]
    start_daemon("--models", models, "--dram", "16MiB")  # a lock file alone stops nobody


def test_a_stale_socket_of_a_killed_daemon_is_taken_over(
    start_daemon: Start, daemon: RunningDaemon, models: Path
) -> None:
    daemon.kill()
    assert os.path.exists(daemon.socket)
    successor = start_daemon("--models", models, "--dram", "16MiB")
    assert successor.status()["daemon"]["pid"] == successor.pid


def test_a_file_that_is_no_socket_is_left_alone(
    start_daemon: Start, models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tierd.sock"
    path.write_text("precious")
    daemon = start_daemon("--models", models, "--dram", "16MiB", wait=False)
    assert daemon.process.wait(20) == 1
    assert path.read_text() == "precious"


def test_the_socket_has_the_configured_mode_and_the_lock_is_private(
    start_daemon: Start, models: Path
) -> None:
    daemon = start_daemon("--models", models, "--dram", "16MiB", "--socket-mode", "0640")
    assert stat.S_IMODE(os.stat(daemon.socket).st_mode) == 0o640
    assert stat.S_IMODE(os.stat(daemon.socket + ".lock").st_mode) == 0o600


def test_a_clean_end_leaves_no_file_behind(daemon: RunningDaemon, tmp_path: Path) -> None:
    assert daemon.stop() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "tierd-0.log"]


def _is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "junk",
    [
        struct.pack("!I", MAX_REQUEST_BYTES + 1),
        struct.pack("!I", 0xFFFFFFFF) + b"x" * 100,
        struct.pack("!I", 5) + b"\xdd\x7f\xff\xff\xff",  # array32 of 2^31
        struct.pack("!I", 3) + b"\x01\x02\x03",
        struct.pack("!I", 1) + b"\xc1",
        struct.pack("!I", 0),
        struct.pack("!I", 2000) + b"\x91" * 2000,  # deep nesting
        encode({"id": -1, "op": "status"}),
        encode({"id": True, "op": "status"}),
        encode({"id": 1 << 63, "op": "status"}),
        encode({"id": 1}),
        encode({"id": 0, "op": "status"}),
    ],
)
def test_what_is_no_request_ends_only_its_own_connection(
    attacked: RunningDaemon, connect: Connect, junk: bytes
) -> None:
    good = connect(attacked)
    bad = connect(attacked, greet=False)
    bad.sock.sendall(junk)
    assert _is_closed(bad.sock)
    assert f"process {os.getpid()} is disconnected" in attacked.log_text()
    assert good.call("status")["clients"] == 1


def test_random_bytes_never_bring_the_daemon_down(
    attacked: RunningDaemon, connect: Connect
) -> None:
    rng = random.Random(5)
    good = connect(attacked)
    for _ in range(60):
        bad = RawClient(attacked.socket)
        data = rng.randbytes(rng.randrange(1, 3000))
        if rng.random() < 0.5:  # a frame with a right length
            data = struct.pack("!I", len(data)) + data
        bad.sock.sendall(data)
        bad.close()
    assert good.call("status")["clients"] == 1
    assert attacked.process.poll() is None


def test_requests_with_fields_of_any_kind_are_refused_or_answered(
    attacked: RunningDaemon, connect: Connect
) -> None:
    rng = random.Random(6)
    values: list[object] = [
        None,
        True,
        -1,
        0,
        1,
        1 << 62,
        1.5,
        "",
        "tiny",
        "../x",
        b"x",
        [],
        [1],
        [[]],
        {},
    ]
    fields = ["version", "client", "held", "model", "model_id", "layer", "ahead", "order"]
    fields += ["kind", "tokens_per_pass", "layers", "ppm", "steps", "lookahead", "leases"]
    ops = [
        "hello",
        "open",
        "close",
        "plan",
        "hint",
        "acquire",
        "release",
        "status",
        "layers",
        "nonsense",
    ]
    client = connect(attacked)
    client.open("tiny")
    for number in range(400):
        request = {field: rng.choice(values) for field in rng.sample(fields, 5)}
        frame = msgpack.packb({"id": 1000 + number, "op": rng.choice(ops), **request})
        client.sock.sendall(struct.pack("!I", len(frame)) + frame)
    assert client.call("status")["clients"] == 1


def test_many_quick_connections_leave_nothing_behind(
    attacked: RunningDaemon, connect: Connect
) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{attacked.pid}/fd"))

    def visit(times: int) -> None:
        for number in range(times):
            client = RawClient(attacked.socket)
            if number % 2:
                client.call("hello", version=1, client="visitor", capabilities=[], held=[])
                os.close(_arena_of(client))
            client.close()

    visit(50)
    good = connect(attacked)
    wait_until(lambda: good.call("status")["clients"] == 1, "the visitors are gone")
    before = descriptors()
    memory = good.call("status")["daemon"]["rss_bytes"]
    visit(1000)
    wait_until(lambda: good.call("status")["clients"] == 1, "the visitors are gone")
    assert descriptors() <= before
    assert good.call("status")["daemon"]["rss_bytes"] < memory + (4 << 20)


def _arena_of(client: RawClient) -> int:
    client.call("open", model="tiny")
    fds, client._fds = client._fds, []
    for fd in fds[:-2] + fds[-1:]:
        os.close(fd)
    return fds[-2]


def test_descriptors_from_clients_are_dropped(attacked: RunningDaemon, connect: Connect) -> None:
    client = connect(attacked)
    before = len(os.listdir(f"/proc/{attacked.pid}/fd"))
    for number in range(50):
        frame = encode({"id": 5000 + number, "op": "clients"})
        socket.send_fds(client.sock, [frame], [0, 1, 2])
        client.receive(5000 + number)
    assert len(os.listdir(f"/proc/{attacked.pid}/fd")) == before


def test_a_client_that_does_not_read_is_disconnected(
    attacked: RunningDaemon, connect: Connect
) -> None:
    deaf = connect(attacked, greet=False)
    deaf.sock.settimeout(20)
    flood = b"".join(encode({"id": number, "op": "config"}) for number in range(1, 50_000))
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        deaf.sock.sendall(flood)
    wait_until(lambda: "unread" in attacked.log_text(), "the reason is logged")
    attacked.status()


def test_a_client_beyond_the_limit_is_told_so_and_others_can_still_ask(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    daemon = start_daemon("--models", models, "--dram", "16MiB", "--max-clients", "2")
    first = connect(daemon)
    connect(daemon)
    third = connect(daemon, greet=False)
    refusal = third.refusal("hello", version=1, client="third", capabilities=[], held=[])
    assert refusal.code == "too_many_clients"
    assert "2" in refusal.text
    assert third.call("status")["clients"] == 2
    first.close()
    wait_until(lambda: third.call("status")["clients"] == 1, "a place is free")
    third.hello()


def test_connections_beyond_every_limit_get_an_error_frame_and_an_end(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    daemon = start_daemon("--models", models, "--dram", "16MiB", "--max-clients", "1")
    clients = [connect(daemon, greet=False) for _ in range(65)]
    clients[-1].call("status")
    refused = connect(daemon, greet=False)
    with pytest.raises(EOFError):
        refused.receive(1)
    assert refused._replies[0]["error"]["code"] == "too_many_clients"


def test_a_socket_that_systemd_listens_on_is_used_and_not_removed(
    start_daemon: Start, models: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "activated.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        daemon = start_daemon(
            "--models", models, "--dram", "16MiB",
            socket=path, descriptors={"control": listening.fileno()},
        )  # fmt: skip
        assert daemon.status()["daemon"]["socket"] == path
        assert daemon.stop() == 0
    assert os.path.exists(path)
