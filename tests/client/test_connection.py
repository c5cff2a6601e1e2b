from __future__ import annotations

import array
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tierd_client.connection import Connection
from tierd_client.errors import (
    ClientClosed,
    DaemonGone,
    DaemonNotRunning,
    DaemonTimeout,
    ProtocolBroken,
    Refused,
)
from tierd_layouts.wire import FrameDecoder, encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType


class Peer:
    """The daemon's end of a socket pair, driven by the test."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = FrameDecoder()

    def next_request(self) -> dict[str, Any]:
        while True:
            for message in self._decoder:
                return message
            data = self.sock.recv(65536)
            assert data, "the client closed the connection"
            self._decoder.feed(data)

    def answer(self, request: int, **fields: Any) -> None:
        self.sock.sendall(encode({"id": request, "ok": True, **fields}))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Peer]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    connection = Connection(ours, "/test", timeout=20)
    yield connection, Peer(theirs)
    connection.close()
    theirs.close()


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_replies_out_of_order_reach_their_requests(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    first = connection.submit("status", {})
    second = connection.submit("status", {})
    peer.answer(second, who="second")
    peer.answer(first, who="first")
    assert connection.wait_reply(first).fields["who"] == "first"
    assert connection.wait_reply(second).fields["who"] == "second"


def test_threads_that_call_at_once_each_get_their_own_answer(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    threads, calls = 4, 50
    wrong: list[object] = []

    def ask(name: int) -> None:
        for number in range(calls):
            fields = connection.call("status", name=name, number=number).fields
            if (fields["name"], fields["number"]) != (name, number):
                wrong.append(fields)

    def answer() -> None:
        waiting: list[dict[str, Any]] = []
        for count in range(threads * calls):
            waiting.append(peer.next_request())
            # The last one first, whenever two are there.
            while waiting and (count % 3 or len(waiting) > 1):
                message = waiting.pop()
                peer.answer(message["id"], name=message["name"], number=message["number"])
            if waiting:
                message = waiting.pop()
                peer.answer(message["id"], name=message["name"], number=message["number"])

    workers = [threading.Thread(target=ask, args=(name,)) for name in range(threads)]
    workers.append(threading.Thread(target=answer))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    assert wrong == []


def test_a_waiting_thread_takes_over_reading_when_the_reader_has_its_reply(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    slow = connection.submit("status", {})
    fast = connection.submit("status", {})
    done: list[str] = []

    def wait(request: int, name: str) -> None:
        connection.wait_reply(request)
        done.append(name)

    reader = threading.Thread(target=wait, args=(fast, "fast"))
    reader.start()
    time.sleep(0.05)
    other = threading.Thread(target=wait, args=(slow, "slow"))
    other.start()
    time.sleep(0.05)
    peer.answer(fast)
    reader.join(10)
    peer.answer(slow)
    other.join(10)
    assert done == ["fast", "slow"]


def test_a_daemon_that_dies_wakes_every_waiting_thread_at_once(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            connection.call("status")
        except DaemonGone as error:
            caught.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    begin = time.monotonic()
    peer.sock.close()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - begin < 2
    assert len(caught) == 3
    assert "tierd at /test is gone" in str(caught[0])


def test_every_later_call_says_that_the_daemon_is_gone(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    peer.sock.close()
    for _ in range(3):
        with pytest.raises(DaemonGone):
            connection.call("status")
    connection.held[5] = None
    connection.release([5])  # says nothing: the daemon's end has freed it
    assert not connection.alive
    assert connection.lost


def test_a_frame_cut_off_by_the_end_of_the_daemon_is_an_end(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    request = connection.submit("status", {})
    peer.sock.sendall(encode({"id": request, "ok": True})[:-1])
    peer.sock.close()
    with pytest.raises(DaemonGone):
        connection.wait_reply(request)


def test_no_answer_in_time_is_an_error_and_the_connection_goes_on() -> None:
    ours, theirs = socket.socketpair()
    connection, peer = Connection(ours, "/test", timeout=0.2), Peer(theirs)
    begin = time.monotonic()
    with pytest.raises(DaemonTimeout, match=r"did not answer in 0\.2 s"):
        connection.call("status")
    assert 0.15 < time.monotonic() - begin < 5
    late = peer.next_request()
    peer.answer(late["id"])
    request = connection.submit("status", {})
    peer.answer(request, who="second")
    assert connection.wait_reply(request).fields["who"] == "second"
    connection.close()
    theirs.close()


def test_a_lease_that_is_granted_too_late_is_given_back() -> None:
    ours, theirs = socket.socketpair()
    connection, peer = Connection(ours, "/test", timeout=0.1), Peer(theirs)
    request = connection.submit("acquire", {"layer": 1})
    with pytest.raises(DaemonTimeout):
        connection.wait_reply(request)
    peer.answer(request, lease=77)
    after = connection.submit("status", {})
    peer.answer(after)
    connection.wait_reply(after)
    assert [peer.next_request()["op"] for _ in range(2)] == ["acquire", "status"]
    assert peer.next_request() == {"id": 0, "op": "release", "leases": [77]}
    assert connection.held == {}
    connection.close()
    theirs.close()


def test_an_interrupted_wait_leaves_the_connection_usable(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        connection.call("acquire", layer=1)
    timer.join()
    peer.answer(peer.next_request()["id"], lease=5)
    request = connection.submit("status", {})
    peer.answer(request)
    connection.wait_reply(request)
    assert peer.next_request()["op"] == "status"
    assert peer.next_request()["leases"] == [5]


def test_an_interrupt_at_any_point_never_mixes_up_answers_or_blocks_the_next_call() -> None:
    class Interrupted(Exception):
        pass

    def echo(peer: Peer) -> None:
        with peer.sock, contextlib.suppress(OSError, AssertionError):  # the client's end closed
            while True:
                message = peer.next_request()
                peer.answer(message["id"], number=message["number"])

    def connect() -> Connection:
        ours, theirs = socket.socketpair()
        threading.Thread(target=echo, args=(Peer(theirs),), daemon=True).start()
        return Connection(ours, "/test", timeout=5)

    def interrupted_at(point: int) -> bool:
        """Ask once, with an exception at the given point of the library, counted from 1.

        Python looks for signals where a function begins and after a call: what a profiler sees.
        """
        left = point

        def profile(frame: FrameType, event: str, _: object) -> None:
            nonlocal left
            if "tierd_client" in frame.f_code.co_filename and event in ("call", "c_return"):
                left -= 1
                if left == 0:
                    raise Interrupted

        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            assert connection.call("status", number=point).fields["number"] == point
        except Interrupted:
            return True
        finally:
            sys.setprofile(before)
        return False

    point, closed, connection = 1, 0, connect()
    while interrupted_at(point):
        try:
            assert connection.call("status", number=-point).fields["number"] == -point
        except ClientClosed:  # the stream may be cut in the middle: said, not guessed
            closed += 1
            connection = connect()
        point += 1
    assert point > 20
    assert closed < point // 2
    connection.close()


def test_an_error_reply_is_raised_and_the_connection_goes_on(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    request = connection.submit("status", {})
    error = {"code": "internal", "text": "a bug"}
    peer.sock.sendall(encode({"id": request, "ok": False, "error": error}))
    reply = connection.wait_reply(request)
    assert isinstance(reply.refusal, Refused)
    assert connection.alive


def test_descriptors_are_closed_on_exec_and_those_of_an_abandoned_open_at_once(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    before = open_descriptors()

    def send(request: int) -> None:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
        frame = encode({"id": request, "ok": True, "files": ["a"]})
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        peer.sock.sendmsg([frame], [rights])
        for fd in fds:
            os.close(fd)

    kept, abandoned = connection.submit("open", {}), connection.submit("open", {})
    connection.abandon(abandoned)
    send(abandoned)
    send(kept)
    reply = connection.wait_reply(kept)
    assert len(reply.fds) == 3
    assert not any(os.get_inheritable(fd) for fd in reply.fds)
    for fd in reply.fds:
        os.close(fd)
    assert open_descriptors() == before


def test_descriptors_that_were_cut_off_are_fatal_and_none_leaks(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    before = open_descriptors()
    request = connection.submit("open", {})
    with open("/dev/null", "rb") as null:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()] * 40))
        peer.sock.sendmsg([encode({"id": request, "ok": True, "files": ["a"]})], [rights])
    with pytest.raises(ProtocolBroken, match="cut off"):
        connection.wait_reply(request)
    with pytest.raises(DaemonGone):
        connection.call("status")
    assert open_descriptors() == before


def test_a_reply_that_cannot_be_ends_the_connection(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    request = connection.submit("status", {})
    peer.answer(request + 5)
    with pytest.raises(ProtocolBroken, match="not outstanding"):
        connection.wait_reply(request)
    with pytest.raises(ProtocolBroken):
        connection.call("status")
    assert peer.next_request()["op"] == "status"
    assert peer.sock.recv(10) == b""


def test_release_wants_no_reply_and_names_only_what_is_held(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    connection.held.update({4: None, 5: None})
    connection.release([4, 5, 6])
    assert peer.next_request() == {"id": 0, "op": "release", "leases": [4, 5]}
    assert connection.held == {}


def test_release_never_waits_for_a_lock_and_its_holder_sends_it(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    connection.held[4] = None
    with connection._send_lock:  # as when a finalizer runs in the middle of a send
        connection.release([4])
        peer.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            peer.sock.recv(1)
        peer.sock.settimeout(10)
    connection.submit("status", {})
    assert peer.next_request()["op"] == "status"
    assert peer.next_request()["leases"] == [4]


def test_close_wakes_a_waiting_thread_and_refuses_later_calls(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            connection.call("status")
        except ClientClosed as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert peer.next_request()["op"] == "status"
    connection.close()
    connection.close()
    thread.join(10)
    assert len(caught) == 1
    with pytest.raises(ClientClosed):
        connection.call("status")


def test_a_daemon_that_does_not_read_is_given_up(pair: tuple[Connection, Peer]) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = Connection(ours, "/test", timeout=0.2)

    def ask_without_reading() -> None:
        for _ in range(200):
            connection.submit("status", {"text": "x" * 4000})

    with pytest.raises(DaemonGone):
        ask_without_reading()
    theirs.close()


def test_no_socket_and_no_listener_say_where_they_looked(tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    with pytest.raises(DaemonNotRunning, match=r"none\.sock"):
        Connection.connect(path, 1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.close()
    with pytest.raises(DaemonNotRunning, match="Connection refused"):
        Connection.connect(path, 1)


def test_a_connection_that_nobody_keeps_is_closed(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(10)
    connection = Connection(ours, "/test", timeout=1)
    del ours, connection
    gc.collect()
    assert theirs.recv(1) == b""
    theirs.close()


# ------------------------------------------------------------------------------------------- looks


def test_a_look_takes_in_what_came_and_waits_for_nothing(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    connection.look()
    request = connection.submit("status", {})
    peer.answer(peer.next_request()["id"])
    connection.look()
    assert connection._replies[request].op == "status"


def test_a_look_gives_back_a_grant_that_nobody_wants_any_more(
    pair: tuple[Connection, Peer],
) -> None:
    connection, peer = pair
    connection.abandon(connection.submit("acquire", {}))
    peer.answer(peer.next_request()["id"], lease=7)
    connection.look()
    assert peer.next_request() == {"id": 0, "op": "release", "leases": [7]}


def test_a_look_notices_the_end(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    peer.sock.close()
    with pytest.raises(DaemonGone):
        connection.look()
    assert not connection.alive


def test_a_look_leaves_the_reading_to_who_waits(pair: tuple[Connection, Peer]) -> None:
    connection, peer = pair
    replies = []
    thread = threading.Thread(target=lambda: replies.append(connection.call("status")))
    thread.start()
    request = peer.next_request()["id"]
    while connection._reader is None:
        time.sleep(0.001)
    connection.look()
    assert connection._reader is not None
    peer.answer(request)
    thread.join(10)
    assert len(replies) == 1
