"""The threads of each device: when they run, how much they read, how they end."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from dataclasses import replace

import pytest

from tests.daemon.shards import MIB, PAGE, Shards, outcome, small_chunks
from tierd.errors import ReadCancelled, ReadError
from tierd.io import ssd
from tierd.io.ssd import ReaderPool
from tierd.io.ssd_job import ReadResult
from tierd_layouts.records import BLOCK_BYTES


async def test_no_thread_runs_before_the_first_job_and_none_after_close(shards: Shards) -> None:
    def readers() -> int:
        return sum(thread.name.startswith("tierd-ssd-") for thread in threading.enumerate())

    shards.shard(PAGE)
    pool = ReaderPool(3)
    assert readers() == 0
    await outcome(pool, shards.job(shards.extent(0, 0, PAGE)))
    assert readers() == 4  # and one of them verifies
    assert pool.alive()
    pool.close()
    assert readers() == 0
    with pytest.raises(ReadCancelled, match=r"layer 'model\.layers\.3' of pack 'opt'"):
        pool.submit(shards.job(shards.extent(0, 0, PAGE)), print)


async def test_close_answers_every_job_and_leaves_every_target(shards: Shards) -> None:
    """With a limit of 1 byte per second, all but the first block wait when it closes."""
    shards.shard(4 * BLOCK_BYTES)
    pool = ReaderPool(2, bandwidth=1)
    answers: list[ReadResult | ReadError] = []
    for _ in range(3):
        pool.submit(shards.job(shards.extent(0, 0, 4 * BLOCK_BYTES)), answers.append)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 10
    await asyncio.sleep(0)
    assert len(answers) == 3
    for answer in answers:
        assert isinstance(answer, ReadCancelled)
        assert answer.code == "shutting_down"
        assert "layer 'model.layers.3' of pack 'opt' was not read" in str(answer)
    assert pool.statistics().failed == 3


async def test_close_says_when_a_device_does_not_answer(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    entered = threading.Event()
    really = os.preadv

    def hanging(fd: int, targets: list[memoryview], offset: int) -> int:
        entered.set()
        assert released.wait(30)
        return really(fd, targets, offset)

    shards.shard(PAGE)
    pool = ReaderPool(1)
    answers: list[ReadResult | ReadError] = []
    monkeypatch.setattr(os, "preadv", hanging)
    pool.submit(shards.job(shards.extent(0, 0, PAGE)), answers.append)
    assert entered.wait(10)
    busy = pool.statistics().busy_ns
    assert (pool.devices()[0].in_flight, pool.devices()[0].packs) == (1, ("opt",))
    with pytest.raises(TimeoutError, match=r"tierd-ssd-0-\d did not end their reads in 0\.05 s"):
        pool.close(timeout_s=0.05)
    assert pool.statistics().busy_ns >= busy + 40_000_000
    released.set()
    pool.close()
    await asyncio.sleep(0)
    assert len(answers) == 1


async def test_a_failure_waits_until_nobody_writes_into_the_target(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block fails while the second is still being read: the slot is not free yet."""
    released, entered = threading.Event(), threading.Event()
    really = os.preadv

    def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
        if offset == 0:
            assert entered.wait(30)
            raise OSError(errno.EIO, "Input/output error")
        entered.set()
        assert released.wait(30)
        return really(fd, targets, offset)

    shards.shard(2 * BLOCK_BYTES)
    pool = small_chunks(2)
    answers: list[ReadResult | ReadError] = []
    monkeypatch.setattr(os, "preadv", preadv)
    pool.submit(shards.job(shards.extent(0, 0, 2 * BLOCK_BYTES)), answers.append)
    assert entered.wait(10)
    await asyncio.sleep(0.1)
    assert answers == []
    released.set()
    pool.close()
    await asyncio.sleep(0)
    assert len(answers) == 1
    assert "EIO" in str(answers[0])


async def test_the_bandwidth_limit_holds_for_all_readers_together(shards: Shards) -> None:
    """12 MiB at 20 MiB/s: the first 4 MiB pass at once, the rest takes 0.4 s."""
    shards.shard(3 * BLOCK_BYTES)
    pool = ReaderPool(4, bandwidth=20 * MIB)
    began = time.monotonic()
    answer = await outcome(pool, shards.job(shards.extent(0, 0, 3 * BLOCK_BYTES)))
    took = time.monotonic() - began
    pool.close()
    assert isinstance(answer, ReadResult)
    assert 0.4 <= took < 10
    found = pool.statistics()
    assert found.bandwidth_limit == 20 * MIB
    assert found.throttled_ns >= 400_000_000


async def test_a_call_asks_for_a_chunk_at_most_and_a_change_counts_from_the_next_layer(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    really = os.preadv

    def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
        asked.append(targets[0].nbytes)
        return really(fd, targets, offset)

    shards.shard(5 * BLOCK_BYTES)
    monkeypatch.setattr(os, "preadv", preadv)
    pool = ReaderPool(1)
    found = {}
    for chunk in (None, 2 * BLOCK_BYTES, 3 * MIB):
        pool.configure(chunk_bytes=chunk)
        assert isinstance(
            await outcome(pool, shards.job(shards.extent(0, 0, 5 * BLOCK_BYTES))), ReadResult
        )
        found[chunk] = [size // MIB for size in asked]
        asked.clear()
    pool.close()
    assert found == {None: [16, 4], 2 * BLOCK_BYTES: [8, 8, 4], 3 * MIB: [3, 1] * 5}


async def test_readers_come_and_go_while_running(shards: Shards, pool: ReaderPool) -> None:
    def are_readers(number: int) -> bool:
        """Also when that takes a moment."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            names = [thread.name for thread in threading.enumerate()]
            if sum(name.startswith("tierd-ssd-") for name in names) == number:
                return True
            time.sleep(0.01)
        return False

    shards.shard(PAGE)
    for number in (1, 5, 2):
        pool.configure(readers=number)
        assert isinstance(await outcome(pool, shards.job(shards.extent(0, 0, PAGE))), ReadResult)
        assert are_readers(number + 1)  # one verifies
        assert pool.alive()
        assert pool.devices()[0].readers == number
    with pytest.raises(ValueError, match="at least 1 reader, not 0"):
        pool.configure(readers=0)
    with pytest.raises(ValueError, match="whole pages of 4 KiB, not 5000 bytes"):
        pool.configure(chunk_bytes=5000)


async def test_one_device_is_set_without_the_others(shards: Shards, pool: ReaderPool) -> None:
    pool.configure(device=7, readers=2, chunk_bytes=MIB)
    pool.configure(device=8)
    found = {device: (seen.readers, seen.chunk_bytes) for device, seen in pool.devices().items()}
    assert found == {7: (2, MIB), 8: (4, BLOCK_BYTES)}


def wait_for_readers(pool: ReaderPool, device: int, number: int) -> None:
    while pool.devices()[device].in_flight < number:
        time.sleep(0.01)


async def test_a_device_that_does_not_answer_stops_no_other(
    shards: Shards, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More layers than there are readers wait for the silent one."""
    released = threading.Event()
    really = os.preadv

    def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
        if fd == silent:
            assert released.wait(30)
        return really(fd, targets, offset)

    silent = shards.shard(8 * PAGE)
    shards.shard(8 * PAGE)
    monkeypatch.setattr(os, "preadv", preadv)
    answers: list[ReadResult | ReadError] = []
    for number in range(8):
        job = shards.job(shards.extent(0, number * PAGE, PAGE), at=number * PAGE)
        pool.submit(replace(job, pack="hung", device=1), answers.append)
    for number in range(8):
        job = shards.job(shards.extent(1, number * PAGE, PAGE), at=(8 + number) * PAGE)
        assert isinstance(await outcome(pool, replace(job, device=2)), ReadResult)
    assert answers == []
    assert pool.alive()
    async with asyncio.timeout(30):
        await asyncio.to_thread(wait_for_readers, pool, 1, 4)
    found = pool.devices()
    assert (found[1].in_flight, found[1].packs, found[1].reads) == (4, ("hung",), 0)
    assert found[1].waiting_ns > 0
    assert (found[2].in_flight, found[2].reads, found[2].waiting_ns) == (0, 8, 0)
    assert pool.silent() == {}  # not yet worth a word
    monkeypatch.setattr(ssd, "SILENT_NS", 0)
    assert list(pool.silent()) == [1]
    assert pool.silent()[1].startswith("the device of pack 'hung' has not answered for 0 s")
    assert list(pool.silent().values()) == pool.notes()
    released.set()
    pool.close()
    await asyncio.sleep(0)
    assert len(answers) == 8
    assert pool.silent() == {}
