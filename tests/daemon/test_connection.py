"""One accepted socket whose peer goes away at a bad moment."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, cast

from tierd.connection import Connection

if TYPE_CHECKING:
    import asyncio


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
