"""Leases that were given up on a GPU and go back when it is through with them.

A layer is left when its work was given to the GPU, which does it later. Nobody waits for that: the
lease departs with a fence behind the last use of each thread, and is given back once all of them
have passed. That is looked after at later requests and by the attendant.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tierd_client.memory import Fence


class Departures:
    """A queue, oldest first. Safe in finalizers: it takes no lock.

    release: a method that gives leases back; its object is not kept alive by this.
    """

    def __init__(self, release: Callable[[Iterable[int]], None]) -> None:
        self._method = weakref.WeakMethod(release)
        self._queue: deque[tuple[int, list[Fence]]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, lease: int, fences: list[Fence]) -> None:
        """Give `lease` back when all fences have passed: at once if there is none."""
        if fences:
            self._queue.append((lease, fences))
        else:
            self._release((lease,))

    def send(self) -> None:
        """Give back whose fences have passed. Does not wait. A fence that raises, because the GPU
        is lost, keeps its lease."""
        for _ in range(len(self._queue)):  # one round, which leaves the order as it was
            try:
                lease, fences = self._queue.popleft()
            except IndexError:  # another thread was faster
                return
            through = False
            try:
                through = all(fence.passed() for fence in fences)
            finally:
                if not through:
                    self._queue.append((lease, fences))
            if through:
                self._release((lease,))

    def wait(self) -> bool:
        """Wait until the oldest can be given back, and do so; False when there is none."""
        try:
            lease, fences = self._queue.popleft()
        except IndexError:
            return False
        try:
            for fence in fences:
                fence.wait()
        except BaseException:
            self._queue.appendleft((lease, fences))
            raise
        self._release((lease,))
        self.send()
        return True

    def _release(self, leases: Iterable[int]) -> None:
        release = self._method()
        if release is not None:  # else the connection is gone, and every lease with it
            release(leases)
