from __future__ import annotations

import signal
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from tierd_client.daemon_socket import SLICE_S, connected_socket, limit_calls
from tierd_client.errors import DaemonNotRunning, DaemonTimeout

if TYPE_CHECKING:
    from pathlib import Path


def seconds(sock: socket.socket, option: int) -> float:
    whole, micro = struct.unpack("ll", sock.getsockopt(socket.SOL_SOCKET, option, 16))
    return float(whole + micro / 1e6)


@pytest.mark.parametrize("timeout", [0.05, 0.5, 30.0, 30.25])
def test_the_kernel_limits_each_call(timeout: float) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        limit_calls(ours, timeout)
        assert ours.gettimeout() is None
        # The kernel counts in ticks.
        receive, send = (seconds(ours, o) for o in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO))
        assert receive == pytest.approx(min(timeout, SLICE_S), abs=0.02)
        assert send == pytest.approx(timeout, abs=0.02)


def test_a_receive_that_nobody_answers_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        limit_calls(ours, 0.05)
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_nobody_there_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotRunning, match=r"nobody.sock .*TIERD_SOCKET"):
        connected_socket(str(tmp_path / "nobody.sock"), 1)


def test_a_path_that_is_no_socket_is_said_to_be_none(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.touch()
    for path in (file, tmp_path):
        with pytest.raises(DaemonNotRunning, match=rf"at {path} \(it is no socket\)"):
            connected_socket(str(path), 1)


def test_a_daemon_that_takes_no_connection_is_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "full.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        waiting = [connected_socket(path, 1)]
        with pytest.raises(DaemonTimeout, match=r"took no connection in 0.1 s"):
            waiting.append(connected_socket(path, 0.1))
        for sock in waiting:
            sock.close()


def test_who_connects_when_many_do_waits_for_its_turn(tmp_path: Path) -> None:
    path = str(tmp_path / "busy.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        first = connected_socket(path, 1)
        accept = threading.Timer(0.1, lambda: listener.accept()[0].close())
        accept.start()
        second = connected_socket(path, 20)
        accept.join()
        first.close()
        second.close()


def test_a_signal_while_it_waits_does_not_end_the_wait(tmp_path: Path) -> None:
    """Python would return from `connect` with a socket that is not connected."""
    path = str(tmp_path / "busy.sock")
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        first = connected_socket(path, 1)
        me = threading.main_thread().ident
        assert me is not None
        disturb = threading.Timer(0.1, lambda: signal.pthread_kill(me, signal.SIGUSR1))
        accept = threading.Timer(0.4, lambda: listener.accept()[0].close())
        try:
            disturb.start()
            accept.start()
            with connected_socket(path, 20) as second:
                assert second.getpeername() == path
                assert seen == [signal.SIGUSR1]
                # Nobody makes room for another: it is given up all the same.
                again = threading.Timer(0.1, lambda: signal.pthread_kill(me, signal.SIGUSR1))
                again.start()
                with pytest.raises(DaemonTimeout, match=r"took no connection in 0.3 s"):
                    connected_socket(path, 0.3)
                again.join()
        finally:
            accept.join()
            first.close()
            signal.signal(signal.SIGUSR1, before)
