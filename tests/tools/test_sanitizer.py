"""compute-sanitizer is run over a program with all its processes, and believed only when it finds
what is wrong: with a tool that is played."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tierd_tools import cuda_tools, sanitizer
from tierd_tools.bench import gpu_sanitizer
from tierd_tools.gpu_ground import Ground

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
TOOL = """#!{python}
import os, subprocess, sys
log = sys.argv[sys.argv.index("--log-file") + 1].replace("%p", str(os.getpid()))
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
at = sys.argv.index({python!r})
status = subprocess.run(sys.argv[at:]).returncode
errors = {errors}
with open(log, "w") as file:
    if errors:
        print("========= Invalid __global__ write of size 4 bytes", file=file)
    print(f"========= ERROR SUMMARY: {{errors}} errors", file=file)
sys.exit(status)
"""
WRONG = "('wrong' in sys.argv[-1])"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """tool(errors): one on PATH that finds so many, an expression, in whatever it watches."""
    monkeypatch.setattr(gpu_sanitizer, "ground", lambda: Ground("cuda_vmm", None))

    def make(errors: str) -> Path:
        path = tmp_path / "bin" / sanitizer.NAME
        path.parent.mkdir()
        path.write_text(TOOL.format(python=sys.executable, errors=errors))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
        return path

    return make


def program(text: str) -> list[str]:
    return ["-c", text]


def test_errors_are_summed_and_the_first_is_kept(tool: Callable[[str], Path]) -> None:
    found = sanitizer.memcheck(tool("3"), program("print('said')"), 30)
    assert (found.errors, found.status) == (3, 0)
    assert found.first == "Invalid __global__ write of size 4 bytes"
    assert "said" in found.output


def test_a_program_that_hangs_is_ended_with_its_tool(tool: Callable[[str], Path]) -> None:
    found = sanitizer.memcheck(tool("0"), program("import time; time.sleep(60)"), 1.0)
    assert found.status is None
    assert not found.watched


def test_a_tool_that_finds_the_planted_error_and_no_other_meets_the_promise(
    tool: Callable[[str], Path],
) -> None:
    tool(f"7 * {WRONG}")
    tests = "import os; assert os.environ['TIERD_KERNELS_DEVICE'] == 'cuda'"
    (row,) = gpu_sanitizer.run(program("'wrong'"), program(tests))
    assert (row.ours, row.theirs, row.met) == (0, 7, True)


def test_errors_in_the_tests_break_the_promise(tool: Callable[[str], Path]) -> None:
    tool("2")
    (row,) = gpu_sanitizer.run(program("'wrong'"), program("exit(1)"))
    assert (row.ours, row.met) == (2, False)
    assert "Invalid __global__ write" in row.row


def test_a_tool_that_does_not_find_the_planted_error_proves_nothing(
    tool: Callable[[str], Path],
) -> None:
    tool("0")
    (row,) = gpu_sanitizer.run(program("print('Device not supported')"), program("pass"))
    assert row.met is None
    assert "finds no planted error here" in str(row.not_applicable)


@pytest.mark.parametrize(
    ("tests", "reason"),
    [("exit(5)", "the tests ended with 5"), ("import time; time.sleep(60)", "did not end within")],
)
def test_tests_that_did_not_pass_under_it_prove_nothing(
    tests: str, reason: str, tool: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(f"7 * {WRONG}")
    monkeypatch.setenv("TIERD_PART_SECONDS", "5")
    (row,) = gpu_sanitizer.run(program("'wrong'"), program(tests))
    assert row.met is None
    assert reason in str(row.not_applicable)


def test_a_node_without_it_says_where_it_was_looked_for(
    tool: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_tools, "find", lambda name: None)
    (row,) = gpu_sanitizer.run()
    assert "no compute-sanitizer on PATH, in CUDA_HOME" in str(row.not_applicable)


def test_the_tests_that_it_watches_are_found_where_there_is_no_gpu() -> None:
    """All of them skip: the command is right."""
    environ = {**os.environ, **gpu_sanitizer.ENVIRON}
    environ.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *gpu_sanitizer.TESTS, "--collect-only"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_expand.py" in done.stdout
