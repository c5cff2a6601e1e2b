"""The threads of one GPU: one that makes every call, one that waits for the copies.

Two, because a copy engine idles between two copies unless the next one is started before the first
has ended; and because a client that waits for an export must not wait for copies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tierd.gpu.errors import DeviceError, GpuError
from tierd.gpu.span import chunks_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.gpu.device import Device, Pending

log = logging.getLogger(__name__)

SILENT_NS = 10_000_000_000  # a GPU that takes longer for one thing is said not to answer

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True, eq=False)
class CopyJob:
    """Put memory behind the range, and copy `source` there. The worker releases `source`."""

    arena: int
    offset: int  #: in the arena
    source: memoryview  #: host memory, in one piece
    name: str  #: the layer, for texts


@dataclass(frozen=True, slots=True)
class CopyResult:
    """duration_ns: from the call that started the copy; so with copies that were before it."""

    nbytes: int
    duration_ns: int


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    copies: int
    copied_bytes: int
    failed: int  #: copies
    busy_ns: int  #: during which at least one copy was under way
    in_flight: int  #: copies that were started
    queued: int  #: copies that were not started yet
    waiting_ns: int  #: for how long the oldest call or copy has been under way


@dataclass(slots=True, eq=False)
class _Copy:
    job: CopyJob
    done: Callable[[CopyResult | GpuError], None]
    started_ns: int = 0
    pending: Pending | None = None


class GpuWorker:
    """Threads start with the first job. `submit`, `copy` and what is asked do not block."""

    def __init__(
        self,
        device: Device,
        copies_in_flight: int,
        call_soon_threadsafe: Callable[..., object],
    ) -> None:
        """call_soon_threadsafe: of the loop that every `done` is called on."""
        if copies_in_flight < 1:
            raise ValueError(f"at least 1 copy in flight, not {copies_in_flight}")
        self.device = device
        self._limit = copies_in_flight
        self._call_soon = call_soon_threadsafe
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        # Everything below changes under this lock.
        self._calls: deque[Callable[[], None]] = deque()
        self._copies: deque[_Copy] = deque()
        self._started: deque[_Copy] = deque()  # the oldest is waited for
        self._starting = 0
        self._call_since_ns = 0  # of the call being made, 0 = none
        self._closing = False
        self._copied = self._copied_bytes = self._failed = 0
        self._busy_ns = self._busy_since_ns = 0

    # ---------------------------------------------------------------------------------------- jobs

    def submit(
        self, work: Callable[[Device], Outcome], done: Callable[[Outcome | GpuError], None]
    ) -> None:
        """Do `work` on the device's thread, in order, before copies that were not started yet.

        `done` gets what it returned, or the GpuError that it raised. After `close`: DeviceError.
        """

        def call() -> None:
            self._call_soon(done, self._outcome(work))

        with self._changed:
            if not self._closing:
                self._start_threads()
                self._calls.append(call)
                self._changed.notify_all()
                return
        self._call_soon(done, self._closed("a call"))

    def copy(self, job: CopyJob, done: Callable[[CopyResult | GpuError], None]) -> None:
        """Queue a copy. `done` is called once, when nothing touches the source any more."""
        with self._changed:
            if not self._closing:
                self._start_threads()
                self._copies.append(_Copy(job, done))
                self._changed.notify_all()
                return
        job.source.release()
        self._call_soon(done, self._closed(f"the copy of {job.name}"))

    # -------------------------------------------------------------------------------- what it does

    def statistics(self) -> WorkerStatistics:
        now_ns = time.monotonic_ns()
        with self._changed:
            in_flight = self._in_flight
            since = [self._call_since_ns] if self._call_since_ns else []
            since += [self._started[0].started_ns] if self._started else []
            return WorkerStatistics(
                copies=self._copied,
                copied_bytes=self._copied_bytes,
                failed=self._failed,
                busy_ns=self._busy_ns + (now_ns - self._busy_since_ns if in_flight else 0),
                in_flight=in_flight,
                queued=len(self._copies),
                waiting_ns=now_ns - min(since) if since else 0,
            )

    def silent(self) -> str | None:
        """That the GPU does not answer, and for how long; None when it does."""
        waiting_ns = self.statistics().waiting_ns
        if waiting_ns <= SILENT_NS:
            return None
        return (
            f"gpu:{self.device.number} ({self.device.kind}) has not answered for "
            f"{waiting_ns / 1e9:.0f} s: its layers wait, other tiers are served"
        )

    def alive(self) -> bool:
        """Whether every thread that should serve does. One that waits for its GPU does."""
        with self._changed:
            return all(thread.is_alive() for thread in self._threads)

    # ----------------------------------------------------------------------------------------- end

    def close(self, timeout_s: float = 10.0) -> None:
        """Give up copies that are queued (DeviceError), make the calls that are, let the copies in
        flight end, close the device.

        Blocks. Outcomes are on the loop when this returns. Raises TimeoutError when the GPU does
        not answer: then a copy may still read its source.
        """
        with self._changed:
            self._closing = True
            dropped = list(self._copies)
            self._copies.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        for copy in dropped:
            copy.job.source.release()
            self._call_soon(copy.done, self._closed(f"the copy of {copy.job.name}"))
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if stuck := [thread.name for thread in threads if thread.is_alive()]:
            raise TimeoutError(f"{', '.join(stuck)} did not end in {timeout_s} s")

    # ------------------------------------------------------------------------------------- threads

    def _start_threads(self) -> None:
        if self._threads:
            return
        name = f"tierd-gpu{self.device.number}"
        for target, suffix in ((self._call_all, ""), (self._wait_all, "-wait")):
            thread = threading.Thread(target=target, name=name + suffix, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _call_all(self) -> None:
        """The device's own thread."""
        while (item := self._next()) is not None:
            if isinstance(item, _Copy):
                self._start_copy(item)
            else:
                item()
            del item  # while this thread waits, it must not keep a source alive
            with self._changed:
                self._call_since_ns = 0
        self._outcome(lambda device: device.close())

    def _next(self) -> Callable[[], None] | _Copy | None:
        with self._changed:
            while True:
                if self._calls:
                    self._call_since_ns = time.monotonic_ns()
                    return self._calls.popleft()
                if self._copies and self._in_flight < self._limit:
                    self._call_since_ns = time.monotonic_ns()
                    if not self._in_flight:
                        self._busy_since_ns = self._call_since_ns
                    self._starting = 1
                    return self._copies.popleft()
                if self._closing and not self._in_flight:
                    return None
                self._changed.wait()

    @property
    def _in_flight(self) -> int:
        return self._starting + len(self._started)

    def _start_copy(self, copy: _Copy) -> None:
        job = copy.job

        def work(device: Device) -> Pending:
            first, count = chunks_of(job.offset, job.source.nbytes, device.chunk_bytes)
            device.back(job.arena, first, count)
            copy.started_ns = time.monotonic_ns()
            return device.copy(job.arena, job.offset, job.source)

        pending = self._outcome(work)
        with self._changed:
            if not isinstance(pending, GpuError):
                self._starting = 0
                copy.pending = pending
                self._started.append(copy)
                self._changed.notify_all()
                return
        self._finish(copy, pending)

    def _wait_all(self) -> None:
        while (copy := self._oldest()) is not None:
            self._finish(copy, self._wait(copy))
            del copy

    def _wait(self, copy: _Copy) -> GpuError | None:
        pending, copy.pending = copy.pending, None
        assert pending is not None
        return self._outcome(lambda _: pending.wait())

    def _oldest(self) -> _Copy | None:
        with self._changed:
            self._changed.wait_for(lambda: self._started or (self._closing and not self._in_flight))
            return self._started[0] if self._started else None

    def _finish(self, copy: _Copy, failure: GpuError | None) -> None:
        nbytes = copy.job.source.nbytes
        copy.job.source.release()
        now_ns = time.monotonic_ns()
        with self._changed:
            if self._started and self._started[0] is copy:
                self._started.popleft()
            else:
                self._starting = 0
            if failure is None:
                self._copied += 1
                self._copied_bytes += nbytes
            else:
                self._failed += 1
            if not self._in_flight:
                self._busy_ns += now_ns - self._busy_since_ns
            self._changed.notify_all()
        self._call_soon(copy.done, failure or CopyResult(nbytes, now_ns - copy.started_ns))

    def _outcome(self, work: Callable[[Device], Outcome]) -> Outcome | GpuError:
        """The boundary of the threads: whatever happens in them becomes an outcome."""
        error: GpuError
        try:
            return work(self.device)
        except GpuError as failure:
            error = failure
        except Exception as failure:
            log.exception("gpu:%d (%s)", self.device.number, self.device.kind)
            error = DeviceError(f"gpu:{self.device.number}: {failure!r}")
        error.__traceback__ = error.__context__ = None  # frames would keep a source alive
        return error

    def _closed(self, what: str) -> DeviceError:
        return DeviceError(f"gpu:{self.device.number}: {what} was given up: the daemon shuts down")
