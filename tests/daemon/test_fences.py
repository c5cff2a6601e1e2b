"""When the slots of a client that is gone may be used again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tierd import fences as fences_module
from tierd.fences import GRACE_SECONDS, Fences

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


async def fenced_after(begin_s: float, ended: list[int]) -> float:
    while not ended:
        await asyncio.sleep(0.005)
        assert time.monotonic() - begin_s < 10
    return time.monotonic() - begin_s


async def test_a_connection_whose_process_lives_on_is_fenced_after_the_grace(
    child: subprocess.Popen[bytes],
) -> None:
    ended: list[int] = []
    fences = Fences(asyncio.get_running_loop(), ended.append)
    begin_s = time.monotonic()
    fences.begin(7, child.pid, os.pidfd_open(child.pid))
    assert len(fences) == 1
    assert await fenced_after(begin_s, ended) >= GRACE_SECONDS * 0.9
    assert (ended, len(fences)) == ([7], 0)


async def test_a_process_that_is_dead_is_fenced_after_the_grace(
    child: subprocess.Popen[bytes],
) -> None:
    ended: list[int] = []
    fences = Fences(asyncio.get_running_loop(), ended.append)
    pidfd = os.pidfd_open(child.pid)
    child.kill()
    child.wait()
    begin_s = time.monotonic()
    fences.begin(7, child.pid, pidfd)
    assert await fenced_after(begin_s, ended) >= GRACE_SECONDS * 0.9
    assert (ended, len(fences)) == ([7], 0)


async def test_the_grace_begins_again_when_the_process_dies_meanwhile(
    child: subprocess.Popen[bytes],
) -> None:
    ended: list[int] = []
    fences = Fences(asyncio.get_running_loop(), ended.append)
    fences.begin(7, child.pid, os.pidfd_open(child.pid))
    await asyncio.sleep(GRACE_SECONDS / 2)
    child.kill()
    child.wait()
    died_s = time.monotonic()
    assert await fenced_after(died_s, ended) >= GRACE_SECONDS * 0.9


async def test_a_process_that_is_exiting_is_awaited_until_it_died(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver may take long to tear a context down: the socket is closed before that."""
    monkeypatch.setattr(fences_module, "is_exiting", lambda pid: True)
    ended: list[int] = []
    fences = Fences(asyncio.get_running_loop(), ended.append)
    fences.begin(7, child.pid, os.pidfd_open(child.pid))
    await asyncio.sleep(4 * GRACE_SECONDS)
    assert ended == []
    child.send_signal(signal.SIGKILL)
    begin_s = time.monotonic()
    assert await fenced_after(begin_s, ended) >= GRACE_SECONDS * 0.9


async def test_nobody_is_fenced_after_the_end_and_no_descriptor_is_left(
    child: subprocess.Popen[bytes],
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    ended: list[int] = []
    fences = Fences(asyncio.get_running_loop(), ended.append)
    for client in range(3):
        fences.begin(client, child.pid, os.pidfd_open(child.pid))
    fences.close()
    await asyncio.sleep(2 * GRACE_SECONDS)
    assert ended == []
    assert set(os.listdir("/proc/self/fd")) == before
