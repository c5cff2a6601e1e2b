"""What followers of a read are told, by readers with real threads and real files."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from tests.daemon.shards import PAGE, Shards, outcome, small_chunks
from tierd.errors import ChecksumMismatch, ReadCancelled, ReadError
from tierd.io.ssd import ReaderPool
from tierd.io.ssd_job import ReadResult
from tierd.io.verified import VerifiedBlocks
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE_S = 20.0


class Follower:
    """Writes down what it is told. `target`: where the bytes are looked at when they are told."""

    def __init__(self, target: memoryview | None = None) -> None:
        self.blocks: list[tuple[int, int]] = []
        self.content: dict[int, bytes] = {}
        self.ends: list[ReadError | None] = []
        self.threads: set[str] = set()
        self.target = target
        self._told = threading.Condition()

    def verified(self, start: int, nbytes: int) -> None:
        assert not self.ends, "nothing is told after the end"
        if self.target is not None:
            self.content[start] = bytes(self.target[start : start + nbytes])
        self.threads.add(threading.current_thread().name)
        with self._told:
            self.blocks.append((start, nbytes))
            self._told.notify_all()

    def read_ended(self, failure: ReadError | None) -> None:
        with self._told:
            self.ends.append(failure)
            self._told.notify_all()

    def wait_blocks(self, count: int) -> None:
        with self._told:
            assert self._told.wait_for(lambda: len(self.blocks) >= count, PATIENCE_S)


@pytest.fixture(params=["one block", "four blocks"])
def pool(request: pytest.FixtureRequest) -> Iterator[ReaderPool]:
    """Readers whose chunks have so many blocks."""
    made = small_chunks(3)
    made.configure(chunk_bytes={"one block": 1, "four blocks": 4}[request.param] * BLOCK_BYTES)
    yield made
    made.close()


async def test_every_block_is_told_once_by_the_readers_when_its_bytes_are_there(
    shards: Shards, pool: ReaderPool
) -> None:
    shards.shard(6 * BLOCK_BYTES)
    shards.shard(BLOCK_BYTES)
    job = shards.job(
        shards.extent(0, PAGE, 4 * BLOCK_BYTES + PAGE), shards.extent(1, 0, 2 * PAGE), at=PAGE
    )
    wanted = shards.content[0][PAGE : PAGE + 4 * BLOCK_BYTES + PAGE] + shards.content[1][: 2 * PAGE]
    follower = Follower(shards.arena.buffer(PAGE, len(wanted)))
    job.verified.follow(follower)
    assert isinstance(await outcome(pool, job), ReadResult)
    pool.close()
    assert sorted(follower.blocks) == [
        *((number * BLOCK_BYTES, BLOCK_BYTES) for number in range(4)),
        (4 * BLOCK_BYTES, PAGE),
        (4 * BLOCK_BYTES + PAGE, 2 * PAGE),
    ]
    for start, nbytes in follower.blocks:
        assert follower.content[start] == wanted[start : start + nbytes]
    assert follower.ends == [None]
    assert all(name.startswith("tierd-ssd-") for name in follower.threads), "no loop in between"
    follower.target = None


async def test_who_follows_later_hears_at_once_of_what_was_verified_before(
    shards: Shards, pool: ReaderPool
) -> None:
    shards.shard(3 * BLOCK_BYTES)
    job = shards.job(shards.extent(0, 0, 3 * BLOCK_BYTES))
    early, late = Follower(), Follower()
    job.verified.follow(early)
    await outcome(pool, job)
    pool.close()
    job.verified.follow(late)
    assert sorted(late.blocks) == sorted(early.blocks) == [
        (number * BLOCK_BYTES, BLOCK_BYTES) for number in range(3)
    ]  # fmt: skip
    assert late.ends == early.ends == [None]


async def test_the_end_is_told_after_the_outcome_is_on_its_way_to_the_loop(
    shards: Shards, pool: ReaderPool
) -> None:
    """So whatever a follower sends to the loop because of it comes after the outcome."""
    order: list[str] = []
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[None] = loop.create_future()

    class Sends(Follower):
        def read_ended(self, failure: ReadError | None) -> None:
            loop.call_soon_threadsafe(order.append, "follower")
            loop.call_soon_threadsafe(answered.set_result, None)

    shards.shard(2 * BLOCK_BYTES)
    job = shards.job(shards.extent(0, 0, 2 * BLOCK_BYTES))
    job.verified.follow(Sends())
    pool.submit(job, lambda _: order.append("outcome"))
    await asyncio.wait_for(answered, PATIENCE_S)
    assert order == ["outcome", "follower"]


async def test_a_corrupt_last_block_is_never_told_and_ends_the_read_with_its_failure(
    shards: Shards, pool: ReaderPool
) -> None:
    shards.shard(3 * BLOCK_BYTES)
    job = shards.job(shards.extent(0, 0, 3 * BLOCK_BYTES))
    with shards.path(0).open("r+b") as file:
        file.seek(3 * BLOCK_BYTES - 1)
        file.write(bytes([shards.content[0][-1] ^ 1]))
    follower = Follower()
    job.verified.follow(follower)
    answer = await outcome(pool, job)
    pool.close()
    assert isinstance(answer, ChecksumMismatch)
    assert follower.ends == [answer]
    assert (2 * BLOCK_BYTES, BLOCK_BYTES) not in follower.blocks


async def test_readers_that_are_closed_end_what_was_followed(shards: Shards) -> None:
    shards.shard(4 * BLOCK_BYTES)
    pool = ReaderPool(2, bandwidth=1)  # the first block passes, the others wait
    job = shards.job(shards.extent(0, 0, 4 * BLOCK_BYTES))
    follower = Follower()
    job.verified.follow(follower)
    pool.submit(job, lambda _: None)
    await asyncio.to_thread(follower.wait_blocks, 1)
    pool.close()
    assert len(follower.blocks) == 1
    assert [type(end) for end in follower.ends] == [ReadCancelled]


@pytest.mark.parametrize("round_", range(5))
def test_a_follower_that_comes_at_any_moment_hears_of_each_block_once(round_: int) -> None:
    verified, count = VerifiedBlocks(), 400
    followers = [Follower() for _ in range(20)]

    def read() -> None:
        for number in range(count):
            verified.announce(number, 1)
        verified.end(None)

    reader = threading.Thread(target=read)
    reader.start()
    for follower in followers:
        verified.follow(follower)
    reader.join(PATIENCE_S)
    for follower in followers:
        assert follower.blocks == [(number, 1) for number in range(count)]
        assert follower.ends == [None]
