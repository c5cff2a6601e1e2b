from __future__ import annotations

import os
import resource
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tierd_client.inbox import RECEIVE_BYTES, Inbox, close_all

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Inbox]]:
    """The other end, and an inbox that waits 50 ms."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 50_000))
    yield theirs, Inbox(ours)
    theirs.close()
    ours.close()


def test_bytes_and_descriptors_come_in_one_piece(pair: tuple[socket.socket, Inbox]) -> None:
    theirs, inbox = pair
    readable, writable = os.pipe()
    socket.send_fds(theirs, [b"hello"], [writable])
    assert inbox.wait()
    piece = inbox.take()
    assert (piece.data, piece.truncated, len(piece.fds)) == (b"hello", False, 1)
    os.write(piece.fds[0], b"x")
    assert os.read(readable, 1) == b"x"
    assert not os.get_inheritable(piece.fds[0])
    close_all([*piece.fds, readable, writable])


def test_what_was_read_and_not_taken_is_there_at_the_next_wait(
    pair: tuple[socket.socket, Inbox],
) -> None:
    theirs, inbox = pair
    theirs.sendall(b"one")
    assert inbox.wait()
    theirs.sendall(b"two")
    assert inbox.wait()
    assert inbox.take().data == b"one"
    assert inbox.wait()
    assert inbox.take().data == b"two"


def test_a_wait_ends_with_the_sockets_timeout(pair: tuple[socket.socket, Inbox]) -> None:
    _, inbox = pair
    begin = time.monotonic()
    assert not inbox.wait()
    assert time.monotonic() - begin >= 0.04


def test_a_wait_ends_with_what_comes_late(pair: tuple[socket.socket, Inbox]) -> None:
    theirs, inbox = pair
    late = threading.Timer(0.01, theirs.sendall, [b"late"])
    late.start()
    while not inbox.wait():
        pass
    assert inbox.take().data == b"late"
    late.join()


def test_the_end_of_the_stream_is_a_piece_without_bytes(pair: tuple[socket.socket, Inbox]) -> None:
    theirs, inbox = pair
    theirs.sendall(b"last")
    theirs.close()
    pieces = []
    for _ in range(2):
        assert inbox.wait()
        pieces.append(inbox.take().data)
    assert pieces == [b"last", b""]


def test_a_long_message_comes_in_pieces(pair: tuple[socket.socket, Inbox]) -> None:
    theirs, inbox = pair
    sent = bytes(range(256)) * (RECEIVE_BYTES // 128)
    sender = threading.Thread(target=theirs.sendall, args=(sent,))
    sender.start()
    received = b""
    while len(received) < len(sent):
        assert inbox.wait()
        received += inbox.take().data
    sender.join()
    assert received == sent


def test_descriptors_beyond_the_limit_of_open_files_are_reported(
    pair: tuple[socket.socket, Inbox],
) -> None:
    theirs, inbox = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = os.dup(0)
    os.close(highest)
    socket.send_fds(theirs, [b"too many"], [0, 0, 0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    try:
        assert inbox.wait()
        piece = inbox.take()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert piece.truncated
    assert len(piece.fds) < 3
    close_all(piece.fds)


def test_a_look_does_not_wait(pair: tuple[socket.socket, Inbox]) -> None:
    theirs, inbox = pair
    begin = time.monotonic()
    assert not inbox.look()
    assert time.monotonic() - begin < 0.04
    theirs.sendall(b"now")
    assert inbox.look()
    assert inbox.look()
    assert inbox.take().data == b"now"
