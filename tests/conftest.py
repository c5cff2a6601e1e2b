"""What every test may rely on."""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

# A job in the background of a shell without job control ignores SIGINT, and so would we and every
# process that the tests start. As in a terminal, an interrupt interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton decides when it is first imported whether kernels are interpreted on the CPU or compiled.
if os.environ.get("TIERD_KERNELS_DEVICE") != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")

_native = runpy.run_path(str(Path(__file__).with_name("native_modules.py")))


def pytest_report_header() -> list[str]:
    """Names where the Triton kernels run, and builds of the C++ modules that are not installed."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    where = "interpreted" if interpreted else "on a GPU"
    return [
        f"Triton kernels: {where} (TIERD_KERNELS_DEVICE=cuda for a GPU)",
        *(f"{name}={os.environ[name]}" for name in _native["VARIABLES"] if name in os.environ),
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that did not test the builds of the C++ modules that it was asked to test."""
    strangers = _native["strangers"]()
    if strangers:
        print(f"\nmapped but not asked for, or asked for but not mapped: {', '.join(strangers)}")
        session.exitstatus = 3
