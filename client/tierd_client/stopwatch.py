"""How long a GPU takes for work that nobody waits for: the time between two marks in a stream."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_client.streams import Event, Streams


class Stopwatch:
    """Of one kind of work. Thread-safe.

    every: only one in so many is timed, as marks take time themselves; the others count as much.
    """

    def __init__(self, streams: Streams, every: int = 1) -> None:
        self._streams = streams
        self._every = every
        self._lock = threading.Lock()
        self._under_way: deque[tuple[Event, Event]] = deque()
        self._idle: list[tuple[Event, Event]] = []
        self._count = 0
        self._timed = 0
        self._ns = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts and times what this thread gives its stream inside. Not if it raises."""
        self._collect()
        timed = self._count % self._every == 0
        marks = self._marks() if timed else None
        if marks is not None:
            marks[0].record(self._streams.current())
        yield
        if marks is not None:
            marks[1].record(self._streams.current())
        with self._lock:
            self._count += 1
            if marks is not None:
                self._under_way.append(marks)

    def count(self, times: int) -> None:
        """So much was done in a way that cannot be timed."""
        with self._lock:
            self._count += times

    def totals(self) -> tuple[int, int]:
        """How often, and the nanoseconds of those that the GPU is through with."""
        self._collect()
        with self._lock:
            through = self._count
            if self._every == 1:
                return through, self._ns
            return through, self._ns * through // self._timed if self._timed else 0

    def _marks(self) -> tuple[Event, Event]:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._streams.event(), self._streams.event()

    def _collect(self) -> None:
        """Look at what the GPU is through with; the others stay."""
        with self._lock:
            while self._under_way and self._under_way[0][1].query():
                begin, end = marks = self._under_way.popleft()
                self._ns += round(begin.elapsed_time(end) * 1e6)
                self._timed += 1
                self._idle.append(marks)
