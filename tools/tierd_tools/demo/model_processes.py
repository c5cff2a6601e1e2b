"""The model processes of a row: started together, let go together, their JSON lines collected."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GENERATE_SECONDS = 240


def run_workers(
    commands: list[list[str]],
    log: Path,
    before_go: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Start all, wait until all are ready, let all go at once, collect their JSON lines.

    environment: in addition to our own. What the workers say on stderr goes to `log`; a worker that
    fails or takes too long raises WorkerFailed with it.
    """
    variables = dict(os.environ, HF_HUB_OFFLINE="1", **(environment or {}))
    with log.open("w") as errors:
        workers = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=variables,
            )
            for command in commands
        ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            line = worker.stdout.readline().strip()
            if line != "ready":
                raise WorkerFailed(_last_lines(log, worker.wait()))
        if before_go is not None:
            before_go()
        outputs = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        for worker in workers:
            out = _output(worker, log)
            if worker.returncode != 0:
                raise WorkerFailed(_last_lines(log, worker.returncode))
            outputs.append(json.loads(out))
        return outputs
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _output(worker: subprocess.Popen[str], log: Path) -> str:
    try:
        out, _ = worker.communicate(timeout=GENERATE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise WorkerFailed(
            f"a model process was not done after {GENERATE_SECONDS} s; it said, in {log}:\n"
            + _tail(log)
        ) from error
    return out


class WorkerFailed(RuntimeError):
    """A model process ended early; the text has its last lines on stderr."""


def _last_lines(log: Path, returncode: int) -> str:
    return f"a model process ended with {returncode}; it said, in {log}:\n{_tail(log)}"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
