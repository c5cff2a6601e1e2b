"""The arguments of `tierctl doctor`, and the order in which it looks at things."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_tools.command_line import add_socket
from tierd_tools.doctor.finding import Diagnosis, Finding, show
from tierd_tools.errors import BadSetting

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from tierd_tools.command_line import Command
    from tierd_tools.terminal import Reply

__all__ = ["add", "examine", "show"]

_MOST_DESCRIPTORS = 4096
_ABOUT = "Try out what tierd relies on here: devices, memory, disks, systemd."


def add(command: Command) -> None:
    """Add the command."""
    sub = command("doctor", _doctor, _ABOUT)
    sub.add_argument(
        "--packs", type=Path, action="append", default=[], metavar="DIR",
        help="a directory of packs, or a pack; repeatable; default: the daemon's",
    )  # fmt: skip
    sub.add_argument(
        "--gpu", type=int, action="append", default=[], metavar="N",
        help="a GPU that must work, as nvidia-smi counts; repeatable; default: those that are here",
    )  # fmt: skip
    add_socket(sub)


def _doctor(arguments: argparse.Namespace) -> Reply:
    if any(number < 0 for number in arguments.gpu):
        raise BadSetting(f"--gpu {min(arguments.gpu)} is no number of a GPU")
    return examine(arguments.socket, arguments.packs, arguments.gpu).as_reply()


def examine(
    socket: str | None = None, packs: Sequence[Path] = (), gpus: Sequence[int] = ()
) -> Diagnosis:
    """socket, packs, gpus: what must work; None or nothing is what is found here."""
    from tierd_tools.doctor import gpu_direct, memory, service, storage

    daemon = service.daemon(socket)
    found = [
        *_kernel(),
        *memory.findings(),
        *storage.findings(packs or daemon.packs),
        *service.findings(daemon),
        *_devices(gpus),
        gpu_direct.finding(),
    ]
    return Diagnosis(tuple(found))


def _devices(gpus: Sequence[int]) -> Iterator[Finding]:
    from tierd_tools.doctor import kernels, nvidia, round_trip

    yield round_trip.finding("memfd", 0, needed=True)
    found = nvidia.look()
    yield from nvidia.findings(found)
    numbers = gpus or range(found.started.gpus) or (0,)
    needed = bool(gpus) or found.present
    for number in numbers:
        preferred = round_trip.finding("cuda_vmm", number, needed=needed)
        yield preferred
        # The second way is needed by whoever has not the first.
        yield round_trip.finding("cuda_ipc", number, needed=False)
    yield kernels.finding(present=found.problem is None)


def _kernel() -> Iterator[Finding]:
    """What the kernel must offer for leases to end with their holders."""
    import resource
    import socket

    from tierd.io.process import open_pidfd

    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(open_pidfd(ours))
            yield Finding("pidfd of a peer", "works", "a lease ends with the process that held it")
        except OSError as error:
            text = f"{error.strerror} on Linux {os.uname().release}"
            advice = "Linux 5.3 or later, and a seccomp filter that lets pidfd_open through"
            yield Finding("pidfd of a peer", "does not work", text, advice, needed=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{hard} descriptors (tierd raises its own limit from {soft})"
    if hard == resource.RLIM_INFINITY or hard >= _MOST_DESCRIPTORS:
        yield Finding("descriptors", "works", text)
    else:
        yield Finding(
            "descriptors", "does not work", f"{text}: a client takes two, a shard one",
            "LimitNOFILE=65536 in the unit (systemd/tierd.service), or `ulimit -Hn 65536`",
        )  # fmt: skip
