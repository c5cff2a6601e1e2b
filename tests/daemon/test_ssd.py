"""What a read of a layer brings, whatever the file, the file system and the device do."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash

from tests.daemon.shards import MIB, PAGE, Shards, failure, outcome, outcomes
from tierd.errors import ChecksumMismatch
from tierd.io import ssd_lane
from tierd.io.ssd import ReaderPool
from tierd.io.ssd_job import ReadJob, ReadResult
from tierd_layouts.records import BLOCK_BYTES, Extent, Layer, Shard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.mark.parametrize("chunk", [48 * PAGE, BLOCK_BYTES, 4 * BLOCK_BYTES])
@pytest.mark.parametrize(
    "nbytes", [PAGE, BLOCK_BYTES, BLOCK_BYTES + PAGE, 3 * BLOCK_BYTES - PAGE, 5 * BLOCK_BYTES]
)
async def test_a_layer_arrives_whole_in_chunks_of_any_size(
    shards: Shards, pool: ReaderPool, nbytes: int, chunk: int
) -> None:
    shards.shard(nbytes + 3 * PAGE)
    pool.configure(chunk_bytes=chunk)
    answer = await outcome(pool, shards.job(shards.extent(0, 2 * PAGE, nbytes)))
    assert isinstance(answer, ReadResult)
    assert answer.nbytes == nbytes
    assert answer.duration_ns > 0
    assert bytes(shards.arena.buffer(0, nbytes)) == shards.content[0][2 * PAGE : 2 * PAGE + nbytes]
    assert shards.arena.buffer(nbytes, 1)[0] == 0  # and nothing behind it
    found = pool.statistics()
    assert (found.read_bytes, found.reads, found.failed) == (nbytes, 1, 0)
    assert found.busy_ns > 0
    assert found.direct
    assert pool.notes() == []


async def test_extents_of_several_shards_follow_each_other(
    shards: Shards, pool: ReaderPool
) -> None:
    shards.shard(2 * BLOCK_BYTES)
    shards.shard(BLOCK_BYTES + PAGE)
    parts = (
        shards.extent(1, 0, BLOCK_BYTES + PAGE),
        shards.extent(0, PAGE, PAGE),
        shards.extent(0, BLOCK_BYTES, BLOCK_BYTES),
    )
    await outcome(pool, shards.job(*parts, at=MIB))
    wanted = b"".join(
        shards.content[shards.fds.index(part.fd)][part.offset : part.offset + part.nbytes]
        for part in parts
    )
    assert bytes(shards.arena.buffer(MIB, len(wanted))) == wanted


async def test_a_job_is_made_of_the_layer_of_an_index(shards: Shards, pool: ReaderPool) -> None:
    shards.shard(PAGE)
    shards.shard(3 * PAGE)
    part = shards.extent(1, PAGE, 2 * PAGE)
    layer = Layer("head", 2 * PAGE, (Extent(1, PAGE, 2 * PAGE, part.xxh3),), ())
    named = [Shard(shards.path(n).name, len(shards.content[n])) for n in (0, 1)]
    job = ReadJob.of_layer("opt", layer, named, shards.fds, shards.arena.buffer(0, 2 * PAGE))
    assert job.extents == (part,)
    assert isinstance(await outcome(pool, job), ReadResult)


async def test_many_layers_at_once_do_not_mix(shards: Shards, pool: ReaderPool) -> None:
    count, nbytes = 24, BLOCK_BYTES // 4 + PAGE
    shards.shard(count * nbytes)
    jobs = [
        shards.job(shards.extent(0, at, nbytes), at=at) for at in range(0, count * nbytes, nbytes)
    ]
    assert all(isinstance(answer, ReadResult) for answer in await outcomes(pool, jobs))
    assert bytes(shards.arena.buffer(0, count * nbytes)) == shards.content[0]
    assert pool.statistics().reads == count


async def test_a_flipped_bit_is_never_served(shards: Shards, pool: ReaderPool) -> None:
    shards.shard(3 * BLOCK_BYTES)
    good = shards.extent(0, 0, 3 * BLOCK_BYTES)
    with shards.path(0).open("r+b") as file:
        file.seek(BLOCK_BYTES + 1234)
        file.write(bytes([shards.content[0][BLOCK_BYTES + 1234] ^ 0x10]))
    error = await failure(pool, shards.job(good))
    assert isinstance(error, ChecksumMismatch)
    assert error.code == "checksum_mismatch"
    text = str(error)
    assert "pack 'opt', layer 'model.layers.3': tierd-00000.safetensors is corrupt" in text
    assert f"block 1 of 3 ({BLOCK_BYTES} bytes at offset {BLOCK_BYTES})" in text
    found = xxhash.xxh3_64_hexdigest(shards.path(0).read_bytes()[BLOCK_BYTES : 2 * BLOCK_BYTES])
    assert f"has xxh3 {found}, expected {good.xxh3[1]:016x}" in text
    assert (pool.statistics().reads, pool.statistics().failed) == (0, 1)


@pytest.mark.parametrize("direct", [os.O_DIRECT, 0])
@pytest.mark.parametrize(
    "left", [0, 1, 511, 512, PAGE, 3 * PAGE + 7, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 100]
)
async def test_a_shard_that_was_cut_off_is_named_with_what_is_missing(
    shards: Shards, pool: ReaderPool, left: int, direct: int
) -> None:
    shards.shard(PAGE + 2 * BLOCK_BYTES, flags=direct)
    job = shards.job(shards.extent(0, PAGE, 2 * BLOCK_BYTES))
    os.truncate(shards.path(0), PAGE + left)
    error = await failure(pool, job)
    assert error.code == "read_failed"
    text = str(error)
    assert "pack 'opt', layer 'model.layers.3': tierd-00000.safetensors ends early" in text
    start = 0 if left < BLOCK_BYTES else BLOCK_BYTES
    second = f"expected {BLOCK_BYTES} bytes at offset {PAGE + BLOCK_BYTES}, got 0"
    exact = f"expected {BLOCK_BYTES} bytes at offset {PAGE + start}, got {left - start}"
    assert exact in text or (start == 0 and second in text)  # whichever block failed first


async def test_an_error_of_the_device_is_named(
    shards: Shards, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO cannot be had from an ordinary file; only the call itself is replaced."""

    def broken(fd: int, targets: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    shards.shard(2 * PAGE)
    monkeypatch.setattr(os, "preadv", broken)
    error = await failure(pool, shards.job(shards.extent(0, PAGE, PAGE)))
    assert error.code == "read_failed"
    assert str(error) == (
        "pack 'opt', layer 'model.layers.3': tierd-00000.safetensors cannot be read: "
        f"EIO (Input/output error), {PAGE} bytes at offset {PAGE}"
    )


async def test_a_closed_descriptor_is_an_error_and_not_the_end(
    shards: Shards, pool: ReaderPool
) -> None:
    shards.shard(PAGE)
    good = shards.extent(0, 0, PAGE)
    bad = replace(good, fd=os.open(os.devnull, os.O_RDONLY))
    os.close(bad.fd)
    error = await failure(pool, shards.job(bad))
    assert "EBADF" in str(error)
    assert isinstance(await outcome(pool, shards.job(good)), ReadResult)
    assert pool.alive()


async def test_a_defect_in_a_reader_fails_its_layer_only(
    shards: Shards,
    pool: ReaderPool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards.shard(PAGE)
    job = shards.job(shards.extent(0, 0, PAGE))
    with monkeypatch.context() as patch:
        patch.setattr(ssd_lane, "verify_chunk", lambda *_: 1 // 0)
        error = await failure(pool, job)
    assert "ZeroDivisionError" in str(error)
    assert "Traceback" in caplog.text
    assert isinstance(await outcome(pool, shards.job(shards.extent(0, 0, PAGE))), ReadResult)


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
    shards: Shards,
    pool: ReaderPool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards.shard(2 * BLOCK_BYTES)
    shards.shard(PAGE)
    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refusing_direct(calls))
        job = shards.job(shards.extent(0, 0, 2 * BLOCK_BYTES))
        assert isinstance(await outcome(pool, job), ReadResult)
    assert bytes(shards.arena.buffer(0, 2 * BLOCK_BYTES)) == shards.content[0]
    assert not pool.statistics().direct
    assert pool.notes() == [
        "opt/tierd-00000.safetensors is read through the page cache: "
        "its file system refuses O_DIRECT"
    ]
    assert "refuses O_DIRECT" in caplog.text
    assert not fcntl.fcntl(shards.fds[0], fcntl.F_GETFL) & os.O_DIRECT  # tried once, not each time


async def test_buffered_reads_leave_nothing_in_the_page_cache(
    shards: Shards, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.shard(BLOCK_BYTES + PAGE, flags=0)
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, offset, nbytes, kind: advised.append((offset, nbytes, kind))
    )
    await outcome(pool, shards.job(shards.extent(0, 0, BLOCK_BYTES + PAGE)))
    assert sorted(advised) == [
        (0, BLOCK_BYTES, os.POSIX_FADV_DONTNEED),
        (BLOCK_BYTES, PAGE, os.POSIX_FADV_DONTNEED),
    ]


async def test_reads_that_the_system_answers_in_pieces_are_put_together(
    shards: Shards, pool: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.preadv
    rng = random.Random(5)

    def in_pieces(fd: int, targets: list[memoryview], offset: int) -> int:
        assert offset % PAGE == 0  # a direct read may not go on anywhere else
        most = rng.randrange(PAGE, 40 * PAGE, 512)
        return min(most, really(fd, targets, offset))

    shards.shard(BLOCK_BYTES)
    monkeypatch.setattr(os, "preadv", in_pieces)
    assert isinstance(await outcome(pool, shards.job(shards.extent(0, 0, BLOCK_BYTES))), ReadResult)


async def test_a_large_chunk_names_the_block_that_is_corrupt(shards: Shards) -> None:
    shards.shard(4 * BLOCK_BYTES)
    good = shards.extent(0, 0, 4 * BLOCK_BYTES)
    with shards.path(0).open("r+b") as file:
        file.seek(2 * BLOCK_BYTES)
        file.write(bytes([shards.content[0][2 * BLOCK_BYTES] ^ 1]))
    pool = ReaderPool(2)
    error = await failure(pool, shards.job(good))
    pool.close()
    assert f"block 2 of 4 ({BLOCK_BYTES} bytes at offset {2 * BLOCK_BYTES})" in str(error)


async def test_a_large_chunk_of_a_shard_that_was_cut_off_says_how_much_came(shards: Shards) -> None:
    shards.shard(4 * BLOCK_BYTES)
    job = shards.job(shards.extent(0, 0, 4 * BLOCK_BYTES))
    os.truncate(shards.path(0), 3 * BLOCK_BYTES + 512)
    pool = ReaderPool(2)
    error = await failure(pool, job)
    pool.close()
    expected = f"expected {4 * BLOCK_BYTES} bytes at offset 0, got {3 * BLOCK_BYTES + 512}"
    assert expected in str(error)


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs to write to")
    with tempfile.TemporaryDirectory(prefix="tierd-test-", dir="/dev/shm") as directory:
        yield Path(directory)


async def test_a_pack_on_tmpfs_is_served(tmpfs: Path, pool: ReaderPool) -> None:
    shards = Shards(tmpfs)
    try:
        shards.shard(BLOCK_BYTES + PAGE)
    except OSError as error:
        shards.close()
        pytest.skip(f"this tmpfs refuses O_DIRECT: {error}")
    await outcome(pool, shards.job(shards.extent(0, 0, BLOCK_BYTES + PAGE)))
    assert bytes(shards.arena.buffer(0, BLOCK_BYTES + PAGE)) == shards.content[0]
    shards.close()


def test_a_job_that_does_not_fit_its_target_is_refused(shards: Shards) -> None:
    shards.shard(2 * PAGE)
    extent = shards.extent(0, 0, 2 * PAGE)
    with pytest.raises(ValueError, match="extents of 8192 bytes do not fill a target of 4096"):
        ReadJob("opt", "head", (extent,), shards.arena.buffer(0, PAGE))
    with pytest.raises(ValueError, match="extents of 0 bytes"):
        ReadJob("opt", "head", (), memoryview(b""))
    with pytest.raises(ValueError, match="2 hashes for an extent of 8192 bytes"):
        shards.job(replace(extent, xxh3=(1, 2)))
