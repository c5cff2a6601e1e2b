"""A device is timed by its own events, over graphs, its sides taking turns: on a card that is
played."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tierd_tools.device_clock import WARMUP, CudaClock, HostClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Card:
    """Plays torch.cuda: work takes time only when its queue is waited for, a call a millisecond."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.now_ms = 0.0
        self.capturing: Graph | None = None
        self.said: list[str] = []

    def work(self, name: str, ms: float) -> None:
        def run() -> None:
            self.now_ms += ms
            self.said.append(name)

        if self.capturing is not None:
            self.capturing.work.append(run)
        else:
            self.queue.append(run)

    def synchronize(self) -> None:
        for run in self.queue:
            run()
        self.queue.clear()

    def _sleep(self, cycles: int) -> None:
        self.work("sleep", cycles / 1e6)

    def Stream(self) -> Side:  # as torch names it
        return Side()

    def current_stream(self) -> Side:
        return Side()

    @contextmanager
    def stream(self, stream: Side) -> Iterator[None]:
        yield

    def CUDAGraph(self) -> Graph:  # as torch names it
        return Graph(self)

    @contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None

    def Event(self, enable_timing: bool) -> Event:  # as torch names it
        assert enable_timing
        return Event(self)


class Side:
    def wait_stream(self, other: Side) -> None:
        pass


class Graph:
    def __init__(self, card: Card) -> None:
        self.card = card
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        self.card.queue.extend(self.work)


class Event:
    def __init__(self, card: Card) -> None:
        self.card = card
        self.at_ms = 0.0

    def record(self) -> None:
        def note() -> None:
            self.at_ms = self.card.now_ms

        self.card.queue.append(note)

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


def test_each_side_has_the_median_of_the_cards_own_time() -> None:
    card = Card()
    calls = {"ours": 0, "theirs": 0}

    def ours() -> None:
        calls["ours"] += 1
        card.work("ours", 2.0)
        card.work("ours", 3.0)

    def theirs() -> None:
        calls["theirs"] += 1
        card.work("theirs", 7.0)

    seconds = CudaClock(card).interleaved({"ours": ours, "theirs": theirs}, rounds=4)
    assert seconds == pytest.approx({"ours": 0.005, "theirs": 0.007})
    assert calls == {"ours": 3, "theirs": 3}  # twice to warm up, once captured; then replayed


def test_sides_take_turns_behind_other_work_and_nobody_waits_in_between() -> None:
    card = Card()
    CudaClock(card).interleaved(
        {"a": lambda: card.work("a", 1.0), "b": lambda: card.work("b", 1.0)}, rounds=2
    )
    after = card.said[card.said.index("sleep") + 1 :]
    assert after == ["a", "b"] * (WARMUP + 2)


def test_on_the_host_one_round_is_enough() -> None:
    calls = []
    found = HostClock().interleaved({"a": lambda: calls.append("a")}, rounds=21)
    assert calls == ["a"]
    assert found["a"] > 0
