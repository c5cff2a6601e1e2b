"""A run that was asked to test another build of a C++ module tests that one, or fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tierd_kernels import _cpu

NATIVE = Path(__file__).with_name("native_modules.py")
HERE = f"import runpy; native = runpy.run_path({str(NATIVE)!r})"
WHICH = "from tierd_kernels import _cpu; print(_cpu.__file__, native['strangers']())"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A second build of the module; the variable is not set in a plain run."""
    assert _cpu.__file__ is not None
    return Path(shutil.copy(_cpu.__file__, tmp_path))


def run(program: str, cpu_module: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: text for name, text in os.environ.items() if not name.startswith("TIERD_")}
    environ["TIERD_CPU_MODULE"] = str(cpu_module)
    return subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )


def test_the_build_that_is_asked_for_is_the_one_that_is_imported(other: Path) -> None:
    done = run(f"{HERE}; {WHICH}", other)
    assert done.stdout == f"{other} []\n", done.stderr


def test_a_build_that_is_loaded_already_is_refused(other: Path) -> None:
    done = run(f"import tierd_kernels; {HERE}", other)
    assert done.returncode == 1
    assert f"TIERD_CPU_MODULE asks for {other}" in done.stderr


def test_a_build_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = run(HERE, tmp_path / "_cpu.so")
    assert done.returncode == 1
    assert "ImportError" in done.stderr


def test_a_second_build_beside_it_is_found_among_the_mappings(other: Path, tmp_path: Path) -> None:
    second = Path(shutil.copy(other, tmp_path / "_cpu.second.so"))
    program = f"{HERE}; import ctypes; ctypes.CDLL({str(second)!r}); print(native['strangers']())"
    done = run(program, other)
    assert done.stdout == f"[{str(second)!r}]\n", done.stderr


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["here", "xdist"])
@pytest.mark.parametrize(("variable", "code"), [("TIERD_CPU_MODULE", 3), ("NO_VARIABLE", 0)])
def test_a_run_of_tests_with_the_wrong_build_does_not_pass(
    other: Path, variable: str, code: int, options: tuple[str, ...]
) -> None:
    """A test that maps the installed build behind the other one's back, here or in a process of
    pytest-xdist."""
    test = other.parent / "test_other.py"
    test.write_text(f"import ctypes\ndef test(): ctypes.CDLL({_cpu.__file__!r})\n")
    shutil.copy(NATIVE, test.parent)
    shutil.copy(NATIVE.with_name("conftest.py"), test.parent)
    environ = {name: text for name, text in os.environ.items() if not name.startswith("TIERD_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        [*command, "-c", os.devnull, test],
        env=environ | {variable: str(other)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
