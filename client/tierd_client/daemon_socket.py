"""A daemon's Unix socket as a connection uses it: calls block, and none blocks for ever."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from time import monotonic

from tierd_client.errors import DaemonNotRunning, DaemonTimeout

#: Longest sleep in one receiving call; deadlines are checked at least this often.
SLICE_S = 0.5


def connected_socket(path: str, timeout: float) -> socket.socket:
    """Connect to the socket at `path`. Raises DaemonNotRunning, DaemonTimeout."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Not settimeout(): a socket that does not block is refused at once where others wait too.
        limit_calls(sock, timeout)
        deadline = monotonic() + timeout
        sock.connect(path)
        while not _has_peer(sock):
            # A signal came while it waited: Python takes that for a connection under way.
            if monotonic() > deadline:
                raise BlockingIOError
            sock.connect(path)
    except BlockingIOError as error:
        sock.close()
        raise DaemonTimeout(f"tierd at {path} took no connection in {timeout:g} s") from error
    except OSError as error:
        sock.close()
        reason = "it is no socket" if _is_no_socket(path) else error.strerror
        raise DaemonNotRunning(
            f"no tierd answers at {path} ({reason}): start it, or name its socket with socket=, "
            "--socket of tierctl, or TIERD_SOCKET"
        ) from error
    return sock


def _is_no_socket(path: str) -> bool:
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    return True


def limit_calls(sock: socket.socket, timeout: float) -> None:
    """Have no call on it take longer than `timeout` seconds, and no receive longer than SLICE_S."""
    # Kernel timeouts, not settimeout(): that would poll before every receive.
    sock.settimeout(None)
    for option, seconds in (
        (socket.SO_RCVTIMEO, min(timeout, SLICE_S)),
        (socket.SO_SNDTIMEO, timeout),
    ):
        interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6) or 1)
        sock.setsockopt(socket.SOL_SOCKET, option, interval)
