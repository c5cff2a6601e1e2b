"""A connection to the daemon: the blocking socket around the protocol.

Any thread may call. One lock serialises sending; of the threads that wait, one at a time reads, and
hands every reply to whom it belongs. There is no thread of our own, so a reply is read only when
somebody waits.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any

from tierd_client import fork, orphans
from tierd_client.daemon_socket import connected_socket, limit_calls
from tierd_client.departures import Departures
from tierd_client.errors import (
    ClientClosed,
    DaemonGone,
    DaemonTimeout,
    ProtocolBroken,
    TierdError,
)
from tierd_client.inbox import Inbox, Piece, close_all
from tierd_client.protocol import NO_REPLY, ClientProtocol, Reply
from tierd_layouts.wire import DRAM_TIER, MAX_REQUEST_BYTES, encode

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd_client.lease import Lease


class Connection:
    """One Unix socket to one daemon life. Owns the socket; thread-safe; dead after EOF.

    tier: what its grants are of; what a daemon that ends leaves leased is of DRAM only.
    """

    def __init__(
        self, sock: socket.socket, path: str, timeout: float, tier: str = DRAM_TIER
    ) -> None:
        limit_calls(sock, timeout)
        self.path = path
        self.timeout = timeout
        self.tier = tier
        #: Leases granted and not given back: id -> the Lease, None before it is made.
        self.held: dict[int, weakref.ref[Lease] | None] = {}
        #: Leases of an earlier daemon, which this one was told of, that this process still reads.
        self.orphans: set[int] = set()
        #: Leases that go back when a GPU is through with them.
        self.departures = Departures(self.release)
        self._life = fork.current()
        self._socket = sock
        self._protocol = ClientProtocol()
        self._inbox = Inbox(sock)
        self._send_lock = threading.Lock()
        # Guards the protocol, the replies and who reads.
        self._lock = threading.Lock()
        self._delivered = threading.Condition(self._lock)
        self._replies: dict[int, Reply] = {}
        self._reader: int | None = None
        #: Why calls are refused. The socket may still be open to give back leases.
        self._ended: tuple[type[TierdError], str] | None = None
        self._shut = False
        # What finalizers leave behind: they must never wait for a lock that their thread holds.
        self._to_release: deque[int] = deque()
        self._to_abandon: deque[int] = deque()
        fork.in_child(self, Connection._close_in_child)
        weakref.finalize(self, sock.close)
        orphans.connections.add(self)

    @classmethod
    def connect(cls, path: str, timeout: float, tier: str = DRAM_TIER) -> Connection:
        """Connect to the socket at `path`. Raises DaemonNotRunning, DaemonTimeout."""
        return cls(connected_socket(path, timeout), path, timeout, tier)

    @property
    def alive(self) -> bool:
        """False once the connection has ended, for whatever reason."""
        return self._ended is None and self._life is fork.current()

    @property
    def lost(self) -> bool:
        """True when the daemon went away, not this side."""
        return self._shut and self._life is fork.current()

    def check(self) -> None:
        """Raise what a call would raise now: ForkedClient, DaemonGone, ClientClosed."""
        if self._life is not fork.current():
            fork.check(self._life, f"the connection to {self.path}")
        if self._ended is not None:
            kind, text = self._ended
            raise kind(text)

    # ------------------------------------------------------------------------------------ requests

    def submit(self, op: str, fields: dict[str, Any]) -> int:
        """Send a request; returns its id for `wait_reply`."""
        self.check()
        with self._lock:
            self._abandon_left_behind()
            request, frame = self._protocol.request(op, fields)
        self._send(frame)
        return request

    def notify(self, op: str, **fields: Any) -> None:
        """Send what the daemon may take or leave: no reply comes."""
        self.check()
        self._send(encode({"id": NO_REPLY, "op": op, **fields}, MAX_REQUEST_BYTES))

    def call(self, op: str, **fields: Any) -> Reply:
        """Send a request and wait for its good reply. Raises the mapped error of a bad one."""
        reply = self.wait_reply(self.submit(op, fields))
        refusal = reply.refusal
        if refusal is not None:
            raise refusal
        return reply

    def wait_reply(self, request: int) -> Reply:
        """The reply to `request`, good or bad. Raises DaemonTimeout, DaemonGone, ClientClosed."""
        deadline = monotonic() + self.timeout
        try:
            while True:
                with self._lock:
                    reply = self._replies.pop(request, None)
                    if reply is not None:
                        return reply
                    self.check()
                    left = deadline - monotonic()
                    if left <= 0:
                        raise DaemonTimeout(
                            f"tierd at {self.path} did not answer in {self.timeout:g} s"
                        )
                    if self._reader is not None:
                        self._delivered.wait(left)
                        continue
                    self._reader = threading.get_ident()
                self._receive()
                self._stop_reading()
        except BaseException:
            # Interrupted or late: the reply may still come and must not leak what it brings.
            if self._life is fork.current():
                self._stop_reading()
                self.abandon(request)
            raise

    def look(self) -> None:
        """Take in what came meanwhile, the end of the connection too, without waiting for it.
        Raises what a call would raise then."""
        self.check()
        with self._lock:
            if self._reader is None:
                self._reader = threading.get_ident()
        try:
            if self._reader == threading.get_ident():  # else somebody reads anyway
                self._receive(wait=False)
        finally:
            self._stop_reading()
        self.check()

    def peek(self, request: int) -> Reply | None:
        """The reply to `request` if it is here; it stays for `wait_reply`. Does not wait."""
        if request not in self._replies and self._reader is None:
            self.look()
        return self._replies.get(request)

    def abandon(self, request: int) -> None:
        """Nobody will wait for this reply: give back what it brings, now or when it comes."""
        with self._lock:
            reply = self._replies.pop(request, None)
            if reply is None:
                self._protocol.abandon(request)
        if reply is not None:
            self._give_back(reply)

    def abandon_soon(self, request: int) -> None:
        """As `abandon`, for finalizers: takes no lock; done at the next call of anybody."""
        self._to_abandon.append(request)

    # ------------------------------------------------------------------------------------- release

    def live_leases(self) -> list[Lease]:
        """The leases that somebody still has."""
        references = [reference for reference in list(self.held.values()) if reference is not None]
        return [lease for lease in (reference() for reference in references) if lease is not None]

    def release(self, leases: Iterable[int]) -> None:
        """End leases; no reply. On a dead connection the daemon has freed them already.

        Safe in a finalizer: it never waits for a lock. What a busy lock keeps from being sent is
        sent by its holder.
        """
        if self._life is not fork.current():
            return
        self._to_release.extend(leases)
        self._flush_releases()

    def _flush_releases(self) -> None:
        # Look again after letting go: whoever failed to get the lock relies on its holder.
        while self._to_release and self._send_lock.acquire(blocking=False):
            try:
                self._send_releases()
            finally:
                self._send_lock.release()

    def _send_releases(self) -> None:
        leases: list[int] = []
        while self._to_release and len(leases) < 1024:
            lease = self._to_release.popleft()
            if lease in self.held:
                del self.held[lease]
                leases.append(lease)
            elif lease in self.orphans:
                self.orphans.discard(lease)
                leases.append(lease)
        if self._shut:
            if self.tier == DRAM_TIER:
                orphans.release(self.path, leases)
        elif leases:
            frame = encode({"id": NO_REPLY, "op": "release", "leases": leases}, MAX_REQUEST_BYTES)
            try:
                self._socket.sendall(frame)
            except OSError as error:
                self._end(DaemonGone, self._gone(error.strerror))
        if self._ended is not None and not self.held:
            self._shut_down()

    # -------------------------------------------------------------------------------------- socket

    def _send(self, frame: bytes) -> None:
        try:
            with self._send_lock:
                self.check()
                try:
                    self._socket.sendall(frame)
                except OSError as error:
                    # A frame may be half sent: nothing can follow it.
                    self._end(DaemonGone, self._gone(error.strerror))
                    self.check()
                except BaseException:
                    self._end(ClientClosed, f"sending to {self.path} was interrupted")
                    raise
        finally:
            self._flush_releases()

    def _stop_reading(self) -> None:
        if self._reader == threading.get_ident():
            with self._lock:
                self._reader = None
                self._delivered.notify_all()

    def _receive(self, *, wait: bool = True) -> None:
        """Read once and deliver. The caller is the one reader, and looks at its deadline."""
        try:
            if not (self._inbox.wait() if wait else self._inbox.look()):
                return
        except OSError as error:
            self._end(DaemonGone, self._gone(error.strerror))
            return
        try:
            self._deliver(self._inbox.take())
        except BaseException:
            self._end(ClientClosed, f"reading from {self.path} was interrupted")
            raise

    def _deliver(self, piece: Piece) -> None:
        if piece.truncated:
            close_all(piece.fds)
            text = f"descriptors from {self.path} were cut off (limit of open files reached?)"
            self._end(ProtocolBroken, text)
            return
        if not piece.data:
            self._end(DaemonGone, self._gone("it closed the connection"))
            return
        unwanted = []
        with self._lock:
            self._abandon_left_behind()
            try:
                replies = self._protocol.receive(piece.data, piece.fds)
            except ProtocolBroken as error:
                self._end(ProtocolBroken, f"tierd at {self.path}: {error}")
                close_all(self._protocol.drop_fds())
                return
            for reply in replies:
                lease = reply.fields.get("lease")
                if reply.op == "acquire" and type(lease) is int:
                    self.held[lease] = None
                if reply.abandoned:
                    unwanted.append(reply)
                else:
                    self._replies[reply.request] = reply
        for reply in unwanted:
            self._give_back(reply)

    def _abandon_left_behind(self) -> None:
        while self._to_abandon:
            request = self._to_abandon.popleft()
            reply = self._replies.pop(request, None)
            if reply is None:
                self._protocol.abandon(request)
            else:
                self._give_back(reply)

    def _give_back(self, reply: Reply) -> None:
        close_all(reply.fds)
        lease = reply.fields.get("lease")
        if reply.op == "acquire" and type(lease) is int:
            self.release([lease])

    # ----------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Refuse every later call and end the connection, which frees everything it held; waiting
        calls raise. While a lease is still held, because a view of it is alive, the socket stays
        open until that is released too."""
        if self._life is not fork.current() or self._ended is not None:
            return
        self._ended = (ClientClosed, f"the client of {self.path} was closed")
        # Grants that nobody collected; `OpenedModel.granted` refuses them from now on.
        self.release([lease for lease, made in list(self.held.items()) if made is None])
        if not self.held:
            self._shut_down()

    def fail(self, error: ProtocolBroken) -> None:
        """End the connection: a reply that was delivered makes no sense."""
        self._end(type(error), f"tierd at {self.path}: {error}")

    def _end(self, kind: type[TierdError], text: str) -> None:
        if self._ended is None:
            self._ended = (kind, text)
        self._shut_down()

    def _gone(self, reason: str | None) -> str:
        return f"tierd at {self.path} is gone: {reason}"

    def _shut_down(self) -> None:
        # Wakes a thread that reads. The descriptor itself is closed with this object: another
        # thread may be about to use its number.
        self._shut = True
        with contextlib.suppress(OSError):  # the peer was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def _close_in_child(self) -> None:
        self._socket.close()  # no shutdown: the parent still uses it
        close_all(self._protocol.drop_fds())
        for reply in self._replies.values():
            close_all(reply.fds)
