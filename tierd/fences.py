"""When a client of a GPU that is gone reads nothing any more: then its slots may be used again.

Its kernels run on the GPU, not in it, and the end of its connection does not stop them. The driver
tears its context down while the process exits, and no call says when that is over. So: a process
that died is fenced a grace period after its pidfd fired; a connection whose process lives on, a
grace period after it ended; and one whose process is exiting, when that has died.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING

from tierd.io.process import is_exiting

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

GRACE_SECONDS = 0.1


class Fences:
    """Belongs to the loop's thread. `fenced` is called once for each client that was begun."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fenced: Callable[[int], None]) -> None:
        self._loop = loop
        self._fenced = fenced
        self._pidfds: dict[int, int] = {}  # client -> pidfd, watched
        self._timers: dict[int, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        """Clients that are gone and not fenced yet."""
        return len(self._pidfds.keys() | self._timers.keys())

    def begin(self, client: int, pid: int, pidfd: int) -> None:
        """The connection of `client` ended; takes `pidfd` over."""
        if _died(pidfd):
            os.close(pidfd)
            self._wait(client, self._end)
            return
        self._pidfds[client] = pidfd
        self._loop.add_reader(pidfd, self._died, client)
        self._wait(client, self._look, pid)

    def close(self) -> None:
        """Nobody will be fenced any more."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for client in list(self._pidfds):
            self._forget(client)

    def _wait(self, client: int, then: Callable[..., None], *arguments: int) -> None:
        earlier = self._timers.pop(client, None)
        if earlier is not None:
            earlier.cancel()
        self._timers[client] = self._loop.call_later(GRACE_SECONDS, then, client, *arguments)

    def _died(self, client: int) -> None:
        self._forget(client)
        self._wait(client, self._end)

    def _look(self, client: int, pid: int) -> None:
        """It had not died within the grace period."""
        del self._timers[client]
        with contextlib.suppress(ProcessLookupError):
            if not is_exiting(pid):
                self._forget(client)
                self._fenced(client)

    def _end(self, client: int) -> None:
        del self._timers[client]
        self._fenced(client)

    def _forget(self, client: int) -> None:
        pidfd = self._pidfds.pop(client)
        self._loop.remove_reader(pidfd)
        os.close(pidfd)


def _died(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
