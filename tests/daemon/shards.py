"""Shards on a real file system, the jobs that read them, and what becomes of these."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import xxhash

from tierd.errors import ReadError
from tierd.io.arena import Arena
from tierd.io.pages import PageKind, Pages
from tierd.io.ssd import ReaderPool
from tierd.io.ssd_job import ExtentRead, ReadJob, ReadResult
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PAGE = 4096
MIB = 1 << 20


class Shards:
    """Shards of random bytes on a real file system, and jobs that read them into an arena."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arena = Arena.create(0, 64 * MIB, "tierd-test", pages=Pages(PageKind.SMALL, "4 KiB"))
        self.fds: list[int] = []
        self.content: list[bytes] = []

    def shard(self, nbytes: int, *, flags: int = os.O_DIRECT, seed: int = 0) -> int:
        """Write a shard; returns its descriptor, open for reading."""
        self.content.append(random.Random(seed + len(self.fds)).randbytes(nbytes))
        path = self.path(len(self.fds))
        path.write_bytes(self.content[-1])
        self.fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags))
        return self.fds[-1]

    def path(self, shard: int) -> Path:
        return self.directory / f"tierd-{shard:05}.safetensors"

    def extent(self, shard: int, offset: int, nbytes: int) -> ExtentRead:
        content = self.content[shard][offset : offset + nbytes]
        hashes = tuple(
            xxhash.xxh3_64_intdigest(content[at : at + BLOCK_BYTES])
            for at in range(0, nbytes, BLOCK_BYTES)
        )
        return ExtentRead(self.fds[shard], self.path(shard).name, offset, nbytes, hashes)

    def job(self, *extents: ExtentRead, at: int = 0, layer: str = "model.layers.3") -> ReadJob:
        nbytes = sum(extent.nbytes for extent in extents)
        return ReadJob("opt", layer, extents, self.arena.buffer(at, nbytes))

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.arena.close()


def small_chunks(readers: int, bandwidth: int | None = None) -> ReaderPool:
    """A pool that reads every block by itself: where a test is about single blocks."""
    pool = ReaderPool(readers, bandwidth)
    pool.configure(chunk_bytes=BLOCK_BYTES)
    return pool


async def outcomes(pool: ReaderPool, jobs: Sequence[ReadJob]) -> list[ReadResult | ReadError]:
    """Submit all; what each was answered, in the order of `jobs`."""
    loop = asyncio.get_running_loop()
    answers: list[asyncio.Future[ReadResult | ReadError]] = []
    for job in jobs:
        answer: asyncio.Future[ReadResult | ReadError] = loop.create_future()
        answers.append(answer)
        pool.submit(job, answer.set_result)
    async with asyncio.timeout(30):
        return list(await asyncio.gather(*answers))


async def outcome(pool: ReaderPool, job: ReadJob) -> ReadResult | ReadError:
    return (await outcomes(pool, [job]))[0]


async def failure(pool: ReaderPool, job: ReadJob) -> ReadError:
    answer = await outcome(pool, job)
    assert isinstance(answer, ReadError)
    return answer
