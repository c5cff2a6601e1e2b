"""The threads of one GPU: one that makes every call, one that waits for the copies (`copies`).

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

from tierd.gpu.copies import Copies, CopyJob, CopyResult, LayerCopy, Piece, given_up
from tierd.gpu.errors import DeviceError, GpuError
from tierd.gpu.span import chunks_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.gpu.device import Device, Pending

log = logging.getLogger(__name__)

SILENT_NS = 10_000_000_000  # a GPU that takes longer for one thing is said not to answer

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    copies: int
    copied_bytes: int  #: also of copies that failed later, or are under way
    failed: int  #: copies; those that were stopped do not count
    busy_ns: int  #: during which at least one piece of a copy was under way
    in_flight: int  #: copies of which a piece was started
    queued: int  #: copies that were not started yet
    waiting_ns: int  #: for how long the oldest call or piece has been under way


class GpuWorker:
    """Threads start with the first job. `submit`, `copy`, `stop` and what is asked do not block."""

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
        self._call_soon = call_soon_threadsafe
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._copies = Copies(self._changed, copies_in_flight, call_soon_threadsafe)
        # Everything below changes under this lock.
        self._calls: deque[Callable[[], None]] = deque()
        self._started: deque[tuple[Piece, Pending]] = deque()  # the oldest is waited for
        self._call_since_ns = 0  # of the call being made, 0 = none
        self._closing = False

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
        self._call_soon(done, given_up(self.device.number, "a call"))

    def copy(self, job: CopyJob, done: Callable[[CopyResult | GpuError], None]) -> LayerCopy:
        """Queue a copy. `done` is called once, when nothing touches the source any more."""
        refusal = None
        with self._changed:
            if self._closing:
                refusal = given_up(self.device.number, f"the copy of {job.name}")
            else:
                self._start_threads()
            copy = self._copies.add(job, done, refusal)
        self._copies.follow(copy)
        return copy

    def stop(self, copy: LayerCopy) -> None:
        """Let what is under way of it be the last; `done` gets CopyStopped, or what was first."""
        self._copies.stop(copy)

    # -------------------------------------------------------------------------------- what it does

    def statistics(self) -> WorkerStatistics:
        now_ns = time.monotonic_ns()
        with self._changed:
            copies = self._copies
            in_flight, queued = copies.counts()
            oldest_ns = copies.oldest_ns()
            since = [since for since in (self._call_since_ns, oldest_ns) if since]
            return WorkerStatistics(
                copies=copies.copied,
                copied_bytes=copies.copied_bytes,
                failed=copies.failed,
                busy_ns=copies.busy_ns,
                in_flight=in_flight,
                queued=queued,
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
            self._copies.give_up(lambda what: given_up(self.device.number, what))
            self._changed.notify_all()
            threads = list(self._threads)
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
            if isinstance(item, Piece):
                self._start(item)
            else:
                item()
            del item  # while this thread waits, it must not keep a source alive
            with self._changed:
                self._call_since_ns = 0
        self._outcome(lambda device: device.close())

    def _next(self) -> Callable[[], None] | Piece | None:
        with self._changed:
            while True:
                item = self._calls.popleft() if self._calls else self._copies.take()
                if item is not None:
                    self._call_since_ns = time.monotonic_ns()
                    return item
                if self._closing and not self._copies.under_way:
                    return None
                self._changed.wait()

    def _start(self, piece: Piece) -> None:
        copy, job = piece.copy, piece.copy.job

        def work(device: Device) -> Pending:
            if not copy.backed:
                first, count = chunks_of(job.offset, copy.nbytes, device.chunk_bytes)
                device.back(job.arena, first, count)
                copy.backed = True
            return device.copy(job.arena, job.offset + piece.start, piece.source)

        pending = self._outcome(work)
        if isinstance(pending, GpuError):
            self._copies.end(piece, pending)
            return
        with self._changed:
            self._started.append((piece, pending))
            self._changed.notify_all()

    def _wait_all(self) -> None:
        while (started := self._oldest()) is not None:
            piece, pending = started
            failure = self._outcome(lambda _, pending=pending: pending.wait())  # type: ignore[misc]
            del started, pending
            self._copies.end(piece, failure)
            del piece

    def _oldest(self) -> tuple[Piece, Pending] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._started or (self._closing and not self._copies.under_way)
            )
            return self._started.popleft() if self._started else None

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
