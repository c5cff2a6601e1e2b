"""Kernels of another processor, where its compiler and an emulator are installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.skipif(
    not all(map(shutil.which, ("aarch64-linux-gnu-g++", "qemu-aarch64"))),
    reason="no aarch64-linux-gnu-g++ or no qemu-aarch64",
)
def test_kernels_for_aarch64_agree_with_the_reference_under_an_emulator() -> None:
    run = subprocess.run(
        [REPOSITORY / "tools" / "cross-check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for kernel in ("plain", "neon"):
        assert re.search(rf"^{kernel}: [0-9]+ cases, .* 0 differ", run.stdout, re.MULTILINE)
