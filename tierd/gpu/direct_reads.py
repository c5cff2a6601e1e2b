"""The threads that have layers read from the SSD into GPUs, past DRAM (`io/cufile.py`).

One reads, for all GPUs and one layer at a time: cuFile counts for the whole process, and its counts
are what proves that a layer came straight. The other verifies a layer while the next one is read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from tierd.errors import TierdError
from tierd.gpu.errors import DeviceError
from tierd.gpu.worker import SILENT_NS
from tierd.io.ssd_job import ReadResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tierd.gpu.device import Device
    from tierd.io.cufile import CuFileReader, DirectJob, DirectStatistics, FileId

    Work = Callable[[], None]
    Done = Callable[[TierdError | None], object]

log = logging.getLogger(__name__)


class DirectReads:
    """Threads start with the first GPU. Every method but `close` returns at once."""

    def __init__(self, reader: CuFileReader, call_soon_threadsafe: Callable[..., object]) -> None:
        """call_soon_threadsafe: of the loop that every `done` is called on."""
        self._reader = reader
        self._call_soon = call_soon_threadsafe
        self._opened = False  # of the reading thread alone
        self._reading = _Stage("tierd-direct", last=self._close_reader)
        self._verifying = _Stage("tierd-direct-verify")

    def open(self, device: Device, done: Callable[[TierdError | None], None]) -> None:
        """Find out whether this works on a GPU that is open. `done` gets GpuDirectUnavailable, or
        why the GPU refused."""

        def work() -> None:
            device.enter()
            if not self._opened:
                self._reader.open()
                self._opened = True

        what = f"gpu_direct on gpu:{device.number}"
        self._reading.submit(what, work, lambda failure: self._call_soon(done, failure))

    def read(
        self, device: Device, job: DirectJob, done: Callable[[ReadResult | TierdError], None]
    ) -> None:
        """Read and verify a layer; `done` is called once, when nothing writes into the GPU's memory
        any more."""
        begin_ns = time.monotonic_ns()

        def work() -> None:
            device.enter()
            self._reader.read(job)

        def was_read(failure: TierdError | None) -> None:
            if failure is not None:
                self._call_soon(done, failure)
                return
            what = f"the checksum of {job.name}"
            self._verifying.submit(what, lambda: self._reader.verify(job), was_verified)

        def was_verified(failure: TierdError | None) -> None:
            took_ns = time.monotonic_ns() - begin_ns
            self._call_soon(done, failure or ReadResult(job.nbytes, took_ns))

        self._reading.submit(f"the read of {job.name}", work, was_read)

    def forget(self, files: Iterable[FileId]) -> None:
        """Their packs are closed. What was queued before is read before."""
        names = list(files)
        if self._reading.started:
            self._reading.submit(
                "closing files", lambda: self._reader.forget(names), lambda _: None
            )

    def statistics(self) -> DirectStatistics:
        return self._reader.statistics()

    def silent(self) -> str | None:
        """That a layer takes too long, and how long; None when none does."""
        waiting_ns = max(self._reading.waiting_ns, self._verifying.waiting_ns)
        if waiting_ns <= SILENT_NS:
            return None
        return (
            f"cuFile has not answered for {waiting_ns / 1e9:.0f} s: the layers that it should read "
            "into GPUs wait"
        )

    def alive(self) -> bool:
        return self._reading.alive() and self._verifying.alive()

    def close(self, timeout_s: float = 10.0) -> None:
        """Give up what is queued (DeviceError), let what is under way end, close the library.

        Blocks. Raises TimeoutError when cuFile does not answer: then it may still write into a GPU.
        """
        deadline_s = time.monotonic() + timeout_s
        for stage in (self._reading, self._verifying):
            stage.give_up()
        for stage in (self._reading, self._verifying):
            stage.join(deadline_s)

    def _close_reader(self) -> None:
        if self._opened:
            self._reader.close()


class _Stage:
    """One thread, and what it has to do, in order. `done` is called in it, or by `give_up`."""

    def __init__(self, name: str, last: Work | None = None) -> None:
        """last: done at the end, if the thread ever started."""
        self._name = name
        self._last = last
        self._thread: threading.Thread | None = None
        self._queued = threading.Condition()
        # Everything below changes under this lock.
        self._queue: deque[tuple[str, Work, Done]] = deque()
        self._since_ns = 0  # of the work under way, 0 = none
        self._closing = False

    @property
    def started(self) -> bool:
        return self._thread is not None

    @property
    def waiting_ns(self) -> int:
        """For how long the work under way has been."""
        with self._queued:
            return time.monotonic_ns() - self._since_ns if self._since_ns else 0

    def alive(self) -> bool:
        return self._thread is None or self._thread.is_alive()

    def submit(self, what: str, work: Work, done: Done) -> None:
        """After `give_up`: DeviceError."""
        with self._queued:
            if not self._closing:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    self._thread.start()
                self._queue.append((what, work, done))
                self._queued.notify()
                return
        done(_given_up(what))

    def give_up(self) -> None:
        """Begin nothing any more."""
        with self._queued:
            self._closing = True
            dropped, self._queue = self._queue, deque()
            self._queued.notify()
        for what, _, done in dropped:
            done(_given_up(what))

    def join(self, deadline_s: float) -> None:
        """After `give_up`. deadline_s: of the monotonic clock. Raises TimeoutError."""
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} did not end in time")

    def _run(self) -> None:
        while (item := self._next()) is not None:
            what, work, done = item
            done(_outcome(what, work))
            del item, work, done
            with self._queued:
                self._since_ns = 0
        if self._last is not None:
            _outcome(f"the end of {self._name}", self._last)

    def _next(self) -> tuple[str, Work, Done] | None:
        with self._queued:
            self._queued.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            self._since_ns = time.monotonic_ns()
            return self._queue.popleft()


def _outcome(what: str, work: Work) -> TierdError | None:
    """The boundary of a thread: whatever happens in it becomes an outcome."""
    try:
        work()
    except TierdError as failure:
        failure.__traceback__ = failure.__context__ = None
        return failure
    except Exception as failure:
        log.exception("%s", what)
        return DeviceError(f"{what}: {failure!r}")
    return None


def _given_up(what: str) -> DeviceError:
    return DeviceError(f"{what} was given up: the daemon shuts down")
