"""Who is at the other end of a socket: identity, permission, a descriptor that fires at death."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import stat
import struct
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)

_SO_PEERGROUPS = 59  # Linux 4.13; not in Python's socket module
_SO_PEERPIDFD = 77  # Linux 6.5
# Fields of /proc/PID/stat; the first after comm is field 3.
_FLAGS_AFTER_COMM = 6
_START_TIME_AFTER_COMM = 19
_PF_EXITING = 0x4  # linux/sched.h


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Who called connect(), as the kernel recorded it at that moment."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]  #: supplementary groups

    def may_read(self, *, uid: int, gid: int, mode: int) -> bool:
        """Whether this peer could open a file of that owner, group and mode for reading.

        As in path_resolution(7): the first class that fits decides, root passes. ACLs are not
        looked at.
        """
        if self.uid == 0:
            return True
        if self.uid == uid:
            return bool(mode & stat.S_IRUSR)
        if self.gid == gid or gid in self.groups:
            return bool(mode & stat.S_IRGRP)
        return bool(mode & stat.S_IROTH)


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """The peer of a connected Unix socket. From the socket, not /proc: no race with a reused pid,
    and it works where /proc hides other users' processes."""
    ucred = struct.Struct("3i")
    pid, uid, gid = ucred.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size))
    return PeerCredentials(pid, uid, gid, _peer_groups(sock))


def _peer_groups(sock: socket.socket) -> tuple[int, ...]:
    """By libc: Python's getsockopt takes no more than 256 groups, the kernel knows 65536."""
    length = ctypes.c_uint32(0)
    while True:
        groups = (ctypes.c_uint32 * (length.value // 4))()
        if (
            _libc.getsockopt(
                sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, groups, ctypes.byref(length)
            )
            == 0
        ):
            return tuple(groups)
        number = ctypes.get_errno()
        if number != errno.ERANGE:  # ERANGE: `length` now says how much there is
            raise OSError(number, f"SO_PEERGROUPS: {os.strerror(number)}")


def open_pidfd(peer: socket.socket | int) -> int:
    """A new descriptor that becomes readable when the process dies; the caller closes it.

    From a connected Unix socket it means the very process that connected (SO_PEERPIDFD); on a
    kernel before 6.5 the pid is looked up, which a reused pid could fool. ProcessLookupError when
    the process is gone already.
    """
    if isinstance(peer, int):
        return os.pidfd_open(peer)
    try:
        raw = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return os.pidfd_open(peer_credentials(peer).pid)
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise ProcessLookupError(errno.ESRCH, "the peer of the socket is gone") from error
        raise
    pidfd: int = struct.unpack("i", raw)[0]
    return pidfd


def start_time(pid: int, *, proc: str = "/proc") -> int:
    """When the process started, in clock ticks since boot. With its pid it names a process for
    good. ProcessLookupError when there is none."""
    return int(_stat(pid, proc)[_START_TIME_AFTER_COMM])


def is_exiting(pid: int, *, proc: str = "/proc") -> bool:
    """Whether the kernel has begun to take the process down. ProcessLookupError when it is gone."""
    return bool(int(_stat(pid, proc)[_FLAGS_AFTER_COMM]) & _PF_EXITING)


def _stat(pid: int, proc: str) -> list[bytes]:
    """The fields after comm."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            line = file.read()
    except FileNotFoundError as error:
        raise ProcessLookupError(errno.ESRCH, f"no process {pid}") from error
    # comm is in parentheses and may itself hold spaces and parentheses: only the last one counts.
    return line[line.rindex(b")") + 1 :].split()
