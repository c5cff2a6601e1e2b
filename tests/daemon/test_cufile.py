"""The reader that fills GPU memory without DRAM, over a fake libcufile whose GPU is host memory."""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import xxhash

from tests.daemon.played_cufile import build
from tierd.errors import ChecksumMismatch, ReadError
from tierd.io.cufile import CuFileReader, DirectJob, NotDirect, file_id
from tierd.io.cufile_library import CuFileLibrary, GpuDirectUnavailable
from tierd.io.ssd_job import ExtentRead
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

FIRST, SECOND = BLOCK_BYTES + 8192, 12288
PART = 2 << 20  # memory of a GPU in one piece: less than a block


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cufile"))


@pytest.fixture
def library(compiled: Path, tmp_path: Path) -> Path:
    """A copy of its own: what it counts is the whole process's."""
    return Path(shutil.copy(compiled, tmp_path / "libcufile.so.0"))


class Memory:
    """ "GPU memory" that a reader fills, and a shard of two extents."""

    def __init__(self, folder: Path) -> None:
        self.data = os.urandom(4096 + FIRST + SECOND)
        self.shard = folder / "shard"
        self.shard.write_bytes(self.data)
        self.fd = os.open(self.shard, os.O_RDONLY)
        self.bytes = (ctypes.c_char * (FIRST + SECOND))()

    def job(self, *, longer: int = 0) -> DirectJob:
        def extent(offset: int, nbytes: int) -> ExtentRead:
            part = self.data[offset : offset + nbytes]
            hashes = tuple(
                xxhash.xxh3_64_intdigest(part[start : start + BLOCK_BYTES])
                for start in range(0, nbytes, BLOCK_BYTES)
            )
            return ExtentRead(self.fd, "shard", offset, nbytes, hashes)

        second = extent(4096 + FIRST, SECOND)
        if longer:
            second = ExtentRead(
                self.fd, "shard", second.offset, second.nbytes + longer, second.xxh3
            )
        start, end = ctypes.addressof(self.bytes), FIRST + SECOND + longer
        borders = [0, *range(PART, end, PART), end]
        parts = tuple((start + at, after - at) for at, after in pairwise(borders))
        extents = (extent(4096, FIRST), second)
        return DirectJob("pack", "model.layers.0", extents, parts, self.read_back)

    def read_back(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    made = Memory(tmp_path)
    yield made
    os.close(made.fd)


def read(direct: CuFileReader, job: DirectJob) -> None:
    direct.read(job)
    direct.verify(job)


def reader(library: Path) -> CuFileReader:
    made = CuFileReader(CuFileLibrary(str(library)))
    made.open()
    return made


def counts(library: Path) -> tuple[int, int, int]:
    """(files, buffers) registered and not dropped again, and whether the driver is open."""
    fake = ctypes.CDLL(str(library))
    return fake.fake_files(), fake.fake_buffers(), fake.fake_opened()


@pytest.mark.parametrize("version", ["1150", "1190"])
def test_a_layer_of_two_extents_arrives_and_is_counted_as_direct(
    memory: Memory,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
) -> None:
    monkeypatch.setenv("FAKE_VERSION", version)
    direct = reader(library)
    with caplog.at_level("INFO"):
        read(direct, memory.job())
    assert "none through DRAM" in caplog.text
    assert memory.bytes.raw == memory.data[4096:]
    found = direct.statistics()
    assert (found.reads, found.failed, found.read_bytes) == (1, 0, FIRST + SECOND)
    assert found.direct_reads > 1
    assert found.posix_reads == 0
    direct.close()
    assert counts(library) == (0, 0, 0)


def test_reads_through_dram_are_refused_and_so_are_all_that_follow(
    memory: Memory, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_POSIX", "1")
    direct = reader(library)
    with pytest.raises(NotDirect, match=r"0 direct reads and \d+ through DRAM"):
        read(direct, memory.job())
    monkeypatch.delenv("FAKE_POSIX")
    with pytest.raises(NotDirect, match="is not read"):
        read(direct, memory.job())
    assert direct.statistics().failed == 2
    direct.close()


def test_reads_that_nothing_counts_prove_nothing(
    memory: Memory, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_UNCOUNTED", "1")
    direct = reader(library)
    with pytest.raises(NotDirect, match="0 direct reads and 0 through DRAM, 0 bytes"):
        read(direct, memory.job())
    direct.close()


def test_a_corrupt_block_is_named(memory: Memory, library: Path) -> None:
    with memory.shard.open("r+b") as file:
        file.seek(4096 + BLOCK_BYTES + 5)
        file.write(b"\0\0\0\0\0\0\0\0")
    direct = reader(library)
    with pytest.raises(ChecksumMismatch, match="block 1 of 2"):
        read(direct, memory.job())
    direct.close()


def test_a_shard_that_ends_early_is_named_and_the_memory_unpinned(
    memory: Memory, library: Path
) -> None:
    direct = reader(library)
    with pytest.raises(ReadError, match="shard ends early"):
        read(direct, memory.job(longer=4096))
    assert counts(library) == (1, 0, 1)
    direct.close()


@pytest.mark.parametrize(("result", "said"), [("-5008", "on this file"), ("-1", "cuFileRead of")])
def test_a_failed_read_says_what_cufile_said(
    memory: Memory, library: Path, monkeypatch: pytest.MonkeyPatch, result: str, said: str
) -> None:
    monkeypatch.setenv("FAKE_READ", result)
    direct = reader(library)
    with pytest.raises(ReadError, match=said):
        read(direct, memory.job())
    direct.close()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FAKE_OPEN", "5001", "the nvidia-fs driver is not loaded"),
        ("FAKE_VERSION", "1170", r"cuFile 1\.17 lays its counters out"),
        ("FAKE_STATS", "5022", "does not count its reads"),
    ],
)
def test_a_machine_where_it_cannot_be_proven_direct_is_refused_at_open(
    library: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(GpuDirectUnavailable, match=said) as refused:
        CuFileLibrary(str(library)).open()
    assert refused.value.advice
    assert counts(library)[2] == 0


def test_a_library_that_is_not_there_or_too_old_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GpuDirectUnavailable, match="cannot be loaded"):
        CuFileLibrary(str(tmp_path / "none.so")).open()
    with pytest.raises(GpuDirectUnavailable, match="too old"):
        CuFileLibrary("libc.so.6").open()


def test_a_file_is_registered_once_and_forgotten_when_it_is_closed(
    memory: Memory, library: Path
) -> None:
    direct = reader(library)
    read(direct, memory.job())
    read(direct, memory.job())
    assert counts(library)[0] == 1
    direct.forget([file_id(memory.fd)])
    direct.forget([file_id(memory.fd)])
    assert counts(library)[0] == 0
    direct.close()


def test_a_descriptor_s_number_that_is_another_file_s_now_is_read_from_that_file(
    memory: Memory, library: Path, tmp_path: Path
) -> None:
    direct = reader(library)
    read(direct, memory.job())
    memory.data = os.urandom(len(memory.data))
    (tmp_path / "new").write_bytes(memory.data)
    new = os.open(tmp_path / "new", os.O_RDONLY)
    os.dup2(new, memory.fd)  # the pack was closed, and its number given to another
    os.close(new)
    read(direct, memory.job())
    assert memory.bytes.raw == memory.data[4096:]
    direct.close()
    assert counts(library) == (0, 0, 0)


def test_memory_of_another_size_than_the_layer_is_a_mistake(memory: Memory) -> None:
    job = memory.job()
    with pytest.raises(ValueError, match=f"{job.nbytes} bytes for GPU memory of {PART} bytes"):
        replace(job, parts=job.parts[:1])
