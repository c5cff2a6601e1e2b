"""How long a device takes for each of several things that take turns; the host is not measured.

On a GPU each side is captured into a graph once, and its replays are timed between two events of
the stream. Everything is given to the GPU while it is still busy with something else: so neither
the launching of kernels nor the host's own work is in a figure.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from tierd_tools import benchmark

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Sides = Mapping[str, Callable[[], object]]

ROUNDS: Final = 21
WARMUP: Final = 3
AHEAD_CYCLES: Final = 40_000_000
"""Of the GPU, about 20 ms: the time in which the host gives it all rounds."""


class Clock(Protocol):
    def interleaved(self, sides: Sides, rounds: int = ROUNDS) -> dict[str, float]:
        """Median seconds of each side, which take turns."""
        ...


class HostClock:
    """Of the host, one round: where an interpreter plays the GPU, and no figure counts."""

    def interleaved(self, sides: Sides, rounds: int = ROUNDS) -> dict[str, float]:
        return benchmark.interleaved(dict(sides), rounds=1, warmup=0)


class CudaClock:
    """Of the current GPU. cuda: what is asked of torch.cuda (tests play it)."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda

    def interleaved(self, sides: Sides, rounds: int = ROUNDS) -> dict[str, float]:
        replays = {name: self._captured(call) for name, call in sides.items()}
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in sides}
        self._cuda._sleep(AHEAD_CYCLES)
        for number in range(WARMUP + rounds):
            for name, replay in replays.items():
                begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replay()
                end.record()
                if number >= WARMUP:
                    marks[name].append((begin, end))
        self._cuda.synchronize()
        return {
            name: statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
            for name, pairs in marks.items()
        }

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a graph. What it compiles and allocates at first, it does before."""
        aside = self._cuda.Stream()
        aside.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(aside):
            call()
            call()
        self._cuda.current_stream().wait_stream(aside)
        self._cuda.synchronize()
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            call()
        replay: Callable[[], object] = graph.replay
        return replay
