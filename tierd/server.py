"""The listening socket: one daemon a path, no stale file in the way, and a bound on connections."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from typing import TYPE_CHECKING

from tierd.connection import Connection
from tierd.errors import SocketInUse, SocketUnusable
from tierd_layouts import wire

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

log = logging.getLogger(__name__)

BACKLOG = 512
PROBE_SECONDS = 1.0
RETRY_SECONDS = 0.2


class Listener:
    """A bound, listening AF_UNIX socket.

    The lock file beside the socket decides who may bind: the kernel gives it to one process and
    takes it back at its death, so between the probe of a stale socket and its removal nobody else
    can move in. The probe stays, for a daemon that listens there without our lock.
    """

    def __init__(self, sock: socket.socket, path: str, lock_fd: int | None) -> None:
        self._socket = sock
        self.path = path
        self._lock_fd = lock_fd
        self._loop: asyncio.AbstractEventLoop | None = None  # while it accepts
        self._limit = self._count = 0
        self._joined: Callable[[Connection], None]
        sock.setblocking(False)

    @classmethod
    def bind(cls, path: str, mode: int) -> Listener:
        """Raises SocketInUse naming the path when another daemon has it, SocketUnusable when it
        cannot be made."""
        try:
            lock_fd = _lock(path)
        except FileNotFoundError as error:
            where = os.path.dirname(path) or "."
            raise SocketUnusable(f"the socket {path}: {error.strerror}: {where}") from error
        except OSError as error:
            if isinstance(error, SocketInUse):
                raise
            raise SocketUnusable(f"the socket {path}: {error.strerror}: {path}.lock") from error
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _remove_stale(path)
            # The umask alone decides the mode of the file between bind and listen.
            previous = os.umask(0o777 & ~mode)
            try:
                sock.bind(path)
            finally:
                os.umask(previous)
            sock.listen(BACKLOG)
        except BaseException as error:
            sock.close()
            _unlock(path, lock_fd)
            if isinstance(error, OSError) and not isinstance(error, SocketInUse):
                raise SocketUnusable(f"the socket {path}: {error.strerror}") from error
            raise
        return cls(sock, path, lock_fd)

    @classmethod
    def inherit(cls, fd: int) -> Listener:
        """The socket that systemd listens on for us. Its file is systemd's."""
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise OSError(errno.EPROTOTYPE, "the inherited socket is no AF_UNIX stream socket")
        return cls(sock, str(sock.getsockname()), None)

    def start(
        self, loop: asyncio.AbstractEventLoop, limit: int, joined: Callable[[Connection], None]
    ) -> None:
        """Call `joined` with each new connection; beyond `limit` of them, refuse."""
        self._loop, self._limit, self._joined = loop, limit, joined
        loop.add_reader(self._socket.fileno(), self._readable)

    def ended(self) -> None:
        """One of the connections is over."""
        self._count -= 1

    def stop(self) -> None:
        """Accept nobody any more."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None

    def close(self) -> None:
        """Stop listening; remove the file, unless it is systemd's."""
        self.stop()
        self._socket.close()
        if self._lock_fd is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
            _unlock(self.path, self._lock_fd)
            self._lock_fd = None

    def _readable(self) -> None:
        assert self._loop is not None
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors: the backlog keeps the peer waiting until some are free.
            log.error("cannot accept a connection: %s", error)
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(RETRY_SECONDS, self._resume)
            return
        if self._count >= self._limit:
            _refuse(sock, self._limit)
            return
        try:
            connection = Connection(self._loop, sock)
        except OSError as error:
            log.info("a connection was dropped before it began: %s", error)
            sock.close()
            return
        self._count += 1
        self._joined(connection)

    def _resume(self) -> None:
        if self._loop is not None:
            self._loop.add_reader(self._socket.fileno(), self._readable)


def _lock(path: str) -> int:
    while True:
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise SocketInUse(f"another tierd serves the socket {path}") from None
        # A daemon that just ended may have removed the file that we locked.
        try:
            current = os.stat(f"{path}.lock")
        except FileNotFoundError:
            os.close(fd)
            continue
        if os.path.samestat(current, os.fstat(fd)):
            return fd
        os.close(fd)


def _unlock(path: str, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.lock")
    os.close(fd)


def _remove_stale(path: str) -> None:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    probe.settimeout(PROBE_SECONDS)
    try:
        probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        if not os.path.exists(path) or not _is_socket(path):
            raise OSError(errno.EEXIST, "exists and is no socket") from None
        log.info("removing the stale socket %s: nobody listens on it", path)
        os.unlink(path)
        return
    except TimeoutError:
        pass  # its backlog is full: somebody has it
    finally:
        probe.close()
    raise SocketInUse(f"another process serves the socket {path}")


def _is_socket(path: str) -> bool:
    return (os.lstat(path).st_mode & 0o170000) == 0o140000


def _refuse(sock: socket.socket, limit: int) -> None:
    text = f"tierd has {limit} connections, which is its limit"
    error = {"code": wire.ErrorCode.TOO_MANY_CLIENTS, "text": text}
    log.warning("refused a connection: %s", text)
    sock.setblocking(False)
    with contextlib.suppress(OSError):
        sock.send(wire.encode({"id": 0, "ok": False, "error": error}), socket.MSG_NOSIGNAL)
    sock.close()
