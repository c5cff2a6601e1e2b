"""systemd's side of a service: readiness, watchdog, socket activation and the descriptor store.

The protocol of sd_notify(3) and sd_listen_fds(3): datagrams to $NOTIFY_SOCKET, descriptors by
SCM_RIGHTS in, by inheritance from 3 upwards out.
"""

from __future__ import annotations

import array
import os
import re
import socket
from typing import TYPE_CHECKING

from tierd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

_FIRST_FD = 3
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")


def notify(state: str, fds: Sequence[int] = (), *, environ: Mapping[str, str] = os.environ) -> bool:
    """Send `state` ("READY=1", lines separated by newlines). False when nobody asked to be told,
    i.e. outside systemd; OSError when the one who asked cannot be reached."""
    address = environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address[0] not in "/@":
        raise ConfigError(f"NOTIFY_SOCKET is {address!r}: expected a path or @abstract name")
    if address[0] == "@":
        address = "\0" + address[1:]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendmsg([state.encode()], rights, 0, address)
    return True


def listen_fds(environ: MutableMapping[str, str] = os.environ) -> dict[str, list[int]]:
    """The descriptors that systemd handed over, by name: sockets of the .socket unit and those of
    the descriptor store. Takes the variables out of `environ`, so that no child claims them."""
    pid = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()):
        return {}
    if not count.isdecimal():
        raise ConfigError(f"LISTEN_FDS is {count!r}: expected a number")
    found: dict[str, list[int]] = {}
    for index in range(int(count)):
        fd = _FIRST_FD + index
        os.set_inheritable(fd, False)
        name = names[index] if index < len(names) and names[index] else "unknown"
        found.setdefault(name, []).append(fd)
    return found


def fdstore(name: str, fd: int, *, environ: Mapping[str, str] = os.environ) -> bool:
    """Keep a duplicate of `fd` beyond the life of this process; an earlier one of that name goes.

    FDPOLL=0: a memfd is always "ready", systemd must not drop it for that.
    """
    fdstore_remove(name, environ=environ)
    return notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd], environ=environ)


def fdstore_remove(name: str, *, environ: Mapping[str, str] = os.environ) -> bool:
    """Forget all stored descriptors of that name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name a stored descriptor")
    return notify(f"FDSTOREREMOVE=1\nFDNAME={name}", environ=environ)


def watchdog_interval_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """How often to send WATCHDOG=1: a third of systemd's limit. None when it does not watch us."""
    limit_us = environ.get("WATCHDOG_USEC")
    if not limit_us or environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not limit_us.isdecimal() or int(limit_us) == 0:
        raise ConfigError(f"WATCHDOG_USEC is {limit_us!r}: expected a number above 0")
    return int(limit_us) / 1e6 / 3
