"""What every test may rely on."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

# A job in the background of a shell without job control ignores SIGINT, and so would we and every
# process that the tests start. As in a terminal, an interrupt interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One thread a process unless a test asks for more, and none that spins while it waits for another:
# beside daemons and other processes that costs several times what it gains on small matrices.
# Before torch and numpy are imported, and for every process that the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Tests start hundreds of daemons and clients. Where the environment forbids bytecode, each of them
# would compile all of our modules again, which takes longer than most of the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Triton decides when it is first imported whether kernels are interpreted on the CPU or compiled.
if "TIERD_KERNELS_DEVICE" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")

_native = runpy.run_path(str(Path(__file__).with_name("native_modules.py")))


def pytest_report_header() -> list[str]:
    """Names where the Triton kernels run, and builds of the C++ modules that are not installed."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = os.environ.get("TIERD_KERNELS_DEVICE", "")
    compiled = f"compiled for {device}, PTX executed" if device.startswith("sm_") else "on a GPU"
    where = "interpreted" if interpreted else compiled
    return [
        f"Triton kernels: {where} (TIERD_KERNELS_DEVICE=cuda for a GPU, sm_90 without)",
        *(f"{name}={os.environ[name]}" for name in _native["VARIABLES"] if name in os.environ),
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that did not test the builds of the C++ modules that it was asked to test."""
    strangers = _native["strangers"]()
    if not strangers:
        return
    print(f"\nmapped but not asked for, or asked for but not mapped: {', '.join(strangers)}")
    session.exitstatus = 3
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist: tell the first one
        session.config.workeroutput["strangers"] = strangers


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist ended; the first process has to fail in its place."""
    strangers = getattr(node, "workeroutput", {}).get("strangers")
    if strangers:
        pytest.exit(f"process {node.gateway.id} has other C++ modules: {', '.join(strangers)}", 3)
