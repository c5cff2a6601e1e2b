"""The thread that has layers read from the SSD into GPUs, past DRAM (`io/cufile.py`).

One for all GPUs, and one layer at a time: cuFile counts for the whole process, and its counts are
what proves that a layer came straight.
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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tierd.gpu.device import Device
    from tierd.io.cufile import CuFileReader, DirectJob, DirectStatistics, FileId
    from tierd.io.ssd_job import ReadResult

    Work = Callable[[], ReadResult | None]
    Done = Callable[[ReadResult | TierdError | None], None]

log = logging.getLogger(__name__)


class DirectReads:
    """The thread starts with the first GPU. Every method but `close` returns at once."""

    def __init__(self, reader: CuFileReader, call_soon_threadsafe: Callable[..., object]) -> None:
        """call_soon_threadsafe: of the loop that every `done` is called on."""
        self._reader = reader
        self._call_soon = call_soon_threadsafe
        self._opened = False  # of the thread alone
        self._thread: threading.Thread | None = None
        self._queued = threading.Condition()
        # Everything below changes under this lock.
        self._queue: deque[tuple[str, Work, Done]] = deque()
        self._since_ns = 0  # of the work under way, 0 = none
        self._closing = False

    def open(self, device: Device, done: Callable[[TierdError | None], None]) -> None:
        """Find out whether this works on a GPU that is open. `done` gets GpuDirectUnavailable, or
        why the GPU refused."""

        def work() -> None:
            device.enter()
            if not self._opened:
                self._reader.open()
                self._opened = True

        def answered(outcome: ReadResult | TierdError | None) -> None:
            done(outcome if isinstance(outcome, TierdError) else None)

        self._submit(f"gpu_direct on gpu:{device.number}", work, answered)

    def read(
        self, device: Device, job: DirectJob, done: Callable[[ReadResult | TierdError], None]
    ) -> None:
        """Read and verify a layer; `done` is called once, when nothing writes into the GPU's memory
        any more."""

        def work() -> ReadResult:
            device.enter()
            return self._reader.read(job)

        def answered(outcome: ReadResult | TierdError | None) -> None:
            assert outcome is not None
            done(outcome)

        self._submit(f"the read of {job.name}", work, answered)

    def forget(self, files: Iterable[FileId]) -> None:
        """Their packs are closed. What was queued before is read before."""
        names = list(files)
        if self._thread is not None:
            self._submit("closing files", lambda: self._reader.forget(names), lambda _: None)

    def statistics(self) -> DirectStatistics:
        return self._reader.statistics()

    def silent(self) -> str | None:
        """That a read takes too long, and how long; None when none does."""
        with self._queued:
            waiting_ns = time.monotonic_ns() - self._since_ns if self._since_ns else 0
        if waiting_ns <= SILENT_NS:
            return None
        return (
            f"cuFile has not answered for {waiting_ns / 1e9:.0f} s: the layers that it should read "
            "into GPUs wait"
        )

    def alive(self) -> bool:
        return self._thread is None or self._thread.is_alive()

    def close(self, timeout_s: float = 10.0) -> None:
        """Give up what is queued (DeviceError), let the read under way end, close the library.

        Blocks. Raises TimeoutError when cuFile does not answer: then it may still write into a GPU.
        """
        with self._queued:
            self._closing = True
            dropped, self._queue = self._queue, deque()
            self._queued.notify()
            thread = self._thread
        for what, _, done in dropped:
            self._call_soon(done, _given_up(what))
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} did not end in {timeout_s} s")

    def _submit(self, what: str, work: Work, done: Done) -> None:
        with self._queued:
            if not self._closing:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._run, name="tierd-direct", daemon=True
                    )
                    self._thread.start()
                self._queue.append((what, work, done))
                self._queued.notify()
                return
        self._call_soon(done, _given_up(what))

    def _run(self) -> None:
        while (item := self._next()) is not None:
            what, work, done = item
            self._call_soon(done, _outcome(what, work))
            del item, work, done
            with self._queued:
                self._since_ns = 0
        if self._opened:
            _outcome("closing cuFile", self._reader.close)

    def _next(self) -> tuple[str, Work, Done] | None:
        with self._queued:
            self._queued.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            self._since_ns = time.monotonic_ns()
            return self._queue.popleft()


def _outcome(what: str, work: Work) -> ReadResult | TierdError | None:
    """The boundary of the thread: whatever happens in it becomes an outcome."""
    try:
        return work()
    except TierdError as failure:
        failure.__traceback__ = failure.__context__ = None
        return failure
    except Exception as failure:
        log.exception("%s", what)
        return DeviceError(f"{what}: {failure!r}")


def _given_up(what: str) -> DeviceError:
    return DeviceError(f"{what} was given up: the daemon shuts down")
