"""Many jobs through a few threads, in order, within a bound on the memory that they take together.

A job is admitted when what it may take, beside all that are in flight, fits the limit. When its
work is done it takes what its result takes, and nothing when the next result is asked for. One job
is always admitted, so a limit below the largest job is exceeded by that job alone.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Executor, Future

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    pool: Executor,
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    cost_bytes: Callable[[Job], int],
    result_bytes: Callable[[Result], int],
    limit_bytes: int,
    ahead: int,
) -> Iterator[Result]:
    """Gives the results of `jobs` in their order; raises what the first of them raised.

    cost_bytes: the most that a job takes until its work is done. ahead: jobs in flight at most.
    """
    taken = _Taken(limit_bytes)

    def done(job: Job) -> tuple[Result, int]:
        result = work(job)
        nbytes = result_bytes(result)
        taken.add(nbytes - cost_bytes(job))
        return result, nbytes

    running: deque[Future[tuple[Result, int]]] = deque()
    waiting = deque(jobs)

    def next_fits() -> bool:
        return bool(waiting) and len(running) < ahead and taken.fits(cost_bytes(waiting[0]))

    while waiting or running:
        with taken.changed:
            taken.changed.wait_for(lambda: next_fits() or (running and running[0].done()))
        while next_fits():
            job = waiting.popleft()
            taken.add(cost_bytes(job))
            future = pool.submit(done, job)
            future.add_done_callback(lambda _: taken.add(0))  # whatever it ended with
            running.append(future)
        if running[0].done():
            result, nbytes = running.popleft().result()
            yield result
            del result
            taken.add(-nbytes)


class _Taken:
    """The bytes that the jobs in flight take."""

    def __init__(self, limit: int) -> None:
        self.changed = threading.Condition()
        self._limit = limit
        self._nbytes = 0

    def fits(self, nbytes: int) -> bool:
        return not self._nbytes or self._nbytes + nbytes <= self._limit

    def add(self, nbytes: int) -> None:
        """`nbytes` may be negative."""
        with self.changed:
            self._nbytes += nbytes
            self.changed.notify_all()
