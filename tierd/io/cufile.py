"""A reader that fills GPU memory from shards without a detour through DRAM (cuFile).

Off by default (`gpu_direct`). It proves that it is direct: after every layer cuFile's own counters
must say that all reads took the direct way and moved these bytes. A layer for which they do not is
not delivered, and the reader refuses all that come later. It never reads another way instead.

Blocks are hashed on the host, so what was read is copied back for that, into memory that is not
kept: promise 4 (a corrupt layer is never served) holds here too, at the price of a device-to-host
copy. The counterpart for host memory is `ssd.ReaderPool`; the job is a `ReadJob` whose target is
memory of a GPU. Never run on hardware.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from tierd.errors import ChecksumMismatch, ReadError, TierdError
from tierd.io.cufile_library import CuFileError, CuFileLibrary, Reads
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tierd.io.ssd_job import ExtentRead

log = logging.getLogger(__name__)

FileId = tuple[int, int]  # device, inode

#: What PCI devices reach of a GPU begins and ends on these (nvidia_p2p_get_pages, dma-buf).
GPU_PAGE_BYTES = 64 << 10


class NotDirect(ReadError):
    """cuFile's counters do not show that a layer came straight from the SSD."""


@dataclass(frozen=True, slots=True)
class DirectJob:
    """Fill GPU memory with the extents of one layer, one after the other.

    parts: where that memory lies, in order: (address, bytes) of one allocation each. It stays until
    the job is over, and so do the descriptors, which were opened with O_DIRECT. fetch: (address,
    bytes) of one part -> these bytes, back from the GPU, for the checksum.
    """

    pack: str
    layer: str
    extents: tuple[ExtentRead, ...]
    parts: tuple[tuple[int, int], ...]
    fetch: Callable[[int, int], bytes | bytearray | memoryview]

    def __post_init__(self) -> None:
        room = sum(nbytes for _, nbytes in self.parts)
        if room != self.nbytes:
            raise ValueError(f"{self.name}: {self.nbytes} bytes for GPU memory of {room} bytes")

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)

    @property
    def name(self) -> str:
        return f"pack {self.pack!r}, layer {self.layer!r}"

    def places(self, start: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
        """Bytes [start, start + nbytes) of the layer on the GPU: (address of the part, offset in
        it, bytes), in order."""
        end, begin = start + nbytes, 0
        for address, size in self.parts:
            first, last = max(start, begin), min(end, begin + size)
            if first < last:
                yield address, first - begin, last - first
            begin += size


@dataclass(frozen=True, slots=True)
class DirectStatistics:
    """`reads`, `failed`: layers. The rest is what cuFile counted when the last one was over, of
    all GPUs."""

    reads: int = 0
    failed: int = 0
    read_bytes: int = 0
    direct_reads: int = 0
    posix_reads: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    """An open shard, by a descriptor of our own: that of its pack may be closed any time."""

    fd: int
    handle: int


class CuFileReader:
    """For all GPUs of the process, because the counters are. `open`, `read`, `forget` and `close`
    in one thread, which has made the GPU's context its own; they block, without the GIL, as does
    `verify`, for which any thread is right."""

    def __init__(self, library: CuFileLibrary | None = None) -> None:
        self._library = library or CuFileLibrary()
        self._files: dict[FileId, _File] = {}
        self._indirect: str | None = None
        self._said = False
        self._counted = Reads()
        self._lock = threading.Lock()  # of the two below
        self._reads = self._failed = 0

    def open(self) -> None:
        """Raises GpuDirectUnavailable."""
        self._library.open()

    def read(self, job: DirectJob) -> None:
        """Read a layer, which `verify` has to look at. Raises NotDirect or ReadError; then what is
        in the memory is void, and nothing writes into it any more."""
        try:
            if self._indirect is not None:
                raise NotDirect(f"{job.name} is not read: {self._indirect}")
            self._read(job)
        except CuFileError as error:
            self._count_failed()
            raise ReadError(f"{job.name} cannot be read into the GPU: {error}") from None
        except ReadError:
            self._count_failed()
            raise

    def verify(self, job: DirectJob) -> None:
        """Hash what was read, on the host. Raises ChecksumMismatch, and what `fetch` does."""
        try:
            self._verify(job)
        except TierdError:
            self._count_failed()
            raise
        with self._lock:
            self._reads += 1

    def _count_failed(self) -> None:
        with self._lock:
            self._failed += 1

    def forget(self, files: Iterable[FileId]) -> None:
        """Nothing of these is read any more."""
        for identity in files:
            file = self._files.pop(identity, None)
            if file is not None:
                self._library.drop_file(file.handle)
                os.close(file.fd)

    def statistics(self) -> DirectStatistics:
        counted = self._counted
        return DirectStatistics(
            self._reads, self._failed, counted.nbytes, counted.direct, counted.posix
        )

    def close(self) -> None:
        self.forget(list(self._files))
        self._library.close()

    def _read(self, job: DirectJob) -> None:
        handles = [self._handle(extent.fd) for extent in job.extents]
        before = self._library.reads()
        pinned: list[int] = []
        try:
            for address, nbytes in job.parts:
                base, end = _pages(address, nbytes)
                self._library.add_memory(base, end - base)
                pinned.append(base)
            at = 0
            for handle, extent in zip(handles, job.extents, strict=True):
                self._fill(job, handle, extent, at)
                at += extent.nbytes
        finally:
            for base in pinned:
                # Memory that stays pinned is the device's to report when it is freed.
                with contextlib.suppress(CuFileError):
                    self._library.drop_memory(base)
            with contextlib.suppress(CuFileError):
                self._counted = self._library.reads()
        self._check_direct(job, self._library.reads().since(before))

    def _handle(self, fd: int) -> int:
        """Of the file behind a pack's descriptor, whose number may be another file's next time."""
        identity = file_id(fd)
        file = self._files.get(identity)
        if file is None:
            own = os.dup(fd)
            try:
                file = _File(own, self._library.add_file(own))
            except CuFileError:
                os.close(own)
                raise
            self._files[identity] = file
        return file.handle

    def _fill(self, job: DirectJob, handle: int, extent: ExtentRead, at: int) -> None:
        done = 0
        for address, start, nbytes in job.places(at, extent.nbytes):
            base, _ = _pages(address, nbytes)
            end = done + nbytes
            while done < end:
                left = end - done
                into = address - base + start + nbytes - left
                got = self._library.read(handle, base, left, extent.offset + done, into)
                if got == 0:
                    raise ReadError(
                        f"{job.name}: {extent.file} ends early: expected {extent.nbytes} bytes at "
                        f"offset {extent.offset}, got {done}"
                    )
                done += got

    def _check_direct(self, job: DirectJob, counted: Reads) -> None:
        if counted.posix == 0 and counted.direct > 0 and counted.nbytes >= job.nbytes:
            if not self._said:
                self._said = True
                log.info(
                    "reading straight into the GPU, as cuFile counts: %d reads by P2PDMA, %d by "
                    "nvidia-fs, none through DRAM", counted.p2p, counted.nvfs,
                )  # fmt: skip
            return
        self._indirect = (
            f"cuFile counted {counted.direct} direct reads and {counted.posix} through DRAM, "
            f"{counted.nbytes} bytes, for {job.nbytes} bytes of {job.name}: this is not direct"
        )
        raise NotDirect(self._indirect)

    def _verify(self, job: DirectJob) -> None:
        at = 0
        for extent in job.extents:
            for number, expected in enumerate(extent.xxh3):
                start = number * BLOCK_BYTES
                nbytes = min(BLOCK_BYTES, extent.nbytes - start)
                hashed = xxhash.xxh3_64()
                for address, offset, size in job.places(at + start, nbytes):
                    hashed.update(job.fetch(address + offset, size))
                if hashed.intdigest() != expected:
                    raise ChecksumMismatch(
                        f"{job.name}: {extent.file} is corrupt: block {number} of "
                        f"{len(extent.xxh3)} ({nbytes} bytes at offset {extent.offset + start}) "
                        f"has xxh3 {hashed.hexdigest()}, expected {expected:016x}"
                    )
            at += extent.nbytes


def _pages(address: int, nbytes: int) -> tuple[int, int]:
    """What is pinned for a part: whole pages of the GPU, which its allocation has."""
    end = address + nbytes
    return address - address % GPU_PAGE_BYTES, end + -end % GPU_PAGE_BYTES


def file_id(fd: int) -> FileId:
    """What stays the same for every descriptor of a file, as long as one of them is open."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
