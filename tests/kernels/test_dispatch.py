"""The fastest kernel runs, or the one that was asked for; never another one."""

import os
import subprocess
import sys

import pytest

import tierd_kernels
from tierd_kernels import UnsupportedKernel, cpu, dispatch


def run(kernels: str | None, code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TIERD_KERNELS"}
    if kernels is not None:
        environment["TIERD_KERNELS"] = kernels
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


NAME = "import tierd_kernels; print(tierd_kernels.kernel_name())"


def test_the_fastest_kernel_is_the_default() -> None:
    assert run(None, NAME).stdout.strip() == tierd_kernels.available()[-1]


@pytest.mark.parametrize("name", tierd_kernels.available())
def test_the_environment_forces_a_kernel(name: str) -> None:
    assert run(name, NAME).stdout.strip() == name


@pytest.mark.parametrize("name", ["mmx", "", "AVX512"])
def test_an_unknown_name_fails_loudly_at_the_first_use(name: str) -> None:
    work = (
        "import numpy as np, tierd_kernels\n"
        "from tierd_layouts.packed_matrix import encode_raw\n"
        "zero = np.zeros((0, 0), np.uint16)\n"
        "tierd_kernels.expand(encode_raw(zero, 'BF16'), zero)"
    )
    for code in (NAME, work):
        done = run(name, code)
        assert done.returncode != 0
        assert f"TIERD_KERNELS={name}: unknown; available here: reference, plain" in done.stderr


def test_a_kernel_that_the_processor_lacks_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unsupported_names", lambda: ("avx1024",))
    with pytest.raises(UnsupportedKernel, match="avx1024: this processor cannot run it"):
        dispatch.choose("avx1024")


def test_plain_runs_everywhere() -> None:
    assert tierd_kernels.available()[:2] == ("reference", "plain")


def test_importing_the_kernels_starts_no_thread_and_no_torch() -> None:
    code = (
        "import os, sys, tierd_kernels\n"
        "print(len(os.listdir('/proc/self/task')), 'torch' in sys.modules)"
    )
    one_or_blas = run(None, code).stdout.split()
    plain_numpy = run(None, code.replace("tierd_kernels", "numpy")).stdout.split()
    assert one_or_blas == plain_numpy
