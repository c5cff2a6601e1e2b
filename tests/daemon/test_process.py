from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from tierd.io import process
from tierd.io.process import (
    PeerCredentials,
    is_exiting,
    open_pidfd,
    peer_credentials,
    start_time,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """On an abstract name, which every user may reach."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0tierd-test-{uuid.uuid4()}")
        sock.listen()
        sock.settimeout(20)
        yield sock


def connect_from_child(listener: socket.socket) -> tuple[subprocess.Popen[str], socket.socket]:
    """A process that connects, and waits for a line before it exits; our end of the connection."""
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); "
        f"s.connect({listener.getsockname()!r}); sys.stdin.readline()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True)
    peer, _ = listener.accept()
    return child, peer


def readable(fd: int, timeout_s: float) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_the_start_time_tells_two_lives_of_a_pid_apart() -> None:
    ours = start_time(os.getpid())
    assert ours == start_time(os.getpid())
    with subprocess.Popen(SLEEPER, stdout=subprocess.PIPE) as child:
        try:
            assert start_time(child.pid) > ours
        finally:
            child.kill()


def test_a_command_name_with_blanks_and_parentheses_misleads_nobody(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    fields = ["S", *(str(n) for n in range(4, 53))]  # state is field 3, the rest say their number
    for comm in ("tierd", "a b", ") S 1 1 (", "((", "a) (b"):
        (tmp_path / "7" / "stat").write_text(f"7 ({comm}) {' '.join(fields)}\n")
        assert start_time(7, proc=str(tmp_path)) == 22


def test_a_process_that_is_not_there_has_no_start_time() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        start_time(child.pid)


def test_a_pidfd_of_a_pid_fires_when_the_process_dies() -> None:
    with subprocess.Popen(SLEEPER, stdout=subprocess.PIPE) as child:
        pidfd = open_pidfd(child.pid)
        try:
            assert not readable(pidfd, 0)
            child.kill()
            assert readable(pidfd, 10)
        finally:
            os.close(pidfd)


@pytest.mark.parametrize("kernel_knows_peerpidfd", [True, False])
def test_a_pidfd_of_a_peer_fires_when_it_dies(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, kernel_knows_peerpidfd: bool
) -> None:
    if not kernel_knows_peerpidfd:
        monkeypatch.setattr(process, "_SO_PEERPIDFD", 9999)  # ENOPROTOOPT, as before Linux 6.5
    child, peer = connect_from_child(listener)
    with peer, child:
        pidfd = open_pidfd(peer)
        try:
            assert not readable(pidfd, 0)
            child.kill()
            assert readable(pidfd, 10)
        finally:
            os.close(pidfd)


def test_a_peer_that_is_gone_is_named_so(listener: socket.socket) -> None:
    child, peer = connect_from_child(listener)
    with peer, child:
        child.kill()
        child.wait()
        # Newer kernels (6.16) still give a descriptor then, and it is readable.
        with contextlib.suppress(ProcessLookupError):
            pidfd = open_pidfd(peer)
            assert readable(pidfd, 0)
            os.close(pidfd)


def test_the_peer_is_who_connected(listener: socket.socket) -> None:
    child, peer = connect_from_child(listener)
    with peer, child:
        found = peer_credentials(peer)
        child.communicate("\n")
    assert (found.pid, found.uid, found.gid) == (child.pid, os.geteuid(), os.getegid())
    assert set(found.groups) == set(os.getgroups())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to take other groups")
def test_hundreds_of_groups_are_seen(listener: socket.socket) -> None:
    groups = list(range(1000, 1300))
    script = (
        f"import os, socket, sys; os.setgroups({groups}); os.setgid(65534); os.setuid(65534); "
        f"s = socket.socket(socket.AF_UNIX); s.connect({listener.getsockname()!r}); "
        "sys.stdin.readline()"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True)
    peer, _ = listener.accept()
    with peer, child:
        found = peer_credentials(peer)
        child.communicate("\n")
    assert (found.uid, found.gid, list(found.groups)) == (65534, 65534, groups)


@pytest.mark.parametrize(
    ("uid", "gid", "groups", "mode", "allowed"),
    [
        (0, 0, (), 0o000, True),  # root
        (7, 9, (), 0o400, True),  # the owner
        (7, 9, (), 0o044, False),  # the owner's class decides alone
        (8, 5, (), 0o040, True),  # the group
        (8, 9, (4, 5), 0o040, True),  # a supplementary group
        (8, 5, (), 0o404, False),  # the group's class decides alone
        (8, 9, (), 0o004, True),  # others
        (8, 9, (), 0o440, False),
        (7, 5, (5,), 0o222, False),  # write bits do not help
    ],
)
def test_reading_is_allowed_as_for_a_file(
    uid: int, gid: int, groups: tuple[int, ...], mode: int, allowed: bool
) -> None:
    peer = PeerCredentials(1, uid, gid, groups)
    assert peer.may_read(uid=7, gid=5, mode=mode) is allowed


def test_a_process_that_ended_but_is_not_reaped_is_exiting() -> None:
    assert not is_exiting(os.getpid())
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_exiting(child.pid)
    with pytest.raises(ProcessLookupError):
        is_exiting(child.pid)
