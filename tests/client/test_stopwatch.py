from __future__ import annotations

import pytest

from tests.client.fake_streams import FakeStreams
from tierd_client.stopwatch import Stopwatch


def run(watch: Stopwatch, times: int) -> None:
    for _ in range(times):
        with watch.running():
            pass


def test_the_time_is_between_two_marks_and_counts_when_they_have_passed() -> None:
    streams = FakeStreams(passed_ms=0)
    watch = Stopwatch(streams)
    run(watch, 3)
    assert watch.totals() == (3, 0), "they are still under way"
    streams.passed_ms = 4
    assert watch.totals() == (3, 2_000_000)
    streams.passed_ms = 100
    assert watch.totals() == (3, 3_000_000)
    assert watch.totals() == (3, 3_000_000)


def test_marks_that_have_passed_are_used_again_and_no_others() -> None:
    streams = FakeStreams()
    watch = Stopwatch(streams)
    run(watch, 10)
    assert len(streams.events) == 2
    streams.passed_ms = streams.now_ms
    run(watch, 4)
    assert len(streams.events) == 2 + 2 * 4 - 2


def test_those_that_are_not_timed_are_taken_to_be_like_the_others() -> None:
    streams = FakeStreams(passed_ms=0)
    watch = Stopwatch(streams, every=4)
    assert watch.totals() == (0, 0)
    run(watch, 6)
    assert len(streams.events) == 2 * 2
    assert watch.totals() == (6, 0)
    streams.passed_ms = 100
    assert watch.totals() == (6, 6_000_000)


def test_what_cannot_be_timed_is_counted() -> None:
    watch = Stopwatch(FakeStreams(), every=4)
    run(watch, 1)
    watch.count(3)
    assert watch.totals() == (4, 4_000_000)


def test_what_fails_is_not_counted() -> None:
    watch = Stopwatch(FakeStreams())
    with pytest.raises(ZeroDivisionError), watch.running():
        _ = 1 / 0
    assert watch.totals() == (0, 0)
