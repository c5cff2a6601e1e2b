from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash

from tierd.errors import ChecksumMismatch, ReadCancelled, ReadError
from tierd.io import ssd, ssd_lane
from tierd.io.arena import Arena
from tierd.io.pages import PageKind, Pages
from tierd.io.ssd import ReaderPool
from tierd.io.ssd_job import ExtentRead, ReadJob, ReadResult
from tierd_layouts.records import BLOCK_BYTES, Extent, Layer, Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PAGE = 4096
MIB = 1 << 20


class Pack:
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


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Pack]:
    made = Pack(tmp_path)
    yield made
    made.close()  # a target that something still holds would be a BufferError here


def small_chunks(readers: int, bandwidth: int | None = None) -> ReaderPool:
    """A pool that reads every block by itself: where a test is about single blocks."""
    pool = ReaderPool(readers, bandwidth)
    pool.configure(chunk_bytes=BLOCK_BYTES)
    return pool


@pytest.fixture
def pool() -> Iterator[ReaderPool]:
    made = small_chunks(4)
    yield made
    made.close()


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


@pytest.mark.parametrize("chunk", [48 * PAGE, BLOCK_BYTES, 4 * BLOCK_BYTES])
@pytest.mark.parametrize(
    "nbytes", [PAGE, BLOCK_BYTES, BLOCK_BYTES + PAGE, 3 * BLOCK_BYTES - PAGE, 5 * BLOCK_BYTES]
)
async def test_a_layer_arrives_whole_in_chunks_of_any_size(
    pack: Pack, pool: ReaderPool, nbytes: int, chunk: int
) -> None:
    pack.shard(nbytes + 3 * PAGE)
    pool.configure(chunk_bytes=chunk)
    answer = await outcome(pool, pack.job(pack.extent(0, 2 * PAGE, nbytes)))
    assert isinstance(answer, ReadResult)
    assert answer.nbytes == nbytes
    assert answer.duration_ns > 0
    assert bytes(pack.arena.buffer(0, nbytes)) == pack.content[0][2 * PAGE : 2 * PAGE + nbytes]
    assert pack.arena.buffer(nbytes, 1)[0] == 0  # and nothing behind it
    found = pool.statistics()
    assert (found.read_bytes, found.reads, found.failed) == (nbytes, 1, 0)
    assert found.busy_ns > 0
    assert found.direct
    assert pool.notes() == []


async def test_extents_of_several_shards_follow_each_other(pack: Pack, pool: ReaderPool) -> None:
    pack.shard(2 * BLOCK_BYTES)
    pack.shard(BLOCK_BYTES + PAGE)
    parts = (
        pack.extent(1, 0, BLOCK_BYTES + PAGE),
        pack.extent(0, PAGE, PAGE),
        pack.extent(0, BLOCK_BYTES, BLOCK_BYTES),
    )
    await outcome(pool, pack.job(*parts, at=MIB))
    wanted = b"".join(
        pack.content[pack.fds.index(part.fd)][part.offset : part.offset + part.nbytes]
        for part in parts
    )
    assert bytes(pack.arena.buffer(MIB, len(wanted))) == wanted


async def test_a_job_is_made_of_the_layer_of_an_index(pack: Pack, pool: ReaderPool) -> None:
    pack.shard(PAGE)
    pack.shard(3 * PAGE)
    part = pack.extent(1, PAGE, 2 * PAGE)
    layer = Layer("head", 2 * PAGE, (Extent(1, PAGE, 2 * PAGE, part.xxh3),), ())
    shards = [Shard(pack.path(n).name, len(pack.content[n])) for n in (0, 1)]
    job = ReadJob.of_layer("opt", layer, shards, pack.fds, pack.arena.buffer(0, 2 * PAGE))
    assert job.extents == (part,)
    assert isinstance(await outcome(pool, job), ReadResult)


async def test_many_layers_at_once_do_not_mix(pack: Pack, pool: ReaderPool) -> None:
    count, nbytes = 24, BLOCK_BYTES // 4 + PAGE
    pack.shard(count * nbytes)
    jobs = [pack.job(pack.extent(0, at, nbytes), at=at) for at in range(0, count * nbytes, nbytes)]
    assert all(isinstance(answer, ReadResult) for answer in await outcomes(pool, jobs))
    assert bytes(pack.arena.buffer(0, count * nbytes)) == pack.content[0]
    assert pool.statistics().reads == count


async def test_no_thread_runs_before_the_first_job_and_none_after_close(pack: Pack) -> None:
    def readers() -> int:
        return sum(thread.name.startswith("tierd-ssd-") for thread in threading.enumerate())

    pack.shard(PAGE)
    pool = ReaderPool(3)
    assert readers() == 0
    await outcome(pool, pack.job(pack.extent(0, 0, PAGE)))
    assert readers() == 4  # and one of them verifies
    assert pool.alive()
    pool.close()
    assert readers() == 0
    with pytest.raises(ReadCancelled, match=r"layer 'model\.layers\.3' of pack 'opt'"):
        pool.submit(pack.job(pack.extent(0, 0, PAGE)), print)


async def test_a_flipped_bit_is_never_served(pack: Pack, pool: ReaderPool) -> None:
    pack.shard(3 * BLOCK_BYTES)
    good = pack.extent(0, 0, 3 * BLOCK_BYTES)
    with pack.path(0).open("r+b") as file:
        file.seek(BLOCK_BYTES + 1234)
        file.write(bytes([pack.content[0][BLOCK_BYTES + 1234] ^ 0x10]))
    error = await failure(pool, pack.job(good))
    assert isinstance(error, ChecksumMismatch)
    assert error.code == "checksum_mismatch"
    text = str(error)
    assert "pack 'opt', layer 'model.layers.3': tierd-00000.safetensors is corrupt" in text
    assert f"block 1 of 3 ({BLOCK_BYTES} bytes at offset {BLOCK_BYTES})" in text
    found = xxhash.xxh3_64_hexdigest(pack.path(0).read_bytes()[BLOCK_BYTES : 2 * BLOCK_BYTES])
    assert f"has xxh3 {found}, expected {good.xxh3[1]:016x}" in text
    assert (pool.statistics().reads, pool.statistics().failed) == (0, 1)


@pytest.mark.parametrize("direct", [os.O_DIRECT, 0])
@pytest.mark.parametrize(
    "left", [0, 1, 511, 512, PAGE, 3 * PAGE + 7, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 100]
)
async def test_a_shard_that_was_cut_off_is_named_with_what_is_missing(
    pack: Pack, pool: ReaderPool, left: int, direct: int
) -> None:
    pack.shard(PAGE + 2 * BLOCK_BYTES, flags=direct)
    job = pack.job(pack.extent(0, PAGE, 2 * BLOCK_BYTES))
    os.truncate(pack.path(0), PAGE + left)
    error = await failure(pool, job)
    assert error.code == "read_failed"
    text = str(error)
    assert "pack 'opt', layer 'model.layers.3': tierd-00000.safetensors ends early" in text
    start = 0 if left < BLOCK_BYTES else BLOCK_BYTES
    second = f"expected {BLOCK_BYTES} bytes at offset {PAGE + BLOCK_BYTES}, got 0"
    exact = f"expected {BLOCK_BYTES} bytes at offset {PAGE + start}, got {left - start}"
    assert exact in text or (start == 0 and second in text)  # whichever block failed first


async def test_an_error_of_the_device_is_named(
    pack: Pack, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO cannot be had from an ordinary file; only the call itself is replaced."""

    def broken(fd: int, targets: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    pack.shard(2 * PAGE)
    monkeypatch.setattr(os, "preadv", broken)
    error = await failure(pool, pack.job(pack.extent(0, PAGE, PAGE)))
    assert error.code == "read_failed"
    assert str(error) == (
        "pack 'opt', layer 'model.layers.3': tierd-00000.safetensors cannot be read: "
        f"EIO (Input/output error), {PAGE} bytes at offset {PAGE}"
    )


async def test_a_closed_descriptor_is_an_error_and_not_the_end(
    pack: Pack, pool: ReaderPool
) -> None:
    pack.shard(PAGE)
    good = pack.extent(0, 0, PAGE)
    bad = replace(good, fd=os.open(os.devnull, os.O_RDONLY))
    os.close(bad.fd)
    error = await failure(pool, pack.job(bad))
    assert "EBADF" in str(error)
    assert isinstance(await outcome(pool, pack.job(good)), ReadResult)
    assert pool.alive()


async def test_a_defect_in_a_reader_fails_its_layer_only(
    pack: Pack, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pack.shard(PAGE)
    job = pack.job(pack.extent(0, 0, PAGE))
    with monkeypatch.context() as patch:
        patch.setattr(ssd_lane, "verify_chunk", lambda *_: 1 // 0)
        error = await failure(pool, job)
    assert "ZeroDivisionError" in str(error)
    assert "Traceback" in caplog.text
    assert isinstance(await outcome(pool, pack.job(pack.extent(0, 0, PAGE))), ReadResult)


def refusing_direct(fds: list[int]) -> Callable[[int, list[memoryview], int], int]:
    """preadv of a file system that opens with O_DIRECT and refuses to read with it."""
    really = os.preadv

    def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
        fds.append(fd)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(fd, targets, offset)

    return preadv


async def test_a_file_that_refuses_direct_reads_is_read_otherwise_and_that_is_reported(
    pack: Pack,
    pool: ReaderPool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pack.shard(2 * BLOCK_BYTES)
    pack.shard(PAGE)
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refusing_direct(calls))
        job = pack.job(pack.extent(0, 0, 2 * BLOCK_BYTES))
        assert isinstance(await outcome(pool, job), ReadResult)
    assert bytes(pack.arena.buffer(0, 2 * BLOCK_BYTES)) == pack.content[0]
    assert not pool.statistics().direct
    assert pool.notes() == [
        "opt/tierd-00000.safetensors is read through the page cache: "
        "its file system refuses O_DIRECT"
    ]
    assert "refuses O_DIRECT" in caplog.text
    assert not fcntl.fcntl(pack.fds[0], fcntl.F_GETFL) & os.O_DIRECT  # tried once, not each time


async def test_buffered_reads_leave_nothing_in_the_page_cache(
    pack: Pack, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack.shard(BLOCK_BYTES + PAGE, flags=0)
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, nbytes, kind: advised.append((offset, nbytes, kind))
    )
    await outcome(pool, pack.job(pack.extent(0, 0, BLOCK_BYTES + PAGE)))
    assert sorted(advised) == [
        (0, BLOCK_BYTES, os.POSIX_FADV_DONTNEED),
        (BLOCK_BYTES, PAGE, os.POSIX_FADV_DONTNEED),
    ]


async def test_reads_that_the_system_answers_in_pieces_are_put_together(
    pack: Pack, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.preadv
    rng = random.Random(5)

    def in_pieces(fd: int, targets: list[memoryview], offset: int) -> int:
        assert offset % PAGE == 0  # a direct read may not go on anywhere else
        most = rng.randrange(PAGE, 40 * PAGE, 512)
        return min(most, really(fd, targets, offset))

    pack.shard(BLOCK_BYTES)
    monkeypatch.setattr(os, "preadv", in_pieces)
    assert isinstance(await outcome(pool, pack.job(pack.extent(0, 0, BLOCK_BYTES))), ReadResult)


async def test_close_answers_every_job_and_leaves_every_target(pack: Pack) -> None:
    """With a limit of 1 byte per second, all but the first block wait when it closes."""
    pack.shard(4 * BLOCK_BYTES)
    pool = ReaderPool(2, bandwidth=1)
    answers: list[ReadResult | ReadError] = []
    for _ in range(3):
        pool.submit(pack.job(pack.extent(0, 0, 4 * BLOCK_BYTES)), answers.append)
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
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    entered = threading.Event()
    really = os.preadv

    def hanging(fd: int, targets: list[memoryview], offset: int) -> int:
        entered.set()
        assert released.wait(30)
        return really(fd, targets, offset)

    pack.shard(PAGE)
    pool = ReaderPool(1)
    answers: list[ReadResult | ReadError] = []
    monkeypatch.setattr(os, "preadv", hanging)
    pool.submit(pack.job(pack.extent(0, 0, PAGE)), answers.append)
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
    pack: Pack, monkeypatch: pytest.MonkeyPatch
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

    pack.shard(2 * BLOCK_BYTES)
    pool = small_chunks(2)
    answers: list[ReadResult | ReadError] = []
    monkeypatch.setattr(os, "preadv", preadv)
    pool.submit(pack.job(pack.extent(0, 0, 2 * BLOCK_BYTES)), answers.append)
    assert entered.wait(10)
    await asyncio.sleep(0.1)
    assert answers == []
    released.set()
    pool.close()
    await asyncio.sleep(0)
    assert len(answers) == 1
    assert "EIO" in str(answers[0])


async def test_the_bandwidth_limit_holds_for_all_readers_together(pack: Pack) -> None:
    """12 MiB at 20 MiB/s: the first 4 MiB pass at once, the rest takes 0.4 s."""
    pack.shard(3 * BLOCK_BYTES)
    pool = ReaderPool(4, bandwidth=20 * MIB)
    began = time.monotonic()
    answer = await outcome(pool, pack.job(pack.extent(0, 0, 3 * BLOCK_BYTES)))
    took = time.monotonic() - began
    pool.close()
    assert isinstance(answer, ReadResult)
    assert 0.4 <= took < 10
    found = pool.statistics()
    assert found.bandwidth_limit == 20 * MIB
    assert found.throttled_ns >= 400_000_000


async def test_a_call_asks_for_a_chunk_at_most_and_a_change_counts_from_the_next_layer(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    really = os.preadv

    def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
        asked.append(targets[0].nbytes)
        return really(fd, targets, offset)

    pack.shard(5 * BLOCK_BYTES)
    monkeypatch.setattr(os, "preadv", preadv)
    pool = ReaderPool(1)
    found = {}
    for chunk in (None, 2 * BLOCK_BYTES, 3 * MIB):
        pool.configure(chunk_bytes=chunk)
        assert isinstance(
            await outcome(pool, pack.job(pack.extent(0, 0, 5 * BLOCK_BYTES))), ReadResult
        )
        found[chunk] = [size // MIB for size in asked]
        asked.clear()
    pool.close()
    assert found == {None: [16, 4], 2 * BLOCK_BYTES: [8, 8, 4], 3 * MIB: [3, 1] * 5}


async def test_a_large_chunk_names_the_block_that_is_corrupt(pack: Pack) -> None:
    pack.shard(4 * BLOCK_BYTES)
    good = pack.extent(0, 0, 4 * BLOCK_BYTES)
    with pack.path(0).open("r+b") as file:
        file.seek(2 * BLOCK_BYTES)
        file.write(bytes([pack.content[0][2 * BLOCK_BYTES] ^ 1]))
    pool = ReaderPool(2)
    error = await failure(pool, pack.job(good))
    pool.close()
    assert f"block 2 of 4 ({BLOCK_BYTES} bytes at offset {2 * BLOCK_BYTES})" in str(error)


async def test_a_large_chunk_of_a_shard_that_was_cut_off_says_how_much_came(pack: Pack) -> None:
    pack.shard(4 * BLOCK_BYTES)
    job = pack.job(pack.extent(0, 0, 4 * BLOCK_BYTES))
    os.truncate(pack.path(0), 3 * BLOCK_BYTES + 512)
    pool = ReaderPool(2)
    error = await failure(pool, job)
    pool.close()
    expected = f"expected {4 * BLOCK_BYTES} bytes at offset 0, got {3 * BLOCK_BYTES + 512}"
    assert expected in str(error)


async def test_readers_come_and_go_while_running(pack: Pack, pool: ReaderPool) -> None:
    def are_readers(number: int) -> bool:
        """Also when that takes a moment."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            names = [thread.name for thread in threading.enumerate()]
            if sum(name.startswith("tierd-ssd-") for name in names) == number:
                return True
            time.sleep(0.01)
        return False

    pack.shard(PAGE)
    for number in (1, 5, 2):
        pool.configure(readers=number)
        assert isinstance(await outcome(pool, pack.job(pack.extent(0, 0, PAGE))), ReadResult)
        assert are_readers(number + 1)  # one verifies
        assert pool.alive()
        assert pool.devices()[0].readers == number
    with pytest.raises(ValueError, match="at least 1 reader, not 0"):
        pool.configure(readers=0)
    with pytest.raises(ValueError, match="whole pages of 4 KiB, not 5000 bytes"):
        pool.configure(chunk_bytes=5000)


async def test_one_device_is_set_without_the_others(pack: Pack, pool: ReaderPool) -> None:
    pool.configure(device=7, readers=2, chunk_bytes=MIB)
    pool.configure(device=8)
    found = {device: (seen.readers, seen.chunk_bytes) for device, seen in pool.devices().items()}
    assert found == {7: (2, MIB), 8: (4, BLOCK_BYTES)}


def wait_for_readers(pool: ReaderPool, device: int, number: int) -> None:
    while pool.devices()[device].in_flight < number:
        time.sleep(0.01)


async def test_a_device_that_does_not_answer_stops_no_other(
    pack: Pack, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More layers than there are readers wait for the silent one."""
    released = threading.Event()
    really = os.preadv

    def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
        if fd == silent:
            assert released.wait(30)
        return really(fd, targets, offset)

    silent = pack.shard(8 * PAGE)
    pack.shard(8 * PAGE)
    monkeypatch.setattr(os, "preadv", preadv)
    answers: list[ReadResult | ReadError] = []
    for number in range(8):
        job = pack.job(pack.extent(0, number * PAGE, PAGE), at=number * PAGE)
        pool.submit(replace(job, pack="hung", device=1), answers.append)
    for number in range(8):
        job = pack.job(pack.extent(1, number * PAGE, PAGE), at=(8 + number) * PAGE)
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


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs to write to")
    with tempfile.TemporaryDirectory(prefix="tierd-test-", dir="/dev/shm") as directory:
        yield Path(directory)


async def test_a_pack_on_tmpfs_is_served(tmpfs: Path, pool: ReaderPool) -> None:
    pack = Pack(tmpfs)
    try:
        pack.shard(BLOCK_BYTES + PAGE)
    except OSError as error:
        pack.close()
        pytest.skip(f"this tmpfs refuses O_DIRECT: {error}")
    await outcome(pool, pack.job(pack.extent(0, 0, BLOCK_BYTES + PAGE)))
    assert bytes(pack.arena.buffer(0, BLOCK_BYTES + PAGE)) == pack.content[0]
    pack.close()


def test_a_job_that_does_not_fit_its_target_is_refused(pack: Pack) -> None:
    pack.shard(2 * PAGE)
    extent = pack.extent(0, 0, 2 * PAGE)
    with pytest.raises(ValueError, match="extents of 8192 bytes do not fill a target of 4096"):
        ReadJob("opt", "head", (extent,), pack.arena.buffer(0, PAGE))
    with pytest.raises(ValueError, match="extents of 0 bytes"):
        ReadJob("opt", "head", (), memoryview(b""))
    with pytest.raises(ValueError, match="2 hashes for an extent of 8192 bytes"):
        pack.job(replace(extent, xxh3=(1, 2)))
