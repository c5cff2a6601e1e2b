"""The daemon and systemd around it: does one answer, is it a service, does it come back warm?"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_client.connection import Connection
from tierd_client.errors import TierdError
from tierd_layouts import wire
from tierd_layouts.errors import SocketPathTooLong
from tierd_tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

ANSWER_SECONDS = 5.0
UNIT = "tierd.service"
#: From this version on a unit may keep its descriptors over `systemctl stop`.
PRESERVES = 254
_KEEPS = "FileDescriptorStorePreserve=yes"


@dataclass(frozen=True, slots=True)
class Daemon:
    """Whoever answers at the socket. `status` is None when nobody does; then `reason` says why."""

    socket: str
    asked_for: bool  #: the socket was named, so somebody should be there
    status: dict[str, Any] | None
    config: dict[str, Any]
    reason: str = ""

    @property
    def packs(self) -> list[Path]:
        found = [*self.config.get("models", ()), *self.config.get("packs", ())]
        return [Path(path) for path in found]


def daemon(socket: str | None) -> Daemon:
    """Ask whoever is at the socket. Never raises: that nobody answers is a finding."""
    try:
        path = wire.resolve_socket(socket, for_listening=False)
    except SocketPathTooLong as error:
        return Daemon(str(socket), True, None, {}, str(error))
    try:
        connection = Connection.connect(path, ANSWER_SECONDS)
        try:
            status = connection.call("status").fields
            rows = connection.call("config").fields["config"]
        finally:
            connection.close()
    except TierdError as error:
        return Daemon(path, socket is not None, None, {}, str(error))
    return Daemon(path, socket is not None, status, {row["key"]: row["value"] for row in rows})


def findings(found: Daemon, root: Path = Path("/")) -> Iterator[Finding]:
    """root: where /proc and /run are looked up (tests)."""
    yield _socket(found)
    for gpu in (found.status or {}).get("gpus", ()):
        yield _gpu(gpu)
    yield from _systemd(found, root)


def _socket(found: Daemon) -> Finding:
    if found.status is None:
        return Finding(
            "socket", "does not work", found.reason or f"nobody answers at {found.socket}",
            "start a daemon (tierd --models DIR, or systemctl start tierd), or name its socket "
            "with --socket or $TIERD_SOCKET",
            needed=found.asked_for,
        )  # fmt: skip
    daemon = found.status["daemon"]
    return Finding("socket", "works", f"tierd {daemon['version']} (pid {daemon['pid']}) answers "
                   f"at {found.socket}")  # fmt: skip


def _gpu(gpu: dict[str, Any]) -> Finding:
    """A GPU tier that the running daemon was given."""
    name, state = f"{gpu['tier']} of the daemon", gpu["state"]
    if state == "ready":
        return Finding(name, "works", f"{gpu['device']}, {gpu.get('name') or 'no name'}")
    if state == "failed":
        return Finding(
            name, "does not work", str(gpu.get("reason")),
            "see the lines of the devices below; then restart the daemon", needed=True,
        )  # fmt: skip
    return Finding(name, "unknown", f"its device is {state}", "ask again in a few seconds")


def _systemd(found: Daemon, root: Path) -> Iterator[Finding]:
    if not (root / "run/systemd/system").is_dir():
        yield Finding(
            "systemd", "does not work", "this machine was not started by systemd",
            "tierd runs without, but a restarted daemon then begins with an empty memory",
        )  # fmt: skip
        return
    version = systemd_version()
    if version is None:
        yield Finding("systemd", "unknown", "systemctl does not say its version")
        return
    if version >= PRESERVES:
        yield Finding("systemd", "works", f"version {version}: {_KEEPS} is possible")
    else:
        yield Finding(
            "systemd", "works",
            f"version {version}: a restart is warm, `systemctl stop` is not "
            f"({_KEEPS} needs version {PRESERVES})",
        )  # fmt: skip
    yield _as_service(found, root, version)


def _as_service(found: Daemon, root: Path, version: int) -> Finding:
    name = "as a service"
    if found.status is None:
        state = _systemctl("is-active", UNIT)
        return Finding(
            name, "unknown", f"no daemon answers; systemd says that {UNIT} is {state or 'unknown'}",
            "systemd/README.md installs the units",
        )  # fmt: skip
    pid = found.status["daemon"]["pid"]
    try:
        groups = (root / f"proc/{pid}/cgroup").read_text()
    except OSError as error:
        return Finding(name, "unknown", f"/proc/{pid}/cgroup: {error.strerror}", "ask as root")
    if UNIT not in groups:
        return Finding(
            name, "does not work", f"the daemon (pid {pid}) runs outside {UNIT}: systemd keeps "
            "nothing for it, so a crash loses what was resident",
            "systemd/README.md installs the units",
        )  # fmt: skip
    kept = _systemctl("show", UNIT, "--property=FileDescriptorStorePreserve", "--value")
    text = f"the daemon (pid {pid}) is {UNIT}"
    if version >= PRESERVES and kept != "yes":
        return Finding(
            name, "works", f"{text}; FileDescriptorStorePreserve is {kept or 'unknown'}",
            f"a drop-in with {_KEEPS} keeps the memory over `systemctl stop` as well",
        )  # fmt: skip
    return Finding(name, "works", text)


def systemd_version() -> int | None:
    """None where systemctl is missing or does not say."""
    said = _systemctl("--version")  # "systemd 252 (252.38-1~deb12u1)"
    words = (said or "").split()
    return int(words[1]) if len(words) > 1 and words[1].isdecimal() else None


def _systemctl(*arguments: str) -> str | None:
    command = shutil.which("systemctl")
    if command is None:
        return None
    try:
        done = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None
