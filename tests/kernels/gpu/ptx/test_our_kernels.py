"""Triton's kernels, compiled for cards that are not here, run: the PTX of what is taken by default.

In a process of its own for each processor: where TRITON_INTERPRET is set, as here, nothing is
compiled. `make ptx` runs all of `tests/kernels/gpu` like that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

FOLDER: Final = Path("tests/kernels/gpu")
PRODUCTS: Final = "recorded and BF16 and window-4warps-1stages-16tokens"
MASKED: Final = f"{PRODUCTS} and masked"
EXPANSIONS: Final = "recorded and BF16 and window-4warps/"
RUNS: Final = str(FOLDER / "test_compiled_runs.py")
HOSTILE: Final = (
    "test_expand.py::test_flipped_bits_are_the_faults_that_torch_finds[exponent-packed-masked]",
    "test_expand.py::test_an_escape_out_of_order_is_found_among_hundreds",
    "test_linear.py::test_a_wrong_tile_counts_as_zeros_and_is_named",
)


def run_on(device: str, *arguments: str) -> str:
    """What pytest says of these tests, which all pass."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_")
    }
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        env=inherited | {"TIERD_KERNELS_DEVICE": device},
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize(
    ("device", "which", "passed"),
    [("sm_80", MASKED, 4), ("sm_90", PRODUCTS, 7), ("sm_100", MASKED, 4)],
)
def test_the_product_that_is_taken_by_default_is_the_exact_one(
    device: str, which: str, passed: int
) -> None:
    """Of every codec."""
    said = run_on(device, RUNS, "-k", which)
    assert said.splitlines()[-1].startswith(f"{passed} passed"), said


def test_the_expansion_that_is_taken_by_default_is_the_reference_s() -> None:
    """Its PTX is the same for all processors, but for the name of one of them."""
    said = run_on("sm_90", RUNS, "-k", EXPANSIONS)
    assert said.splitlines()[-1].startswith("7 passed"), said


def test_wrong_contents_are_the_faults_of_the_reference() -> None:
    run_on("sm_90", *(str(FOLDER / name) for name in HOSTILE))


def test_broken_kernels_are_found() -> None:
    said = run_on("sm_90", RUNS, "-k", "not recorded")
    assert "skipped" not in said
