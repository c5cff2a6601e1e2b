"""What a daemon answers to a user that it does not know. Needs root, to become that user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.daemon.conftest import RunningDaemon

_ASK = """
import json
from tests.daemon.conftest import RawClient, Refused
become_nobody()
client = RawClient(sys.argv[1])
for op, fields in json.loads(sys.argv[2]):
    try:
        client.call(op, **fields)
        print("ok")
    except Refused as refused:
        print(refused.code)
"""
_BEGINNING = "import os, sys\nfrom tests.daemon.as_nobody import become_nobody\n"

Calls = list[tuple[str, dict[str, Any]]]


def become_nobody() -> None:
    """For good, so only in a process made for that, after its imports."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def lines(program: str, *arguments: str) -> list[str]:
    """What a program prints that calls become_nobody() before it talks to anybody."""
    done = subprocess.run(
        [sys.executable, "-c", _BEGINNING + program, *arguments],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def answers(socket: str, calls: Calls) -> list[str]:
    """`ok` or the code of the refusal, for each call, on one connection."""
    return lines(_ASK, socket, json.dumps(calls))


def answers_of_a_daemon(models: Path, log: Path, dram: str, calls: Calls) -> list[str]:
    """As `answers`, of a daemon whose socket all may use, started for these calls."""
    with tempfile.TemporaryDirectory() as place:  # that of pytest is closed to others
        os.chmod(place, 0o755)
        options = ["--models", str(models), "--dram", dram, "--socket-mode", "0666"]
        daemon = RunningDaemon(f"{place}/s", log, options).wait_ready()
        try:
            return answers(daemon.socket, calls)
        finally:
            daemon.stop()
