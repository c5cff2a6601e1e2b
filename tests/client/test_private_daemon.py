from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tierd_client import Client, private_daemon
from tierd_client.errors import DaemonGone, PrivateDaemonFailed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.conftest import TinyPack

DRAM = "64MiB"

# Starts a daemon, says where, and ends as the test wants.
PROGRAM = """
import os, sys, threading, time
from tierd_client import private_daemon
started = []
def start():
    started.append(private_daemon.start(sys.argv[1], "64MiB"))
thread = threading.Thread(target=start)   # the daemon outlives the thread that started it
thread.start()
thread.join()
time.sleep(0.2)
print(started[0].pid, started[0].socket, started[0]._process.poll(), flush=True)
if sys.argv[2] == "fork":
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    sys.argv[2] = "wait"
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def run_program(pack: TinyPack, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(pack.folder), how], stdout=subprocess.PIPE, text=True
    )


def test_a_private_daemon_serves_its_pack_until_it_is_stopped(pack: TinyPack) -> None:
    with private_daemon.start(pack.folder, DRAM) as daemon:
        with Client(daemon.socket) as client, client.lease("tiny", "blocks.0") as lease:
            assert lease["blocks.0.up.weight"].dense().shape == (130, 100)
        client = Client(daemon.socket)
    assert gone(daemon.pid)
    assert not os.path.exists(os.path.dirname(daemon.socket))
    with pytest.raises(DaemonGone):
        client.ask("status")
    daemon.stop()


def test_a_daemon_that_ended_by_itself_is_shown_with_its_words(
    pack: TinyPack, caplog: pytest.LogCaptureFixture
) -> None:
    with private_daemon.start(pack.folder, DRAM):
        pass
    assert not caplog.records
    with private_daemon.start(pack.folder, DRAM) as daemon:
        os.kill(daemon.pid, signal.SIGKILL)
        assert gone(daemon.pid)
    assert f"the private tierd {daemon.pid} ended with status -9: " in caplog.text
    assert "tierd.daemon: tierd " in caplog.text


def test_a_daemon_that_cannot_serve_is_shown_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(PrivateDaemonFailed, match=r"ended with status \d.*no-pack"):
        private_daemon.start(tmp_path / "no-pack", DRAM)
    assert threading.active_count() >= 1


def test_a_budget_that_is_no_size_is_shown_with_the_daemons_words(pack: TinyPack) -> None:
    with pytest.raises(PrivateDaemonFailed, match=r"status 2.*plenty"):
        private_daemon.start(pack.folder, "plenty")


def test_a_deep_temporary_folder_does_not_make_the_sockets_path_too_long(
    pack: TinyPack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with private_daemon.start(pack.folder, DRAM) as daemon:
        Client(daemon.socket).close()
    assert list(deep.iterdir()) == []


def test_it_ends_when_its_process_ends(pack: TinyPack) -> None:
    with run_program(pack, "exit") as program:
        assert program.stdout is not None
        pid, socket, status = program.stdout.readline().split()
        assert status == "None"  # it outlived the thread that started it
        assert program.wait(30) == 0
    assert gone(int(pid))
    assert not os.path.exists(os.path.dirname(socket))


@pytest.mark.parametrize("how", ["wait", "fork"])
def test_it_ends_when_its_process_is_killed_also_when_a_forked_child_is_left(
    pack: TinyPack, how: str
) -> None:
    child = None
    with run_program(pack, how) as program:
        assert program.stdout is not None
        pid, _, status = program.stdout.readline().split()
        assert status == "None"
        if how == "fork":
            child = int(program.stdout.readline())
        program.kill()
        program.wait(30)
        try:
            assert gone(int(pid))
        finally:
            if child is not None:
                os.kill(child, signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_does_not_stop_its_parents_daemon(pack: TinyPack) -> None:
    with private_daemon.start(pack.folder, DRAM) as daemon:
        child = os.fork()
        if child == 0:
            daemon.stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        Client(daemon.socket).close()
