"""The cap of the demo, on a real memory cgroup where one can be made."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tierd_tools.demo import memory_cap
from tierd_tools.demo.memory_cap import CapUnavailable, MemoryCap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def cap() -> Iterator[MemoryCap]:
    try:
        group = MemoryCap("tierd-test", 128 * MIB)
    except CapUnavailable as reason:
        pytest.skip(f"no memory cgroup can be made: {reason}")
    with group:
        yield group


def _touch(mib: int) -> list[str]:
    touch = "b[::4096] = b'x' * len(b[::4096])"
    code = f"import time; b = bytearray({mib} << 20); {touch}; time.sleep(.3)"
    return [sys.executable, "-c", code]


def test_what_a_process_touches_is_seen_at_its_peak(cap: MemoryCap) -> None:
    subprocess.run(cap.command(_touch(64)), check=True)
    assert 64 * MIB <= cap.peak().memory_bytes <= 128 * MIB


def test_a_process_above_the_cap_is_killed(cap: MemoryCap) -> None:
    done = subprocess.run(cap.command(_touch(256)), check=False)
    assert done.returncode == -9


def test_a_group_that_takes_no_limit_is_removed_and_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    monkeypatch.setattr(memory_cap, "CGROUP_ROOT", tmp_path)

    def refuse(folder: Path, version: int, limit_bytes: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(memory_cap, "_limit", refuse)
    with pytest.raises(CapUnavailable, match="takes no limit"):
        MemoryCap("tierd-test", MIB)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_kernel_that_does_not_account_swap_takes_a_limit(
    tmp_path: Path,
) -> None:
    memory_cap._limit(tmp_path, 2, 5 * MIB)
    assert (tmp_path / "memory.max").read_text() == str(5 * MIB)
    assert not (tmp_path / "memory.swap.max").exists()
