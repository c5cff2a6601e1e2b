from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tierd import sdnotify
from tierd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """The receiving end, and the environment that a service gets."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.settimeout(5)
        yield receiver, {"NOTIFY_SOCKET": path}


def test_a_state_arrives(systemd: tuple[socket.socket, dict[str, str]]) -> None:
    receiver, environ = systemd
    assert sdnotify.notify("READY=1\nSTATUS=ok", environ=environ)
    assert receiver.recv(4096) == b"READY=1\nSTATUS=ok"


def test_outside_systemd_nobody_is_told() -> None:
    assert not sdnotify.notify("READY=1", environ={})


def test_an_abstract_name_is_reached() -> None:
    name = f"tierd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name)
        receiver.settimeout(5)
        assert sdnotify.notify("WATCHDOG=1", environ={"NOTIFY_SOCKET": "@" + name})
        assert receiver.recv(100) == b"WATCHDOG=1"


def test_an_address_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="NOTIFY_SOCKET is 'vsock:2:1234'"):
        sdnotify.notify("READY=1", environ={"NOTIFY_SOCKET": "vsock:2:1234"})


def test_a_receiver_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        sdnotify.notify("READY=1", environ={"NOTIFY_SOCKET": str(tmp_path / "none")})


def test_a_stored_descriptor_replaces_the_one_of_its_name(
    systemd: tuple[socket.socket, dict[str, str]], tmp_path: Path
) -> None:
    receiver, environ = systemd
    with (tmp_path / "kept").open("w+") as kept:
        assert sdnotify.fdstore("arena-0.u0", kept.fileno(), environ=environ)
        assert receiver.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=arena-0.u0"
        data, [(level, kind, payload)], _, _ = receiver.recvmsg(4096, socket.CMSG_SPACE(4))
        assert data == b"FDSTORE=1\nFDNAME=arena-0.u0\nFDPOLL=0"
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        fds = array.array("i", payload)
        try:
            assert os.path.samestat(os.fstat(fds[0]), os.fstat(kept.fileno()))
        finally:
            os.close(fds[0])


@pytest.mark.parametrize("name", ["", "a:b", "a\nFDSTORE=1", "x" * 256])
def test_a_name_that_systemd_would_not_keep_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a stored descriptor"):
        sdnotify.fdstore(name, 0, environ={})


LISTENER = """
import os, sys
from tierd import sdnotify
os.environ["LISTEN_PID"] = str(os.getpid() + int(sys.argv[1]))
found = sdnotify.listen_fds()
left = [name for name in os.environ if name.startswith("LISTEN_")]
print(found, [os.get_inheritable(fd) for fds in found.values() for fd in fds], left)
"""


def listening(tmp_path: Path, count: str, names: str, pid_offset: int = 0) -> str:
    """What a service started with these variables sees; its descriptors 3.. are open files."""
    script = tmp_path / "listener.py"
    script.write_text(LISTENER)
    done = subprocess.run(
        ["bash", "-c", 'exec 3</dev/null 4</dev/null 5</dev/null "$@"', "-",
         sys.executable, str(script), str(pid_offset)],
        env={**os.environ, "LISTEN_FDS": count, "LISTEN_FDNAMES": names},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_inherited_descriptors_come_by_name_and_no_child_inherits_them(tmp_path: Path) -> None:
    found = listening(tmp_path, "3", "control:arena:arena")
    assert found == "{'control': [3], 'arena': [4, 5]} [False, False, False] []"


def test_a_descriptor_without_a_name_is_unknown(tmp_path: Path) -> None:
    assert listening(tmp_path, "2", "control") == (
        "{'control': [3], 'unknown': [4]} [False, False] []"
    )


def test_descriptors_for_another_process_are_left_alone(tmp_path: Path) -> None:
    assert listening(tmp_path, "1", "control", pid_offset=1) == "{} [] []"


def test_a_count_that_is_no_number_is_refused(tmp_path: Path) -> None:
    assert "LISTEN_FDS is 'many'" in listening(tmp_path, "many", "control")


def test_the_watchdog_is_fed_three_times_in_its_limit() -> None:
    environ = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    assert sdnotify.watchdog_interval_s(environ) == 10.0
    del environ["WATCHDOG_PID"]
    assert sdnotify.watchdog_interval_s(environ) == 10.0


def test_nobody_watches_without_a_limit_or_when_another_process_is_meant() -> None:
    assert sdnotify.watchdog_interval_s({}) is None
    other = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid() + 1)}
    assert sdnotify.watchdog_interval_s(other) is None


@pytest.mark.parametrize("limit", ["0", "soon", "-3"])
def test_a_limit_that_cannot_be_met_is_refused(limit: str) -> None:
    with pytest.raises(ConfigError, match=f"WATCHDOG_USEC is '{limit}'"):
        sdnotify.watchdog_interval_s({"WATCHDOG_USEC": limit})
