"""One accepted socket: frames in, frames and file descriptors out, and the moment that it ends.

Raw non-blocking sockets, because a transport of asyncio or uvloop can pass no file descriptors.
The connection ends once: when the peer closes it, when the peer's process dies (a forked child may
still hold the socket open, so the pidfd is watched too), when it sends what is no frame, or when it
does not read what it asked for.
"""

from __future__ import annotations

import array
import collections
import logging
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any, Protocol

from tierd.io.process import open_pidfd, peer_credentials
from tierd_layouts import wire
from tierd_layouts.errors import FormatError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 << 10
LINGER_NS = 50_000  # that the loop stays awake after a request
QUEUE_FRAMES = 256  # replies that a peer may leave unread ...
QUEUE_BYTES = 16 << 20  # ... and their bytes: four of the largest
QUEUE_FDS = 256  # ... and the descriptors with them


class Owner(Protocol):
    """Whoever answers the messages of a connection."""

    def received(self, message: dict[str, Any]) -> None: ...

    def ended(self, reason: str) -> None:
        """Called exactly once, after which nothing can be sent."""


class _Frame:
    __slots__ = ("data", "fds")

    def __init__(self, data: memoryview, fds: list[int]) -> None:
        self.data = data
        self.fds = fds  # our own duplicates, until the first byte of the frame is sent


class Connection:
    """One peer. Raises OSError when the peer is already dead or cannot be identified."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._decoder = wire.FrameDecoder(wire.MAX_REQUEST_BYTES)
        self._queue: collections.deque[_Frame] = collections.deque()
        self._queued_bytes = 0
        self._owner: Owner | None = None
        self._last_words = False
        self._lingers = False
        self._lingers_until_ns = 0
        self.closed = False
        sock.setblocking(False)
        self.peer = peer_credentials(sock)
        self.pidfd = open_pidfd(sock)

    def start(self, owner: Owner) -> None:
        self._owner = owner
        self._loop.add_reader(self._sock.fileno(), self._readable)
        self._loop.add_reader(self.pidfd, self._died)

    def peer_lives(self) -> bool:
        """Whether the process behind the pidfd still runs."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a frame, or queue it (with duplicates of `fds`). A peer that leaves too much unread
        is disconnected soon after, not here: the caller may be in the middle of a decision."""
        if self.closed or self._last_words:
            return
        frame = wire.encode(message)
        sent = 0
        if not self._queue:
            sent = self._transmit(frame, fds)
            if sent == len(frame) or self._last_words:  # all is sent, or the peer is gone
                return
            self._loop.add_writer(self._sock.fileno(), self._writable)
        rest = memoryview(frame)[sent:]
        self._queue.append(_Frame(rest, [] if sent else [os.dup(fd) for fd in fds]))
        self._queued_bytes += len(rest)
        if (
            len(self._queue) > QUEUE_FRAMES
            or self._queued_bytes > QUEUE_BYTES
            or (fds and sum(len(frame.fds) for frame in self._queue) > QUEUE_FDS)
        ):
            reason = (
                f"left {len(self._queue)} replies ({self._queued_bytes} bytes) unread, "
                f"the limit is {QUEUE_FRAMES} replies, {QUEUE_BYTES} bytes or {QUEUE_FDS} "
                "descriptors"
            )
            log.warning("process %d is disconnected: it %s", self.peer.pid, reason)
            self._close_soon(reason)

    def close_after_sending(self, reason: str) -> None:
        """Take no further request, and close when what is queued was sent."""
        self._last_words = True
        self._loop.remove_reader(self._sock.fileno())
        if not self._queue:
            self._close_soon(reason)

    def reject(self, reason: str) -> None:
        """The peer broke the protocol: there is nothing to answer to."""
        log.warning("process %d is disconnected: it %s", self.peer.pid, reason)
        self.close(reason)

    def close(self, reason: str) -> None:
        if self.closed:
            return
        self.closed = True
        fd = self._sock.fileno()
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        self._loop.remove_reader(self.pidfd)
        os.close(self.pidfd)
        for frame in self._queue:
            for duplicate in frame.fds:
                os.close(duplicate)
        self._queue.clear()
        self._sock.close()
        owner, self._owner = self._owner, None  # and no cycle is left of the two
        if owner is not None:
            owner.ended(reason)

    def _close_soon(self, reason: str) -> None:
        self._last_words = True
        self._loop.call_soon(self.close, reason)

    def _died(self) -> None:
        self.close(f"process {self.peer.pid} died")

    def _linger(self) -> None:
        """Keep the loop from sleeping for a moment after a request: the next one often follows at
        once, and waking up costs as much as answering."""
        if self.closed or time.perf_counter_ns() >= self._lingers_until_ns:
            self._lingers = False
        else:
            self._loop.call_soon(self._linger)

    def _readable(self) -> None:
        try:
            # Plain recv: the kernel drops descriptors that a client attaches.
            data = self._sock.recv(RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"cannot be read: {error}")
            return
        if not data:
            self.close("closed by the client")
            return
        assert self._owner is not None
        try:
            self._decoder.feed(data)
            for message in self._decoder:
                self._owner.received(message)
                if self.closed or self._last_words:
                    return
        except FormatError as error:
            self.reject(f"sent what is no frame: {error}")
            return
        # A peer that closes with replies unread is an error of the socket. uvloop tells of it once
        # and watches no longer, although what was received before it came first.
        failed = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            self.close(f"cannot be read: {os.strerror(failed)}")
            return
        self._lingers_until_ns = time.perf_counter_ns() + LINGER_NS
        if not self._lingers:
            self._lingers = True
            self._loop.call_soon(self._linger)

    def _writable(self) -> None:
        while self._queue:
            frame = self._queue[0]
            sent = self._transmit(frame.data, frame.fds)
            if self.closed or not sent:
                return
            for duplicate in frame.fds:
                os.close(duplicate)
            frame.fds = []
            self._queued_bytes -= sent
            frame.data = frame.data[sent:]
            if frame.data:
                return
            self._queue.popleft()
        self._loop.remove_writer(self._sock.fileno())
        if self._last_words:
            self.close("said everything")

    def _transmit(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            return self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._close_soon(f"cannot be written: {error}")
            return 0
