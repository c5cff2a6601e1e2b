"""Kernels compile for every processor, and need no more of it than was recorded.

A few of them: `make gpu-resources` compiles all (minutes), and writes the records.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from tierd_kernels import KernelError
from tierd_kernels.gpu import compiled, nvcc, plans
from tierd_kernels.gpu.compiled import ARCHITECTURES, Kernel
from tierd_kernels.gpu.expand import DEFAULT_WAY, ways

RECORDS: Final = Path(__file__).with_name("resources.json")
PLAN: Final = plans.Plan(plans.TOKEN_BLOCKS[0], 1, *plans.VARIANTS[0])
FEW: Final = (
    *(Kernel("raw", True, "BF16", DEFAULT_WAY, each) for each in ARCHITECTURES),
    *(Kernel(codec, True, "BF16", DEFAULT_WAY, 90) for codec in ("exponent-packed", "int8")),
    Kernel("int4", False, "F16", DEFAULT_WAY, 90),
    *(Kernel("raw", True, "BF16", PLAN, each) for each in ARCHITECTURES),
    Kernel("exponent-packed", True, "BF16", PLAN, 90),
    Kernel("int8", True, "F16", PLAN, 90),
)
CUDA: Final = tuple(
    Kernel(codec, True, "BF16", plans.Plan(plans.TOKEN_BLOCKS[0], 1, *plans.CUDA), each)
    for codec in plans.CUDA_TOKENS
    for each in ARCHITECTURES
)


def recorded() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(RECORDS.read_text())
    return found


def compile_here(*names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process that compiles: this one interprets."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "tierd_kernels.gpu.compiled", *names],
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def test_no_kernel_needs_more_than_is_recorded(tmp_path: Path) -> None:
    """Where it needs less, or has to need more, `make gpu-resources` writes the records anew."""
    expect_no_more(FEW, tmp_path)


@pytest.mark.skipif(not nvcc.found(), reason="no nvcc here: no kernel in CUDA C++ is compiled")
def test_no_kernel_in_cuda_needs_more_than_is_recorded(tmp_path: Path) -> None:
    expect_no_more(CUDA, tmp_path)


def expect_no_more(kernels: tuple[Kernel, ...], cache: Path) -> None:
    names = [kernel.name for kernel in kernels]
    run = compile_here(*names, TRITON_CACHE_DIR=str(cache))
    assert run.returncode == 0, run.stderr
    found: Any = json.loads(run.stdout)
    assert list(found) == names
    records = recorded()
    more = [
        f"{name}: {what} {value}, recorded {records[name][what]}"
        for name in names
        for what, value in found[name].items()
        if value > records[name][what]
    ]
    assert not more


def test_every_kernel_has_a_record() -> None:
    assert list(recorded()) == [kernel.name for kernel in compiled.kernels()]


def test_no_kernel_keeps_registers_in_memory() -> None:
    assert not [name for name, record in recorded().items() if record["spilled_bytes"]]


def test_the_default_way_issues_least() -> None:
    records = recorded()
    for codec, masked in compiled.FORMS:
        if not masked:
            continue
        slots = {
            way: records[Kernel(codec, masked, "BF16", way, 90).name]["issue_slots"]
            for way in ways(codec)
        }
        assert slots[DEFAULT_WAY] == min(slots.values()), (codec, slots)


def test_where_kernels_are_interpreted_nothing_is_compiled(host: Any) -> None:
    with pytest.raises(KernelError, match="TRITON_INTERPRET is set"):
        compiled.resources(next(compiled.kernels()))


def test_a_kernel_that_is_not_known_is_refused() -> None:
    run = compile_here("expand/dense")
    assert run.returncode != 0
    assert "no such kernel: expand/dense" in run.stderr
