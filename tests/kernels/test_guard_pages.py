"""No kernel reads or writes one byte outside its arrays: forbidden pages lie on both sides."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tierd_kernels import cpu

# conftest.py first, so that the program runs the same build of the C++ module as the tests.
PROGRAM = f"""
import runpy
runpy.run_path({str(Path(__file__).with_name("conftest.py"))!r})
runpy.run_path({str(Path(__file__).with_name("guard_pages.py"))!r}, run_name="__main__")
"""


def run(argument: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", [kernel.name for kernel in cpu.supported_kernels()])
def test_no_byte_outside_the_arrays_is_touched(name: str) -> None:
    done = run(name)
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"died at {last} with {done.returncode}: {done.stderr}"
    assert last == ["done"]


def test_one_byte_past_a_guarded_array_kills_the_program() -> None:
    assert run("touch").returncode == -signal.SIGSEGV
