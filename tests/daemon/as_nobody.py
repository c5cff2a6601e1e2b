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
import json, os, sys
from tests.daemon.conftest import RawClient, Refused
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
client = RawClient(sys.argv[1])
for op, fields in json.loads(sys.argv[2]):
    try:
        client.call(op, **fields)
        print("ok")
    except Refused as refused:
        print(refused.code)
"""


def answers(
    models: Path, log: Path, dram: str, calls: list[tuple[str, dict[str, Any]]]
) -> list[str]:
    """`ok` or the code of the refusal, for each call, of a daemon whose socket all may use."""
    with tempfile.TemporaryDirectory() as place:  # that of pytest is closed to others
        os.chmod(place, 0o755)
        options = ["--models", str(models), "--dram", dram, "--socket-mode", "0666"]
        daemon = RunningDaemon(f"{place}/s", log, options).wait_ready()
        try:
            done = subprocess.run(
                [sys.executable, "-c", _ASK, daemon.socket, json.dumps(calls)],
                capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
            )  # fmt: skip
        finally:
            daemon.stop()
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
