"""compute-sanitizer: how many errors it finds in a program.

Torch keeps memory that was freed, so a kernel that writes past its array would write to that; with
PYTORCH_NO_CUDA_MEMORY_CACHING every array is an allocation of its own, which memcheck knows.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME: Final = "compute-sanitizer"
_SUMMARY: Final = re.compile(r"ERROR SUMMARY: (\d+) error")
_FAULT: Final = re.compile(r"========= ((?:Invalid|Misaligned|Out-of-range|Program hit) .*)")


@dataclass(frozen=True, slots=True)
class Found:
    """errors: of all processes. first: the first of them. status: of the program, None where it was
    ended because its time was over."""

    errors: int
    first: str
    status: int | None
    output: str

    @property
    def watched(self) -> bool:
        """Whether the tool came to its own end, in at least one process."""
        return "ERROR SUMMARY" in self.output


def memcheck(
    tool: Path, command: Sequence[str], seconds: float, environ: Mapping[str, str] | None = None
) -> Found:
    """Runs `python COMMAND` under memcheck, all its processes, for so long at most. environ: in
    addition to our own."""
    with tempfile.TemporaryDirectory(prefix="tierd-memcheck-") as folder:
        said = Path(folder) / "said"
        argv = [
            str(tool), "--tool", "memcheck", "--target-processes", "all", "--print-limit", "5",
            "--log-file", f"{folder}/%p.log", sys.executable, *command,
        ]  # fmt: skip
        caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with said.open("wb") as out:
            process = subprocess.Popen(
                argv, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **(environ or {}), **caching}, start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        logs = [path.read_text(errors="replace") for path in sorted(Path(folder).glob("*.log"))]
        return _read("\n".join([*logs, said.read_text(errors="replace")]), status)


def _read(output: str, status: int | None) -> Found:
    faults = _FAULT.findall(output)
    errors = sum(int(count) for count in _SUMMARY.findall(output))
    return Found(max(errors, len(faults)), faults[0] if faults else "", status, output)
