"""How fast a device is: a few direct reads of the packs' own files, once, at start.

Bounded in time and bytes, and it stops as soon as somebody needs the device. What it finds is a
first guess that real reads correct (`tierd.core.cost`).
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.cost import MIB, SECOND_NS, Sample
from tierd.io.throttle import TokenBucket
from tierd_layouts.records import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LONGEST_NS = 300_000_000
MOST_BYTES = 256 * MIB
BUFFER_BYTES = 16 * MIB
POINT_SHARE = 6  #: one point takes a sixth of the time at most: slow devices get several too

#: (chunk, reads at once, reads): what says most comes first, for the devices where time runs out.
POINTS = (
    (4 * MIB, 1, 6),
    (MIB, 1, 8),
    (4 * MIB, 4, 16),
    (2 * MIB, 8, 24),
    (256 << 10, 1, 8),
    (4 * MIB, 2, 8),
    (MIB, 8, 16),
)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Without samples `reason` says why there are none."""

    samples: tuple[Sample, ...]
    read_bytes: int
    duration_ns: int
    reason: str = ""


class Probe:
    """Measures the device below some open files. `run` blocks: it belongs to a thread that nobody
    has to wait for, because a device may never answer."""

    def __init__(
        self,
        fds: Sequence[int],
        go_on: Callable[[], bool],
        limit_bytes_per_s: int | None = None,
        longest_ns: int = LONGEST_NS,
    ) -> None:
        """fds: files on one device, opened with O_DIRECT. They are opened again, so they may be
        closed meanwhile. go_on: asked before every read, in any thread. Raises OSError."""
        self._go_on = go_on
        self._limit = limit_bytes_per_s
        self._longest_ns = longest_ns
        self._files: list[tuple[int, int]] = []
        self._read_bytes = 0
        self._lock = threading.Lock()
        self._deadline_ns = 0
        with contextlib.ExitStack() as undo:
            for fd in fds:
                if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                    undo.callback(os.close, again)
                    self._files.append((again, os.fstat(again).st_size))
            self._close = undo.pop_all()

    def run(self) -> ProbeResult:
        """Reads, and closes the files."""
        begin_ns = time.monotonic_ns()
        self._deadline_ns = begin_ns + self._longest_ns
        try:
            samples, reason = self._measure()
        except OSError as error:
            samples, reason = [], f"a read failed: {error}"
        finally:
            self._close.close()
        duration_ns = time.monotonic_ns() - begin_ns
        return ProbeResult(tuple(samples), self._read_bytes, duration_ns, reason)

    def _measure(self) -> tuple[list[Sample], str]:
        if not self._files:
            return [], "its file system refuses O_DIRECT"
        samples: list[Sample] = []
        size = sum(nbytes for _, nbytes in self._files)
        if all(chunk * reads > size for chunk, _, reads in POINTS):
            return [], "its packs are too small to measure it"
        bucket = None
        if self._limit is not None:
            bucket = TokenBucket(self._limit, 4 * MIB, at_ns=time.monotonic_ns())
        with _buffer() as memory, ThreadPoolExecutor(max(depth for _, depth, _ in POINTS)) as pool:
            for chunk, depth, reads in POINTS:
                if bucket is not None and depth > 1:
                    continue  # held back, they would not run at once
                if chunk * reads > size:
                    continue
                if self._read_bytes + chunk * reads > MOST_BYTES or not self._may_go_on():
                    break
                sample = self._point(pool, memory, chunk, depth, reads, bucket)
                if sample is not None:
                    samples.append(sample)
        if samples:
            return samples, ""
        if not self._go_on():
            return [], "clients needed it first"
        return [], f"it did not read enough in {self._longest_ns // 1_000_000} ms"

    def _may_go_on(self) -> bool:
        return time.monotonic_ns() < self._deadline_ns and self._go_on()

    def _point(
        self,
        pool: ThreadPoolExecutor,
        memory: memoryview,
        chunk: int,
        depth: int,
        reads: int,
        bucket: TokenBucket | None,
    ) -> Sample | None:
        """None if it was ended too early to say anything."""
        places = itertools.islice(self._places(chunk), reads)
        until_ns = min(time.monotonic_ns() + self._longest_ns // POINT_SHARE, self._deadline_ns)

        def work(number: int) -> tuple[int, int]:
            """(bytes, ns spent in reads) of one thread."""
            done = spent_ns = 0
            # Released also when a read fails: its frames would keep the buffer from being closed.
            with memory[number * chunk : (number + 1) * chunk] as target:
                while time.monotonic_ns() < until_ns and self._go_on():
                    with self._lock:
                        place = next(places, None)
                    if place is None:
                        break
                    if bucket is not None:
                        wait_ns = bucket.take(chunk, at_ns=time.monotonic_ns())
                        if time.monotonic_ns() + wait_ns >= until_ns:
                            break
                        time.sleep(wait_ns / SECOND_NS)
                    begin_ns = time.monotonic_ns()
                    got = os.preadv(place[0], [target], place[1])
                    spent_ns += time.monotonic_ns() - begin_ns
                    done += got
            return done, spent_ns

        begin_ns = time.monotonic_ns()
        parts = list(pool.map(work, range(depth)))
        wall_ns = time.monotonic_ns() - begin_ns
        nbytes = sum(done for done, _ in parts)
        self._read_bytes += nbytes
        if nbytes < (max(2, depth) if bucket is None else 1) * chunk:
            return None
        spent_ns = wall_ns if bucket is None else parts[0][1]
        return Sample(chunk, depth, nbytes * SECOND_NS // max(spent_ns, 1))

    def _places(self, chunk: int) -> Iterator[tuple[int, int]]:
        """(descriptor, offset) of whole chunks, each point beginning where the last one ended, so
        that no cache of the device has them yet."""
        places = [
            (fd, offset)
            for fd, nbytes in self._files
            for offset in range(0, nbytes - chunk + 1, chunk)
        ]
        start = self._read_bytes // chunk
        for number in range(len(places)):
            yield places[(start + number) % len(places)]


@contextlib.contextmanager
def _buffer() -> Iterator[memoryview]:
    """Memory to read into: of 2 MiB pages where the system has them, as the arenas are, and there
    before the first read."""
    with mmap.mmap(-1, BUFFER_BYTES) as mapping:
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
        with memoryview(mapping) as memory:
            memory[::PAGE_BYTES] = bytes(BUFFER_BYTES // PAGE_BYTES)
            yield memory
