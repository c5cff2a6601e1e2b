"""The readers: threads that fill slots from shards with direct reads, and verify what they read.

A layer is cut into the blocks that its hashes are of, and all threads work on the blocks of the
layer that came first. A few blocking threads reach what the device gives (measured against
io_uring), because reading and hashing release the GIL.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.errors import ReadCancelled, ReadError
from tierd.io.blocks import Block, read_block
from tierd.io.throttle import TokenBucket
from tierd_layouts.records import BLOCK_BYTES, block_count

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tierd_layouts.records import Layer, Shard

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtentRead:
    """A contiguous part of a layer in an open shard. `xxh3`: one hash for each 4 MiB block."""

    fd: int
    file: str
    offset: int
    nbytes: int
    xxh3: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ReadJob:
    """Fill `target` with the extents of one layer, one after the other.

    The target, and the descriptors, must stay until the outcome came: also after a failure of one
    block the others are still being written.
    """

    pack: str
    layer: str
    extents: tuple[ExtentRead, ...]
    target: memoryview

    def __post_init__(self) -> None:
        nbytes = sum(extent.nbytes for extent in self.extents)
        if nbytes != self.target.nbytes or nbytes == 0:
            raise ValueError(
                f"layer {self.layer!r} of pack {self.pack!r}: extents of {nbytes} bytes do not "
                f"fill a target of {self.target.nbytes} bytes"
            )
        for extent in self.extents:
            if len(extent.xxh3) != block_count(extent.nbytes):
                raise ValueError(
                    f"layer {self.layer!r} of pack {self.pack!r}: {len(extent.xxh3)} hashes "
                    f"for an extent of {extent.nbytes} bytes"
                )

    @classmethod
    def of_layer(
        cls,
        pack: str,
        layer: Layer,
        shards: Sequence[Shard],
        fds: Sequence[int],
        target: memoryview,
    ) -> ReadJob:
        """fds: the open shards, in the order of `shards`."""
        extents = tuple(
            ExtentRead(
                fds[extent.shard], shards[extent.shard].file,
                extent.offset, extent.nbytes, extent.xxh3,
            )
            for extent in layer.extents
        )  # fmt: skip
        return cls(pack, layer.name, extents, target)

    def blocks(self) -> Iterator[Block]:
        start = 0
        for extent in self.extents:
            for index, xxh3 in enumerate(extent.xxh3):
                offset = index * BLOCK_BYTES
                nbytes = min(BLOCK_BYTES, extent.nbytes - offset)
                yield Block(
                    fd=extent.fd,
                    offset=extent.offset + offset,
                    target=self.target[start : start + nbytes],
                    xxh3=xxh3,
                    pack=self.pack,
                    layer=self.layer,
                    file=extent.file,
                    index=index,
                    count=len(extent.xxh3),
                )
                start += nbytes


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A layer was read and verified. duration_ns: from submission, so with time in the queue."""

    nbytes: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    read_bytes: int  #: in blocks that were verified, also those of layers that failed
    reads: int  #: layers, verified
    failed: int  #: layers
    busy_ns: int  #: during which at least one block was being read
    throttled_ns: int  #: that threads waited for the bandwidth limit, summed over threads
    bandwidth_limit: int | None  #: bytes per second
    direct: bool  #: no block went through the page cache so far


@dataclass(slots=True, eq=False)
class _Work:
    """One job under way, without its target: that is held by the blocks, until they are done.

    `unfinished` and `error` change under the pool's lock only.
    """

    pack: str
    layer: str
    nbytes: int
    deliver: Callable[[ReadResult | ReadError], None]
    submitted_ns: int
    unfinished: int
    error: ReadError | None = None


class ReaderPool:
    """`submit` belongs to the event loop's thread; `close`, which blocks, and the rest to any.

    Threads start with the first job: a daemon that nobody asks is ready at once.
    """

    def __init__(self, readers: int, bandwidth: int | None = None) -> None:
        """readers: threads. bandwidth: bytes per second of all of them together, None = all."""
        self._readers = readers
        self._bucket: TokenBucket | None = None
        if bandwidth is not None:
            self._bucket = TokenBucket(bandwidth, BLOCK_BYTES, at_ns=time.monotonic_ns())
        self._threads: list[threading.Thread] = []
        self._queue: deque[tuple[_Work, Block]] = deque()
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)
        self._closing = threading.Event()
        # Everything below is counted under the lock.
        self._read_bytes = self._reads = self._failed = self._throttled_ns = 0
        self._busy_ns = self._busy_since_ns = self._in_flight = 0
        self._buffered: set[str] = set()

    def submit(self, job: ReadJob, on_done: Callable[[ReadResult | ReadError], None]) -> None:
        """Queue a job. `on_done` is called once, on the running loop, when no thread touches the
        target any more. Raises ReadCancelled after `close`."""
        loop = asyncio.get_running_loop()

        def deliver(outcome: ReadResult | ReadError) -> None:
            loop.call_soon_threadsafe(on_done, outcome)

        blocks = list(job.blocks())
        work = _Work(
            job.pack, job.layer, job.target.nbytes, deliver, time.monotonic_ns(), len(blocks)
        )
        with self._queued:
            if self._closing.is_set():
                raise _cancelled(work)
            while len(self._threads) < self._readers:
                name = f"tierd-ssd-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
            self._queue.extend((work, block) for block in blocks)
            self._queued.notify(len(blocks))

    def statistics(self) -> ReaderStatistics:
        with self._lock:
            busy_ns = self._busy_ns
            if self._in_flight:
                busy_ns += time.monotonic_ns() - self._busy_since_ns
            return ReaderStatistics(
                read_bytes=self._read_bytes,
                reads=self._reads,
                failed=self._failed,
                busy_ns=busy_ns,
                throttled_ns=self._throttled_ns,
                bandwidth_limit=self._bucket.rate_bytes_per_s if self._bucket else None,
                direct=not self._buffered,
            )

    def alive(self) -> bool:
        """Whether every thread that was started still serves. A device that does not answer is
        not counted here: its layers wait, those of other devices need not."""
        return all(thread.is_alive() for thread in self._threads)

    def notes(self) -> list[str]:
        """What an operator should know about these reads, for `tierctl status`."""
        with self._lock:
            return [
                f"{file} is read through the page cache: its file system refuses O_DIRECT"
                for file in sorted(self._buffered)
            ]

    def close(self, timeout_s: float = 10.0) -> None:
        """Give up what is queued (ReadCancelled), let the blocks in flight end, stop the threads.

        Outcomes are on the loop when this returns. Raises TimeoutError when a device does not
        answer: then a thread may still write into its target.
        """
        with self._queued:
            self._closing.set()
            dropped = list(self._queue)
            self._queue.clear()
            self._queued.notify_all()
        for work, block in dropped:
            block.target.release()
            self._finish_block(work, _cancelled(work))
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            raise TimeoutError(f"{', '.join(stuck)} did not end their reads in {timeout_s} s")

    def _run(self) -> None:
        while True:
            with self._queued:
                while not self._queue:
                    if self._closing.is_set():
                        return
                    self._queued.wait()
                work, block = self._queue.popleft()
            self._serve(work, block)

    def _serve(self, work: _Work, block: Block) -> None:
        """The boundary of a reader thread: whatever happens in it becomes the job's outcome."""
        error: ReadError | None = None
        with block.target:
            try:
                # A job that failed, or waits for bandwidth while we close, needs no more blocks.
                if work.error is None:
                    if self._wait_for_bandwidth(block.target.nbytes):
                        self._read(block)
                    else:
                        error = _cancelled(work)
            except ReadError as failure:
                error = failure
            except Exception as failure:
                log.exception("reading %s at offset %d", block.name, block.offset)
                error = ReadError(f"{block.name} cannot be read: {failure!r}")
        if error is not None:
            error.__traceback__ = error.__context__ = None  # frames would keep the target alive
        self._finish_block(work, error)

    def _wait_for_bandwidth(self, nbytes: int) -> bool:
        """False when the pool closes meanwhile."""
        if self._bucket is None:
            return True
        with self._lock:
            wait_ns = self._bucket.take(nbytes, at_ns=time.monotonic_ns())
            self._throttled_ns += wait_ns
        return not self._closing.wait(wait_ns / 1e9) if wait_ns else True

    def _read(self, block: Block) -> None:
        with self._lock:
            if self._in_flight == 0:
                self._busy_since_ns = time.monotonic_ns()
            self._in_flight += 1
        try:
            outcome = read_block(block)
        finally:
            with self._lock:
                self._in_flight -= 1
                if self._in_flight == 0:
                    self._busy_ns += time.monotonic_ns() - self._busy_since_ns
        with self._lock:
            self._read_bytes += block.target.nbytes
            if not outcome.direct:
                self._buffered.add(f"{block.pack}/{block.file}")
        if outcome.fell_back:
            log.warning("%s refuses O_DIRECT: it is read through the page cache", block.name)

    def _finish_block(self, work: _Work, error: ReadError | None) -> None:
        with self._lock:
            work.error = work.error or error
            work.unfinished -= 1
            if work.unfinished:
                return
            if work.error is None:
                self._reads += 1
            else:
                self._failed += 1
        if work.error is not None:
            work.deliver(work.error)
        else:
            duration_ns = time.monotonic_ns() - work.submitted_ns
            work.deliver(ReadResult(work.nbytes, duration_ns))


def _cancelled(work: _Work) -> ReadCancelled:
    return ReadCancelled(
        f"layer {work.layer!r} of pack {work.pack!r} was not read: the daemon shuts down"
    )
