"""What is asked of torch.cuda about the order and the time of work on one GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


class Event(Protocol):
    """A mark in a stream."""

    def record(self, stream: Any) -> None:
        """Set it behind all that the stream was given to do."""

    def query(self) -> bool:
        """Whether the GPU is through with it. Does not wait."""

    def synchronize(self) -> None:
        """Wait until it is."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to a later mark; both have passed."""


class Graph(Protocol):
    """Work of a GPU that was captured."""

    def replay(self) -> None:
        """Give it to this thread's stream."""


class Streams(Protocol):
    """The streams of one GPU. The real one is `CudaStreams`; tests have one without a GPU."""

    def current(self) -> Any:
        """The stream that this thread gives its work to; it has `wait_event`."""

    def event(self) -> Event:
        """A new mark that knows its time."""

    def aside(self) -> AbstractContextManager[Any]:
        """Inside, this thread gives its work to another stream, the same one for all threads."""

    def captured(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        """What this thread gives the GPU in `run`, as a graph, and what `run` returned: that is
        filled in by each replay. Nothing is done before. Waits for the GPU."""

    def cells(self, count: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two int64 [count] of `value`: on the GPU, and on the host where a copy from there makes
        nobody wait."""


class CudaStreams:
    """Those of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._aside: Any = None

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def event(self) -> Event:
        make: Callable[..., Event] = torch.cuda.Event
        return make(enable_timing=True)

    def aside(self) -> AbstractContextManager[Any]:
        if self._aside is None:
            make: Callable[..., Any] = torch.cuda.Stream
            self._aside = make(self._device)
        found: AbstractContextManager[Any] = torch.cuda.stream(self._aside)
        return found

    def captured(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: they look whether events have passed, and allocate.
        capture: Any = torch.cuda.graph(graph, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            result = run()
        return graph, result

    def cells(self, count: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode(False):
            there = torch.full((count,), value, dtype=torch.int64, device=self._device)
            here = torch.full((count,), value, dtype=torch.int64, pin_memory=True)
        return there, here
