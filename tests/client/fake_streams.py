"""Streams of a GPU that is the host: what they are given is done at once, marks pass when told."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tests.client.fake_graph import FakeGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class FakeStream:
    """Notes what it has to wait for, and what the marks were set behind then."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[FakeEvent] = []
        self.waited_ms: list[float | None] = []

    def wait_event(self, event: FakeEvent) -> None:
        self.waited.append(event)
        self.waited_ms.append(event.at_ms)


class FakeEvent:
    """Each mark is one millisecond after the one before it."""

    def __init__(self, streams: FakeStreams) -> None:
        self._streams = streams
        self.at_ms: float | None = None
        self.stream: Any = None
        self.synchronized = 0

    def record(self, stream: Any) -> None:
        self._streams.check()
        self._streams.now_ms += 1
        self.at_ms, self.stream = self._streams.now_ms, stream

    def query(self) -> bool:
        self._streams.check()
        assert self.at_ms is not None, "never recorded"
        return self.at_ms <= self._streams.passed_ms

    def synchronize(self) -> None:
        self._streams.check()
        self.synchronized += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query()
        assert end.query(), "torch raises where a mark has not passed"
        assert self.at_ms is not None
        assert end.at_ms is not None
        return end.at_ms - self.at_ms


class FakeStreams:
    """passed_ms: marks up to then have passed; those after it wait."""

    def __init__(self, passed_ms: float = float("inf")) -> None:
        self.now_ms = 0.0
        self.passed_ms = passed_ms
        self.events: list[FakeEvent] = []
        self._local = threading.local()
        self._default = FakeStream("default")
        self.side = FakeStream("side")

    def use(self, stream: FakeStream) -> None:
        """This thread's work goes to `stream` from now on."""
        self._local.stream = stream

    def current(self) -> FakeStream:
        found: FakeStream = getattr(self._local, "stream", self._default)
        return found

    def event(self) -> FakeEvent:
        self.events.append(FakeEvent(self))
        return self.events[-1]

    def captured(self, run: Callable[[], Any]) -> tuple[FakeGraph, Any]:
        graph = FakeGraph()
        self._local.capturing = True
        try:
            result = graph.capture(run)
        finally:
            self._local.capturing = False
        return graph, result

    def check(self) -> None:
        """CUDA refuses marks of outside to who captures, and what it captures to everybody."""
        if getattr(self._local, "capturing", False):
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextmanager
    def aside(self) -> Iterator[None]:
        before = self.current()
        self.use(self.side)
        try:
            yield
        finally:
            self.use(before)

    def cells(self, count: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
        there, here = (torch.full((count,), value, dtype=torch.int64) for _ in range(2))
        return there, here
