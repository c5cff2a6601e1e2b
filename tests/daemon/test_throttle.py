from __future__ import annotations

import random

import pytest

from tierd.io.throttle import TokenBucket

SECOND = 1_000_000_000


def test_the_burst_passes_at_once_and_the_next_byte_waits() -> None:
    bucket = TokenBucket(100, 50, at_ns=0)
    assert bucket.take(50, at_ns=0) == 0
    assert bucket.take(1, at_ns=0) == SECOND // 100


def test_a_take_above_the_burst_waits_for_the_rest() -> None:
    bucket = TokenBucket(100, 50, at_ns=0)
    assert bucket.take(150, at_ns=0) == SECOND


def test_those_after_a_large_take_wait_behind_it() -> None:
    bucket = TokenBucket(100, 0, at_ns=0)
    assert [bucket.take(100, at_ns=0) for _ in range(3)] == [SECOND, 2 * SECOND, 3 * SECOND]


def test_idle_time_refills_up_to_the_burst_and_no_further() -> None:
    bucket = TokenBucket(100, 50, at_ns=0)
    assert bucket.take(50, at_ns=0) == 0
    assert bucket.take(50, at_ns=1000 * SECOND) == 0
    assert bucket.take(50, at_ns=1000 * SECOND) == SECOND // 2


@pytest.mark.parametrize("seed", range(20))
def test_no_window_passes_more_than_rate_and_burst(seed: int) -> None:
    rng = random.Random(seed)
    rate, burst = rng.randint(1, 10**9), rng.randint(0, 1 << 22)
    bucket = TokenBucket(rate, burst, at_ns=0)
    now = passed = 0
    for _ in range(500):
        nbytes = rng.randint(1, 1 << 22)
        wait = bucket.take(nbytes, at_ns=now)
        assert wait >= 0
        passed += nbytes
        assert passed * SECOND <= (now + wait) * rate + burst * SECOND
        now += rng.choice([0, wait, wait // 2, rng.randint(0, SECOND)])


def test_a_limit_that_is_used_up_is_reached_to_the_byte() -> None:
    bucket = TokenBucket(333, 0, at_ns=0)
    now = 0
    for _ in range(1000):
        now += bucket.take(7, at_ns=now)
    assert now == pytest.approx(7000 / 333 * SECOND, abs=1000)  # a wait is rounded up to 1 ns


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, -1)])
def test_a_bucket_that_could_never_fill_is_refused(rate: int, burst: int) -> None:
    with pytest.raises(ValueError, match=f"{rate} and {burst}"):
        TokenBucket(rate, burst, at_ns=0)
