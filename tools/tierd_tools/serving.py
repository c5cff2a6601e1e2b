"""A daemon of one's own, for the demo and the benchmarks: started, awaited, stopped."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_tools.diagnostics import ask
from tierd_tools.errors import NoDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Serving:
    socket: str
    pid: int


@contextlib.contextmanager
def serve(
    flags: list[str],
    log: Path | None = None,
    wrap: Callable[[list[str]], list[str]] | None = None,
) -> Iterator[Serving]:
    """`tierd FLAGS` on a socket of its own. `wrap` may put the command into a cgroup; what the
    daemon says goes to `log`, else to stderr. Raises NoDaemon when it does not come up."""
    with tempfile.TemporaryDirectory(prefix="tierd-") as folder, contextlib.ExitStack() as stack:
        socket = str(Path(folder) / "tierd.sock")
        argv = [sys.executable, "-m", "tierd", "--socket", socket, *flags]
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        errors = stack.enter_context(log.open("w")) if log is not None else None
        process = subprocess.Popen(wrap(argv) if wrap else argv, stderr=errors)
        try:
            _wait_until_ready(process, socket)
            yield Serving(socket, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=READY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


def _wait_until_ready(process: subprocess.Popen[bytes], socket: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            ask(socket, "status")
            return
        except NoDaemon as error:
            if process.poll() is not None:
                raise NoDaemon(f"tierd ended with {process.returncode} at start") from error
            if time.monotonic() > deadline:
                raise NoDaemon(f"tierd was not ready within {READY_SECONDS:g} s") from error
            time.sleep(0.02)
