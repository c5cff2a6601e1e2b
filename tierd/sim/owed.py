"""Answers that clients are owed, and by when."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from tierd.core.model import Plan
from tierd.sim.errors import BrokenPromise

if TYPE_CHECKING:
    from tierd.core.model import Acquire, Admit, Grant, Later, Refuse


class Owed:
    """Open plans and requests, by client and request."""

    def __init__(self) -> None:
        self._open: dict[int, dict[int, Plan | Acquire]] = {}
        self._latest: list[tuple[int, int, int]] = []  #: heap: when, client, request
        self.plans: dict[int, None] = {}  #: clients whose plan has no answer

    def __bool__(self) -> bool:
        return bool(self._open)

    def __str__(self) -> str:
        return str(self._open)

    @property
    def requests(self) -> int:
        return sum(len(mine) for mine in self._open.values())

    def asked(self, event: Plan | Acquire, latest_ns: int) -> None:
        """From now on it is owed, until `latest_ns` at most."""
        self._open.setdefault(event.client, {})[event.request] = event
        if isinstance(event, Plan):
            self.plans[event.client] = None
        heapq.heappush(self._latest, (latest_ns, event.client, event.request))

    def answered(self, action: Grant | Later | Admit | Refuse) -> Plan | Acquire:
        """What this answers. Raises BrokenPromise if it answers nothing."""
        mine = self._open.get(action.client, {})
        event = mine.pop(action.request, None)
        if event is None:
            raise BrokenPromise(f"{action} answers nothing")
        if isinstance(event, Plan) and not any(isinstance(other, Plan) for other in mine.values()):
            del self.plans[action.client]
        if not mine:
            del self._open[action.client]
        return event

    def forget(self, client: int) -> None:
        """The client is gone: nobody waits for an answer."""
        self._open.pop(client, None)
        self.plans.pop(client, None)

    def check(self, now_ns: int) -> None:
        """Raises BrokenPromise if an answer is late; costs as much as answers came since."""
        while self._latest and self._latest[0][0] < now_ns:
            _, client, request = heapq.heappop(self._latest)
            event = self._open.get(client, {}).get(request)
            if event is not None:
                raise BrokenPromise(f"at {now_ns} ns {event} has no answer")
