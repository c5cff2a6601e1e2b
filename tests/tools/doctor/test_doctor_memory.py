"""What the doctor says about memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tierd_tools.doctor import memory

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 65534
PROGRAM = """
import dataclasses, json, os, resource
from tierd_tools.doctor import memory
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
os.setgid(%(nobody)d)
os.setuid(%(nobody)d)
print(json.dumps(dataclasses.asdict(memory.locking())))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_user_that_may_not_lock_memory_is_told_the_limit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % {"nobody": NOBODY}], capture_output=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["verdict"] == "does not work"
    assert "RLIMIT_MEMLOCK is 64.0 KiB" in found["text"]
    assert "CAP_IPC_LOCK is not held; mlock of 16.0 MiB failed" in found["text"]
    assert "LimitMEMLOCK=infinity" in found["advice"]
    assert not found["needed"]


def test_a_trial_arena_shows_which_pages_it_really_got() -> None:
    found = memory.pages()
    if found.verdict == "works":
        assert "2 MiB pages" in found.text
    else:
        assert "shmem_enabled" in found.text + found.advice


def test_a_full_cgroup_is_named(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/full"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 1048576 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/full\n")
    (tmp_path / "proc/self/mountinfo").write_text(
        "30 1 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    for name, text in (("max", "1048576"), ("high", "max"), ("current", "1048000"), ("stat", "")):
        (group / f"memory.{name}").write_text(text)
    found = memory.limit(tmp_path)
    assert (found.verdict, found.needed) == ("does not work", True)
    assert "/full" in found.text


def test_a_machine_without_dev_shm_still_has_arenas(tmp_path: Path) -> None:
    found = memory.shared_memory(tmp_path)
    assert found.verdict == "does not work"
    assert not found.needed
    assert "arenas do not need it" in found.text
