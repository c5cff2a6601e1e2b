"""The copies of one GPU: what of each may be moved already, what is under way, when it is over.

A copy moves in *pieces*. That of a layer which is in DRAM is one piece. Of a layer that is still
being read there are as many as it takes: what was verified since the last one. A piece that may be
moved goes before others of later copies, and a copy that waits for its read holds nobody up.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.gpu.errors import CopyStopped, DeviceError, GpuError, SourceFailed
from tierd.gpu.ranges import Ranges, added

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from tierd.errors import ReadError
    from tierd.io.verified import VerifiedBlocks


@dataclass(frozen=True, slots=True, eq=False)
class CopyJob:
    """Put memory behind the range, and copy `source` there; it is released when that is over.

    verified: of the read that is filling the source; None: it is full.
    """

    arena: int
    offset: int  #: in the arena
    source: memoryview  #: host memory, in one piece
    name: str  #: the layer, for texts
    verified: VerifiedBlocks | None = None


@dataclass(frozen=True, slots=True)
class CopyResult:
    """duration_ns: from the call that started the first piece; so with copies that were before it,
    and the time that it waited for its read."""

    nbytes: int
    duration_ns: int


@dataclass(slots=True, eq=False)
class LayerCopy:
    """One job that was queued. Changes under the lock of its `Copies` only."""

    job: CopyJob
    done: Callable[[CopyResult | GpuError], None]
    nbytes: int
    left_bytes: int  #: not on the GPU yet
    whole: bool  #: all of the source is verified, and its reader is done with it
    ready: Ranges  #: of the source: may be moved, and is not under way
    under_way: int = 0  #: pieces
    started_ns: int = 0
    failure: GpuError | None = None  #: no further piece is started
    backed: bool = False  #: the device's thread put memory behind it


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Bytes [start, start + nbytes) of a copy's source, on their way since `started_ns`."""

    copy: LayerCopy
    start: int
    source: memoryview
    started_ns: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


class _Following:
    """A copy as a follower of the read of its source."""

    def __init__(self, copies: Copies, copy: LayerCopy) -> None:
        self._copies = copies
        self._copy = copy

    def verified(self, start: int, nbytes: int) -> None:
        self._copies.ready(self._copy, start, nbytes)

    def read_ended(self, failure: ReadError | None) -> None:
        self._copies.source_ended(self._copy, failure)


class Copies:
    """Thread-safe: every method takes the lock of `changed`, and wakes who waits there."""

    def __init__(
        self,
        changed: threading.Condition,
        limit: int,
        call_soon: Callable[..., object],
    ) -> None:
        """limit: pieces under way at once. call_soon: hands an outcome to the loop."""
        self._changed = changed
        self._limit = limit
        self._call_soon = call_soon
        self._copies: list[LayerCopy] = []  # those that are not over, the oldest first
        self._pieces: deque[Piece] = deque()  # under way, the oldest first
        self._busy_since_ns = 0
        #: Of what is over. Bytes: of all pieces that arrived, also those of copies that failed.
        self.copied = self.copied_bytes = self.failed = 0
        self._busy_ns = 0

    # ------------------------------------------------------------------------------- what is to be

    def add(
        self, job: CopyJob, done: Callable[[CopyResult | GpuError], None], refusal: GpuError | None
    ) -> LayerCopy:
        """Queue a copy, or answer it with the refusal. `done` is called once, on the loop, when
        nothing touches the source any more. `follow` comes next."""
        nbytes, full = job.source.nbytes, job.verified is None
        copy = LayerCopy(job, done, nbytes, nbytes, full, [(0, nbytes)] if full else [])
        with self._changed:
            self._copies.append(copy)
            if refusal is not None:
                self._fail(copy, refusal)
            self._changed.notify_all()
        return copy

    def follow(self, copy: LayerCopy) -> None:
        """Let the reader of its source say what may be moved. Called without the lock: a reader
        that tells of a block has its own, and wants this one."""
        if copy.job.verified is not None:
            copy.job.verified.follow(_Following(self, copy))

    def stop(self, copy: LayerCopy) -> None:
        """Start no further piece of it. It ends with CopyStopped, unless it is over first."""
        with self._changed:
            if copy in self._copies:
                self._fail(copy, CopyStopped(f"the copy of {copy.job.name} is not wanted any more"))

    def give_up(self, refusal: Callable[[str], GpuError]) -> None:
        """Let what is under way be the last; refusal: of a copy, by its name."""
        with self._changed:
            for copy in list(self._copies):
                if copy.ready or not copy.whole:
                    self._fail(copy, refusal(f"the copy of {copy.job.name}"))
            self._changed.notify_all()

    # ----------------------------------------------------------------------- by the source's reader

    def ready(self, copy: LayerCopy, start: int, nbytes: int) -> None:
        with self._changed:
            if copy.failure is None:
                copy.ready = added(copy.ready, start, start + nbytes)
                self._changed.notify_all()

    def source_ended(self, copy: LayerCopy, failure: ReadError | None) -> None:
        with self._changed:
            if failure is not None:
                self._fail(copy, SourceFailed(failure))
            else:
                copy.whole = True
                self._settle(copy)

    # ------------------------------------------------------------------------- by the GPU's threads

    def take(self) -> Piece | None:
        """A piece to be moved now, which is under way from here on. None: there is none."""
        with self._changed:
            if len(self._pieces) >= self._limit:
                return None
            for copy in self._copies:
                if copy.ready and copy.failure is None:
                    now_ns = time.monotonic_ns()
                    start, end = copy.ready.pop(0)
                    copy.started_ns = copy.started_ns or now_ns
                    copy.under_way += 1
                    if not self._pieces:
                        self._busy_since_ns = now_ns
                    piece = Piece(copy, start, copy.job.source[start:end], now_ns)
                    self._pieces.append(piece)
                    return piece
            return None

    def end(self, piece: Piece, failure: GpuError | None) -> None:
        """The piece is on the GPU, or will not be; nothing reads its source any more."""
        copy, nbytes = piece.copy, piece.nbytes
        piece.source.release()
        with self._changed:
            self._pieces.remove(piece)
            copy.under_way -= 1
            if not self._pieces:
                self._busy_ns += time.monotonic_ns() - self._busy_since_ns
            if failure is None:
                copy.left_bytes -= nbytes
                self.copied_bytes += nbytes
                self._settle(copy)
            else:
                self._fail(copy, failure)
            self._changed.notify_all()

    @property
    def under_way(self) -> int:
        """Pieces."""
        with self._changed:
            return len(self._pieces)

    # -------------------------------------------------------------------------------- what they did

    @property
    def busy_ns(self) -> int:
        """During which at least one piece was under way."""
        with self._changed:
            since = time.monotonic_ns() - self._busy_since_ns if self._pieces else 0
            return self._busy_ns + since

    def counts(self) -> tuple[int, int]:
        """Copies of which a piece was started, and those that wait for their first."""
        with self._changed:
            begun = sum(1 for copy in self._copies if copy.started_ns)
            return begun, len(self._copies) - begun

    def oldest_ns(self) -> int | None:
        """Since when the oldest piece is under way."""
        with self._changed:
            return self._pieces[0].started_ns if self._pieces else None

    # -------------------------------------------------------------------------------------- inside

    def _fail(self, copy: LayerCopy, failure: GpuError) -> None:
        copy.failure = copy.failure or failure
        copy.ready = []
        self._settle(copy)

    def _settle(self, copy: LayerCopy) -> None:
        """Answer it when nothing of it is under way, nor anything to come."""
        over = not copy.under_way and (copy.failure or (copy.whole and not copy.left_bytes))
        if not over or copy not in self._copies:
            return
        self._copies.remove(copy)
        copy.job.source.release()
        outcome: CopyResult | GpuError
        if copy.failure is None:
            self.copied += 1
            outcome = CopyResult(copy.nbytes, time.monotonic_ns() - copy.started_ns)
        else:
            self.failed += not isinstance(copy.failure, CopyStopped)
            outcome = copy.failure
        self._call_soon(copy.done, outcome)


def given_up(number: int, what: str) -> DeviceError:
    """That a GPU's worker is being closed."""
    return DeviceError(f"gpu:{number}: {what} was given up: the daemon shuts down")
