"""The libcufile that is played (`fake_cufile.c`), compiled."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def build(folder: Path) -> Path:
    """The library in `folder`. What one file of it counts is of the whole process that loads it."""
    path = folder / "libcufile.so.0"
    source = Path(__file__).with_name("fake_cufile.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", path, source], check=True)
    return path
