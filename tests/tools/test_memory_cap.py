"""The cap of the demo, on a real memory cgroup where one can be made."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tierd_tools.demo.memory_cap import CapUnavailable, MemoryCap

if TYPE_CHECKING:
    from collections.abc import Iterator

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
