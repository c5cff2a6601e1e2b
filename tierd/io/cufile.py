"""A reader that fills GPU memory from shards without a detour through DRAM (cuFile).

Off by default (`gpu_direct`). It proves that it is direct: after every layer cuFile's own counters
must say that all reads took the direct way and moved these bytes. A layer for which they do not is
not delivered, and the reader refuses all that come later. It never reads another way instead.

Blocks are hashed on the host, so what was read is copied back for that, into memory that is not
kept: promise 4 (a corrupt layer is never served) holds here too, at the price of a device-to-host
copy. The counterpart for host memory is `ssd.ReaderPool`; the job is a `ReadJob` whose target is an
address of GPU memory.

Not wired to the daemon: in the core a layer reaches a GPU through a lease in DRAM ("Three tiers" in
`core/README.md`), so there is no event for a read that ends on a GPU, and `gpu_direct = true` is
refused at start (`gpu_settings`). Never run on hardware.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from tierd.errors import ChecksumMismatch, ReadError
from tierd.io.cufile_library import CuFileError, CuFileLibrary, Reads
from tierd.io.ssd_job import ReadResult
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.io.ssd_job import ExtentRead

log = logging.getLogger(__name__)


class NotDirect(ReadError):
    """cuFile's counters do not show that a layer came straight from the SSD."""


@dataclass(frozen=True, slots=True)
class DirectJob:
    """Fill GPU memory at `address` with the extents of one layer, one after the other.

    The memory must be one allocation of the GPU, and stay until `read` returned. Descriptors are
    opened with O_DIRECT and stay open until the reader is closed, or `forget` was called.
    """

    pack: str
    layer: str
    extents: tuple[ExtentRead, ...]
    address: int

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)

    @property
    def name(self) -> str:
        return f"pack {self.pack!r}, layer {self.layer!r}"


@dataclass(frozen=True, slots=True)
class DirectStatistics:
    """`reads`, `failed`: layers. The rest is what cuFile counted."""

    reads: int
    failed: int
    read_bytes: int
    direct_reads: int
    posix_reads: int


class CuFileReader:
    """One GPU. `read` blocks, without the GIL, in a thread that has the GPU's context; one layer
    at a time, because the counters are of the whole process."""

    def __init__(
        self,
        read_back: Callable[[int, int], bytes | bytearray | memoryview],
        library: CuFileLibrary | None = None,
    ) -> None:
        """read_back: (address, nbytes) -> these bytes of GPU memory, for the checksum."""
        self._read_back = read_back
        self._library = library or CuFileLibrary()
        self._files: dict[int, int] = {}  # handles by descriptor
        self._turn = threading.Lock()
        self._indirect: str | None = None
        self._reads = self._failed = 0

    def open(self) -> None:
        """Raises GpuDirectUnavailable."""
        self._library.open()

    def read(self, job: DirectJob) -> ReadResult:
        """Read and verify a layer. Raises NotDirect, ReadError or ChecksumMismatch; then what is
        in the memory is void, and nothing writes into it any more."""
        begin_ns = time.monotonic_ns()
        with self._turn:
            try:
                if self._indirect is not None:
                    raise NotDirect(f"{job.name} is not read: {self._indirect}")
                self._read(job)
                self._verify(job)
            except CuFileError as error:
                self._failed += 1
                raise ReadError(f"{job.name} cannot be read into the GPU: {error}") from None
            except ReadError:
                self._failed += 1
                raise
            self._reads += 1
        return ReadResult(job.nbytes, time.monotonic_ns() - begin_ns)

    def forget(self, fd: int) -> None:
        """The descriptor is about to be closed."""
        with self._turn:
            handle = self._files.pop(fd, None)
            if handle is not None:
                self._library.drop_file(handle)

    def statistics(self) -> DirectStatistics:
        """Raises CuFileError."""
        counted = self._library.reads()
        return DirectStatistics(
            self._reads, self._failed, counted.nbytes, counted.direct, counted.posix
        )

    def close(self) -> None:
        for fd in list(self._files):
            self.forget(fd)
        self._library.close()

    def _read(self, job: DirectJob) -> None:
        handles = [self._handle(extent.fd) for extent in job.extents]
        before = self._library.reads()
        self._library.add_memory(job.address, job.nbytes)
        try:
            at = 0
            for handle, extent in zip(handles, job.extents, strict=True):
                self._fill(job, handle, extent, at)
                at += extent.nbytes
        finally:
            # Memory that stays pinned is the device's to report when it is freed.
            with contextlib.suppress(CuFileError):
                self._library.drop_memory(job.address)
        self._check_direct(job, self._library.reads().since(before))

    def _handle(self, fd: int) -> int:
        if fd not in self._files:
            self._files[fd] = self._library.add_file(fd)
        return self._files[fd]

    def _fill(self, job: DirectJob, handle: int, extent: ExtentRead, at: int) -> None:
        done = 0
        while done < extent.nbytes:
            got = self._library.read(
                handle, job.address, extent.nbytes - done, extent.offset + done, at + done
            )
            if got == 0:
                raise ReadError(
                    f"{job.name}: {extent.file} ends early: expected {extent.nbytes} bytes at "
                    f"offset {extent.offset}, got {done}"
                )
            done += got

    def _check_direct(self, job: DirectJob, counted: Reads) -> None:
        if counted.posix == 0 and counted.direct > 0 and counted.nbytes >= job.nbytes:
            if not self._reads:
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
        at = job.address
        for extent in job.extents:
            for number, expected in enumerate(extent.xxh3):
                start = number * BLOCK_BYTES
                nbytes = min(BLOCK_BYTES, extent.nbytes - start)
                found = xxhash.xxh3_64_intdigest(self._read_back(at + start, nbytes))
                if found != expected:
                    raise ChecksumMismatch(
                        f"{job.name}: {extent.file} is corrupt: block {number} of "
                        f"{len(extent.xxh3)} ({nbytes} bytes at offset {extent.offset + start}) "
                        f"has xxh3 {found:016x}, expected {expected:016x}"
                    )
            at += extent.nbytes
