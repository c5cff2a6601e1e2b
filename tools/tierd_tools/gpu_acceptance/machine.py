"""What the node is: card, driver, versions. Asks files and programs, imports no CUDA."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = (
    *("torch", "triton", "cupy-cuda13x", "cuda-bindings", "nanobind", "scikit-build-core", "cmake"),
    *("ninja", "msgpack", "uvloop", "aiofiles", "transformers", "accelerate", "numpy", "rich"),
    *("safetensors", "xxhash", "pytest", "pytest-asyncio", "pytest-timeout", "hypothesis"),
)
_QUERY = "name,driver_version,memory.total,uuid,pcie.link.gen.max,pcie.link.width.max"


def describe() -> dict[str, Any]:
    cards = _nvidia_smi()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "driver": cards[0]["driver_version"] if cards else None,
        "card": cards[0]["name"] if cards else None,
        "cards": cards,
        "python": platform.python_version(),
        "linux": platform.release(),
        "processors": os.cpu_count(),
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "packages": {name: _version(name) for name in PACKAGES},
        "revision": _revision(),
    }


def _nvidia_smi() -> list[dict[str, str]]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, f"--query-gpu={_QUERY}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return []
    if done.returncode:
        return []
    keys = _QUERY.split(",")
    return [
        dict(zip(keys, (cell.strip() for cell in line.split(",")), strict=False))
        for line in done.stdout.splitlines()
    ]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Of the source, where this is a checkout and git is there."""
    command = shutil.which("git")
    if command is None:
        return None
    done = subprocess.run(
        [command, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return done.stdout.strip() or None


if __name__ == "__main__":
    import json

    json.dump(describe(), sys.stdout)
