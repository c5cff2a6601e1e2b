"""What comes in over a connection's socket: bytes, and the descriptors that came with them."""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from dataclasses import dataclass
from time import perf_counter_ns
from typing import TYPE_CHECKING

from tierd_layouts.wire import MAX_FDS

if TYPE_CHECKING:
    from collections.abc import Iterable

RECEIVE_BYTES = 64 << 10
#: How long a reader looks for an answer before it lets the processor sleep.
POLL_NS = 60_000

# Plain numbers: `&` on the enumeration costs as much as the system call.
_TRUNCATED = int(socket.MSG_CTRUNC)
_RECEIVE_ARGUMENTS = (
    (RECEIVE_BYTES,),
    (socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize),),
    (int(socket.MSG_CMSG_CLOEXEC),),
)
_POLL_ARGUMENTS = (*_RECEIVE_ARGUMENTS[:2], (int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT),))

_Message = tuple[bytes, list[tuple[int, int, bytes]], int, object]


@dataclass(frozen=True, slots=True)
class Piece:
    """One read: no bytes at the end of the stream. The descriptors belong to whoever has it.

    truncated: descriptors were cut off, because this process may open no more.
    """

    data: bytes
    fds: list[int]
    truncated: bool


class Inbox:
    """The receiving half of a socket, whose receive timeout is the longest wait. One reader."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        #: What recvmsg returned and nobody has looked at: at most one piece.
        self._messages: deque[_Message] = deque()

    def wait(self) -> bool:
        """Wait for a piece; False when none came in time. Raises OSError."""
        if self._messages or self._poll_briefly():
            return True
        try:
            # One call from the socket into the deque: a signal's exception comes before or after
            # it, never between, so what was read is never lost.
            self._messages.extend(map(self._socket.recvmsg, *_RECEIVE_ARGUMENTS))
        except BlockingIOError:
            return False
        return True

    def look(self) -> bool:
        """Whether a piece is there, without waiting. Raises OSError."""
        if not self._messages:
            try:
                self._messages.extend(map(self._socket.recvmsg, *_POLL_ARGUMENTS))
            except BlockingIOError:
                return False
        return True

    def take(self) -> Piece:
        """The piece that was waited for."""
        data, ancillary, flags, _ = self._messages.popleft()
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                fds.extend(received)
        return Piece(data, fds, bool(flags & _TRUNCATED))

    def _poll_briefly(self) -> bool:
        """Whether something came at once. An answer about a resident layer takes the daemon tens
        of microseconds; a processor that fell asleep meanwhile needs about as long to wake up."""
        until = perf_counter_ns() + POLL_NS
        while perf_counter_ns() < until:
            if self.look():
                return True
        return False


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)
