"""No kernel reads or writes outside the arrays that it was given, whatever they hold."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROGRAM = Path(__file__).with_name("guard_pages.py")


def run(what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), what], capture_output=True, text=True)


def test_arrays_between_forbidden_pages_are_never_left(host: torch.device) -> None:
    died = run("expand")
    assert died.returncode == 0, (died.stdout[-300:], died.stderr[-3000:])
    assert died.stdout.endswith("done\n")


def test_an_address_outside_an_array_ends_the_program(host: torch.device) -> None:
    """The test above could not fail otherwise."""
    assert run("touch").returncode == -signal.SIGSEGV
