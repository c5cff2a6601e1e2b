"""A daemon for this process alone: started for a pack, stopped at exit, never left behind."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import IO, TYPE_CHECKING, Self

from tierd_client import fork
from tierd_client.errors import PrivateDaemonFailed
from tierd_layouts.wire import MAX_SOCKET_PATH_BYTES

if TYPE_CHECKING:
    from types import TracebackType

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.01
SHOWN_BYTES = 4096  # of the daemon's stderr in an error
SOCKET_NAME = "tierd.sock"
_log = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("private_launcher.py")


class PrivateDaemon:
    """A running daemon. `socket` is its path; `stop` ends it, and so does the end of this process,
    however it comes. Use it as a context or keep it: nothing else stops it."""

    def __init__(self, folder: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.socket = os.path.join(folder, SOCKET_NAME)
        self.pid = process.pid
        self._folder = folder
        self._process = process
        self._log = log
        self._served = False
        self._life = fork.current()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the daemon and remove its folder. Again, or in a forked child, does nothing."""
        if self._life is not fork.current() or self._log.closed:
            return
        atexit.unregister(self.stop)
        ended = self._process.poll() is not None
        self._process.terminate()
        try:
            # What was killed may not be reported until its last thread is gone.
            ended |= self._process.wait(STOP_TIMEOUT_S) not in (0, -signal.SIGTERM)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if ended and self._served:  # its clients heard only that it is gone
            status, said = self._process.returncode, self.messages() or "it said nothing"
            _log.warning("the private tierd %d ended with status %d: %s", self.pid, status, said)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def messages(self) -> str:
        """The end of what the daemon wrote to stderr."""
        nbytes = os.fstat(self._log.fileno()).st_size
        text = os.pread(self._log.fileno(), SHOWN_BYTES, max(0, nbytes - SHOWN_BYTES))
        return text.decode(errors="replace").strip()

    def wait_started(self, timeout: float) -> None:
        """Wait until the daemon takes connections. Raises PrivateDaemonFailed."""
        deadline = monotonic() + timeout
        while not _answers(self.socket):
            status = self._process.poll()
            if status is not None:
                raise PrivateDaemonFailed(
                    f"a private tierd ended with status {status} before it served: "
                    f"{self.messages() or 'it said nothing'}"
                )
            if monotonic() > deadline:
                raise PrivateDaemonFailed(
                    f"a private tierd did not serve within {timeout:g} s: "
                    f"{self.messages() or 'it said nothing'}"
                )
            sleep(POLL_S)
        self._served = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def start(
    pack: str | os.PathLike[str], dram: str | None = None, *, timeout: float = START_TIMEOUT_S
) -> PrivateDaemon:
    """Start a daemon that serves the pack in directory `pack`, and wait until it does.

    dram: its budget, as `tierd --dram` takes it ("4GiB", "auto"); None leaves it to $TIERD_DRAM,
    else half of what is free. Raises PrivateDaemonFailed with what the daemon wrote to stderr.
    """
    folder = _short_folder()
    # Lives as long as the daemon; a pipe would need a thread that reads it.
    log = tempfile.TemporaryFile()  # noqa: SIM115
    # -P: the launcher's folder, full of this package's modules, must not be searched for imports.
    command = [sys.executable, "-P", str(LAUNCHER), str(os.getpid())]
    command += ["--pack", os.fspath(pack)]
    if dram is not None:
        command += ["--dram", dram]
    command += ["--socket", os.path.join(folder, SOCKET_NAME)]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    except BaseException:
        log.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    daemon = PrivateDaemon(folder, process, log)
    try:
        daemon.wait_started(timeout)
    except BaseException:
        daemon.stop()
        raise
    return daemon


def _answers(path: str) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def _short_folder() -> str:
    """A new folder, private to this user, whose path leaves room for the socket's name."""
    folder = tempfile.mkdtemp(prefix="tierd-")
    if len(os.fsencode(os.path.join(folder, SOCKET_NAME))) <= MAX_SOCKET_PATH_BYTES:
        return folder
    os.rmdir(folder)  # a deep TMPDIR
    return tempfile.mkdtemp(prefix="tierd-", dir="/tmp")
