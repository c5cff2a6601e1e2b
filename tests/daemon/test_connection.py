"""One accepted socket whose peer goes away at a bad moment."""

from __future__ import annotations

import select
import signal
import socket
import weakref
from typing import TYPE_CHECKING, Any, cast

from tests.daemon.conftest import wait_until, write_pack
from tierd.connection import Connection
from tierd_layouts.wire import encode

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon.conftest import RawClient, RunningDaemon


class Loop:
    """Remembers what is watched, and calls nothing by itself."""

    def __init__(self) -> None:
        self.writers: list[int] = []
        self.soon: list[tuple[Any, ...]] = []

    def add_reader(self, *_: object) -> None: ...
    def remove_reader(self, *_: object) -> None: ...
    def remove_writer(self, *_: object) -> None: ...

    def add_writer(self, fd: int, *_: object) -> None:
        self.writers.append(fd)

    def call_soon(self, *call: Any) -> None:
        self.soon.append(call)


class Owner:
    reason = ""
    connection: Connection  #: as a session has it

    def received(self, message: dict[str, Any]) -> None: ...

    def ended(self, reason: str) -> None:
        self.reason = reason


def test_an_answer_to_a_peer_that_is_gone_waits_for_nothing() -> None:
    """uvloop has closed its handle of such a socket: to watch it again raised, which ended tierd
    when the answer came from a task (reload)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    loop, owner = Loop(), Owner()
    connection = Connection(cast("asyncio.AbstractEventLoop", loop), ours)
    connection.start(owner)
    theirs.close()
    connection.send({"id": 1, "ok": True})
    connection.send({"id": 2, "ok": True})
    assert loop.writers == []
    ((close, *arguments),) = loop.soon
    close(*arguments)
    assert connection.closed
    assert "cannot be written" in owner.reason


def test_a_connection_that_ended_is_gone_with_its_owner_at_once() -> None:
    """A cycle of the two would stay until `garbage` has a quiet moment."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection, owner = Connection(cast("asyncio.AbstractEventLoop", Loop()), ours), Owner()
    owner.connection = connection
    connection.start(owner)
    connection.close("the test ends it")
    theirs.close()
    left = weakref.ref(owner)
    del connection, owner
    assert left() is None


def test_a_peer_that_closes_with_replies_unread_and_requests_underway_holds_nothing(
    start_daemon: Callable[..., RunningDaemon], connect: Callable[..., RawClient], models: Path
) -> None:
    """Such a close is an error of the socket, of which uvloop tells once, with data before it."""
    write_pack(models / "tiny", 2)
    daemon = start_daemon("--models", models, "--dram", "4MiB")
    client = connect(daemon)
    client.open("tiny").acquire(0)
    client.send("status")
    select.select([client.sock], [], [])  # the reply is there, and stays unread
    daemon.process.send_signal(signal.SIGSTOP)
    client.sock.sendall(encode({"id": 0, "op": "release", "leases": []}))  # has no reply
    client.sock.close()
    daemon.process.send_signal(signal.SIGCONT)
    wait_until(lambda: daemon.status()["clients"] == 0, "the client is gone", 5)
    assert daemon.status()["dram"]["leased_bytes"] == 0
