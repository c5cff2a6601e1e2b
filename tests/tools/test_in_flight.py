from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tierd_tools.in_flight import in_order


class Jobs:
    """Jobs that are numbers: their cost. Knows what was taken at most, and how many ran."""

    def __init__(self, result_share: float) -> None:
        self.most = 0.0
        self.started: list[int] = []
        self._share = result_share
        self._now = 0.0
        self._lock = threading.Lock()

    def take(self, amount: float) -> None:
        with self._lock:
            self._now += amount
            self.most = max(self.most, self._now)

    def work(self, cost: int) -> int:
        self.started.append(cost)
        self.take(cost)
        time.sleep(0.001 * (cost % 5))
        self.take(cost * self._share - cost)
        return cost

    def run(self, costs: list[int], *, limit: int, ahead: int = 100) -> list[int]:
        results = []
        with ThreadPoolExecutor(4) as pool:
            for cost in in_order(
                pool,
                self.work,
                costs,
                cost_bytes=lambda cost: cost,
                result_bytes=lambda cost: int(cost * self._share),
                limit_bytes=limit,
                ahead=ahead,
            ):
                results.append(cost)
                self.take(-cost * self._share)
        return results


COSTS = [40, 10, 20, 80, 20, 10, 60, 100, 40, 20, 10, 80, 10, 10, 10]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("limit", [100, 150, 10_000])
def test_results_come_in_order_and_jobs_never_take_more_than_the_limit(
    share: float, limit: int
) -> None:
    jobs = Jobs(share)
    assert jobs.run(COSTS, limit=limit) == COSTS
    assert jobs.most <= limit


def test_a_job_above_the_limit_is_run_alone() -> None:
    jobs = Jobs(0.5)
    assert jobs.run([200] * 5, limit=100) == [200] * 5
    assert jobs.most == 200


def test_no_more_jobs_are_in_flight_than_may_be_ahead() -> None:
    jobs = Jobs(1.0)
    assert jobs.run([10] * 20, limit=10_000, ahead=3) == [10] * 20
    assert jobs.most <= 30


def test_a_job_that_fails_raises_in_its_turn() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    with ThreadPoolExecutor(4) as pool:
        results = in_order(
            pool,
            work,
            range(10),
            cost_bytes=lambda _: 1,
            result_bytes=lambda _: 0,
            limit_bytes=2,
            ahead=10,
        )
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="three"):
            next(results)


def test_no_jobs_have_no_results() -> None:
    assert Jobs(1.0).run([], limit=1) == []
