"""The threads that read one device.

`readers` of them read, one more verifies meanwhile: so the device always has as much to do as it
was meant to have. One verifies at a time, because one can use up the memory's bandwidth; two that
share it take more time for the same bytes.

A device that never answers keeps the threads of its lane, and those of no other: the packs on other
devices are read on. Threads start with the lane's first job and are never more than `readers` + 1.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.errors import ReadCancelled, ReadError
from tierd.io.chunks import read_chunk, verify_chunk
from tierd.io.ssd_job import ReadResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tierd.io.chunks import Chunk
    from tierd.io.ssd_job import ReadJob
    from tierd.io.throttle import Throttle
    from tierd.io.verified import VerifiedBlocks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    readers: int  #: threads that may read it at once
    chunk_bytes: int  #: the most that one read asks for
    read_bytes: int  #: in chunks that were verified, also those of layers that failed
    reads: int  #: layers, verified
    failed: int  #: layers
    busy_ns: int  #: during which at least one chunk was being read
    in_flight: int  #: chunks being read
    waiting_ns: int  #: for how long the oldest of these has been
    packs: tuple[str, ...]  #: of the chunks in flight


@dataclass(slots=True, eq=False)
class _Work:
    """One job under way, without its target: that is held by the chunks, until they are done.

    `unfinished` and `error` change under the lane's lock only.
    """

    pack: str
    layer: str
    nbytes: int
    deliver: Callable[[ReadResult | ReadError], None]
    verified: VerifiedBlocks
    submitted_ns: int
    unfinished: int
    error: ReadError | None = None


class Lane:
    """One device. `submit`, `configure` and `give_up` do not block; `wait_ended` does."""

    def __init__(
        self, name: str, readers: int, chunk_bytes: int, throttle: Throttle | None
    ) -> None:
        """name: of its threads. throttle: what all lanes together may read."""
        self._name = name
        self._readers = readers
        self._chunk_bytes = chunk_bytes
        self._throttle = throttle
        self._started = 0
        self._threads: list[threading.Thread] = []
        self._queue: deque[tuple[_Work, Chunk]] = deque()
        self._lock = threading.Lock()
        self._queued = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._verifying = threading.Lock()
        # Everything below is counted under the lock.
        self._read_bytes = self._reads = self._failed = 0
        self._busy_ns = self._busy_since_ns = 0
        self._taken = 0  # chunks that are to be read, or are being read, by a thread
        self._under_way: dict[Chunk, int] = {}  # since when, the oldest first
        self._buffered: set[str] = set()

    def configure(self, readers: int, chunk_bytes: int) -> None:
        """From the next job on. Threads that are too many end when they have read their chunk."""
        with self._queued:
            self._readers, self._chunk_bytes = readers, chunk_bytes
            self._queued.notify_all()
            if self._queue:
                self._start_threads()

    def submit(self, job: ReadJob, deliver: Callable[[ReadResult | ReadError], None]) -> None:
        """Queue a job. `deliver` is called once, in any thread, when none touches the target any
        more; then those who follow hear of the end. Raises ReadCancelled after `give_up`."""
        chunks = list(job.chunks(self._chunk_bytes))
        work = _Work(
            job.pack, job.layer, job.target.nbytes, deliver, job.verified, time.monotonic_ns(),
            len(chunks),
        )  # fmt: skip
        with self._queued:
            if self._closing.is_set():
                raise _cancelled(work)
            self._start_threads()
            self._queue.extend((work, chunk) for chunk in chunks)
            # No more than may read: who wakes up for nothing costs a reader the interpreter's lock.
            self._queued.notify(min(len(chunks), max(self._readers - self._taken, 0)))

    def _start_threads(self) -> None:
        while len(self._threads) < self._readers + 1:
            thread = threading.Thread(
                target=self._run, name=f"{self._name}-{self._started}", daemon=True
            )
            self._started += 1
            self._threads.append(thread)
            thread.start()

    # -------------------------------------------------------------------------------- what it does

    def statistics(self) -> DeviceStatistics:
        now_ns = time.monotonic_ns()
        with self._lock:
            under_way = self._under_way
            return DeviceStatistics(
                readers=self._readers,
                chunk_bytes=self._chunk_bytes,
                read_bytes=self._read_bytes,
                reads=self._reads,
                failed=self._failed,
                busy_ns=self._busy_ns + (now_ns - self._busy_since_ns if under_way else 0),
                in_flight=len(under_way),
                waiting_ns=now_ns - next(iter(under_way.values())) if under_way else 0,
                packs=tuple(sorted({chunk.pack for chunk in under_way})),
            )

    def buffered(self) -> Iterable[str]:
        """The files that are read through the page cache."""
        with self._lock:
            return sorted(self._buffered)

    def alive(self) -> bool:
        """Whether every thread that should serve does. One that waits for its device does."""
        with self._lock:
            return all(thread.is_alive() for thread in self._threads)

    # ----------------------------------------------------------------------------------------- end

    def give_up(self) -> None:
        """Drop what is queued (ReadCancelled) and let the chunks in flight be the last."""
        with self._queued:
            self._closing.set()
            dropped = list(self._queue)
            self._queue.clear()
            self._queued.notify_all()
        for work, chunk in dropped:
            chunk.target.release()
            self._finish(work, _cancelled(work))

    def wait_ended(self, deadline_s: float) -> list[str]:
        """The names of the threads that have not ended at `deadline_s` of the monotonic clock."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return [thread.name for thread in threads if thread.is_alive()]

    # ------------------------------------------------------------------------------------- threads

    def _run(self) -> None:
        while (item := self._next()) is not None:
            work, chunk = item
            with chunk.target:
                error = self._serve(work, chunk)
            del item, chunk  # while this thread waits, it must not keep the target alive
            self._finish(work, error)

    def _next(self) -> tuple[_Work, Chunk] | None:
        """Wait for the next chunk; None when this thread is to end."""
        with self._queued:
            while True:
                if len(self._threads) > self._readers + 1:
                    self._threads.remove(threading.current_thread())
                    self._queued.notify()  # perhaps of a chunk that came meanwhile
                    return None
                if self._queue and self._taken < self._readers:
                    self._taken += 1
                    return self._queue.popleft()
                if self._closing.is_set():
                    return None
                self._queued.wait()

    def _serve(self, work: _Work, chunk: Chunk) -> ReadError | None:
        """The boundary of a reader thread: whatever happens in it becomes the job's outcome."""
        error: ReadError
        try:
            try:
                # A job that failed, or waits for bandwidth while we close, needs no more chunks.
                if work.error is not None:
                    return None
                if self._throttle and not self._throttle.wait(chunk.target.nbytes, self._closing):
                    return _cancelled(work)
                self._read(chunk)
            finally:
                with self._queued:
                    self._taken -= 1
                    if self._queue:
                        self._queued.notify()
            self._verify(work, chunk)
            return None
        except ReadError as failure:
            error = failure
        except Exception as failure:
            log.exception("reading %s at offset %d", chunk.name, chunk.offset)
            error = ReadError(f"{chunk.name} cannot be read: {failure!r}")
        error.__traceback__ = error.__context__ = None  # frames would keep the target alive
        return error

    def _read(self, chunk: Chunk) -> None:
        now_ns = time.monotonic_ns()
        with self._lock:
            if not self._under_way:
                self._busy_since_ns = now_ns
            self._under_way[chunk] = now_ns
        try:
            outcome = read_chunk(chunk, self._chunk_bytes)
        finally:
            with self._lock:
                del self._under_way[chunk]
                if not self._under_way:
                    self._busy_ns += time.monotonic_ns() - self._busy_since_ns
        if not outcome.direct:
            with self._lock:
                self._buffered.add(f"{chunk.pack}/{chunk.file}")
        if outcome.fell_back:
            log.warning("%s refuses O_DIRECT: it is read through the page cache", chunk.name)

    def _verify(self, work: _Work, chunk: Chunk) -> None:
        with self._verifying:
            verify_chunk(chunk, work.verified.announce)
        with self._lock:
            self._read_bytes += chunk.target.nbytes

    def _finish(self, work: _Work, error: ReadError | None) -> None:
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
            work.deliver(ReadResult(work.nbytes, time.monotonic_ns() - work.submitted_ns))
        work.verified.end(work.error)


def _cancelled(work: _Work) -> ReadCancelled:
    return ReadCancelled(
        f"layer {work.layer!r} of pack {work.pack!r} was not read: the daemon shuts down"
    )
