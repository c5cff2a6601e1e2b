"""What was measured on a card, in a file that many processes add to, and any of them may die."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tierd_kernels.gpu import crossover_file
from tierd_kernels.gpu.crossover_file import CrossoverFile, Table
from tierd_kernels.gpu.plans import VARIANTS, Plan

MINE: Table = {1: {None: 0.5, Plan(16, 4, *VARIANTS[0]): 0.25}}
YOURS: Table = {1: {None: 0.125}, 64: {None: 2.0}}
ADDED = 25

ADDING = f"""
import sys
from pathlib import Path
from tierd_kernels.gpu.crossover_file import CrossoverFile
file, name = CrossoverFile(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range({ADDED}):
    file.add(f"{{name}} {{number}}", {{1: {{None: 1.0 + number}}}})
"""

INSIDE = """
import sys, time
from pathlib import Path
from tierd_kernels.gpu.crossover_file import _alone
with _alone(Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(600)
"""


def started(program: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def wait_for(line: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def test_what_was_added_is_read(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    CrossoverFile(path).add("mine", MINE)
    CrossoverFile(path).add("yours", YOURS)
    assert CrossoverFile(path).read() == {"mine": MINE, "yours": YOURS}
    assert sorted(os.listdir(tmp_path)) == ["card.json", "card.lock"]


def test_of_two_processes_that_add_at_once_no_table_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    processes = [started(ADDING, str(path), name) for name in ("a", "b")]
    for process in processes:
        wait_for("ready", process)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0]
    found = CrossoverFile(path).read()
    assert set(found) == {f"{name} {number}" for name in "ab" for number in range(ADDED)}
    assert found["b 3"] == {1: {None: 4.0}}


def test_a_process_that_is_killed_while_it_adds_keeps_nobody_from_adding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "card.json"
    with started(INSIDE, str(path)) as process:
        try:
            wait_for("inside", process)
            with (tmp_path / "card.lock").open() as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            process.kill()
    CrossoverFile(path).add("mine", MINE)
    assert CrossoverFile(path).read() == {"mine": MINE}
    assert not caplog.records


def test_a_process_that_does_not_go_on_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crossover_file, "LOCK_WAIT_S", 0.05)
    path = tmp_path / "card.json"
    with (tmp_path / "card.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        CrossoverFile(path).add("mine", MINE)
    assert CrossoverFile(path).read() == {"mine": MINE}
    assert f"{path} is written without a lock: " in caplog.text


def test_where_files_cannot_be_locked_they_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    path = tmp_path / "card.json"
    CrossoverFile(path).add("mine", MINE)
    assert CrossoverFile(path).read() == {"mine": MINE}
    assert "without a lock: [Errno 38] Function not implemented" in caplog.text


def test_the_name_of_the_file_says_card_driver_and_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version"
    version.write_text("580.159.03\n")
    monkeypatch.setattr(crossover_file, "_DRIVER_VERSION", version)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 / MIG")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = crossover_file.default_path(torch.device("cuda"))
    assert path is not None
    assert path.parent == tmp_path / "tierd"
    assert path.name.startswith("crossover-NVIDIA-H200-MIG-580.159.03-")
    monkeypatch.setattr(torch, "__version__", "another")
    assert crossover_file.default_path(torch.device("cuda")) != path
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # as the specification says: ignored
    path = crossover_file.default_path(torch.device("cuda"))
    assert path is not None
    assert path.parent == Path.home() / ".cache/tierd"
