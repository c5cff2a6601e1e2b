"""A recorded client, alive again: it asks, computes and pauses as it did, and waits as it must."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tierd.core.model import (
    Acquire,
    Admit,
    ClientGone,
    ClientJoined,
    Later,
    Plan,
    Refuse,
    Release,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.model import Action, Event, Grant, LayerKey
    from tierd.sim.workload import RecordedClient

RETRY_NS = 1_000_000  #: after a refusal that a release may heal


class ReplayClient:
    """One client of a replay. `at(ns, act)` calls `act` then; `now()` is the time of the run;
    `used(key)` is told when it begins to compute with a layer."""

    def __init__(
        self,
        number: int,
        recorded: RecordedClient,
        send: Callable[[Event], None],
        at: Callable[[int, Callable[[], None]], None],
        now: Callable[[], int],
        used: Callable[[LayerKey], None],
    ) -> None:
        self.number = number
        self.recorded = recorded
        self.in_time = 0  #: uses for which it did not wait
        self.stall_ns = 0
        self.compute_ns = 0
        self.joined_ns = 0
        self.ended_ns = 0
        self.over = False
        self.refused = ""
        self._send_now, self._at, self._now, self._used = send, at, now, used
        self._index = 0  #: the use whose turn it is
        self._computing = False
        self._turned_ns: int | None = None  #: since when it wants to compute with it
        self._said = -1  #: the uses up to this one had their plans and hints sent
        self._plan: int | None = None  #: the request of a plan that has no answer yet
        self._requests: dict[int, int] = {}  #: open ones: the use
        self._leases: dict[int, int] = {}  #: by use
        self._asked: set[int] = set()  #: uses that were asked for and not put off
        self._last_request = 0
        self._with: dict[tuple[int, bool], list[int]] = {}
        for index, use in enumerate(recorded.uses):
            if use.trigger < index:
                self._with.setdefault((use.trigger, use.at_turn), []).append(index)

    def _send(self, event: Event) -> None:
        """Soon, at the same time: the machine is in the middle of another event."""
        self._at(self._now(), lambda: self._send_now(event))

    def _request(self) -> int:
        self._last_request += 1
        return self._last_request

    def join(self) -> None:
        self.joined_ns = self._now()
        self._send(ClientJoined(self._now(), self.number, self.recorded.weight))
        self._next()

    def leave(self) -> None:
        self.over = True
        self.ended_ns = self._now()
        self._send(ClientGone(self._now(), self.number))

    def own_ns(self) -> int:
        """How long it takes from the begin of the day if it never waits."""
        uses = self.recorded.uses
        return self.joined_ns + sum(use.pause_ns + use.compute_ns for use in uses)

    def needs(self, model: int) -> bool:
        """Whether it will still use, or say something about, this model."""
        if self.over:
            return False
        said = [e for i, said in self.recorded.says.items() if i >= self._index for e in said]
        return any(use.key.model == model for use in self.recorded.uses[self._index :]) or any(
            event.model == model for event in said
        )

    # --------------------------------------------------------------------------------------- turns

    def _next(self) -> None:
        if self.refused or self._index == len(self.recorded.uses):
            self.leave()
            return
        pause_ns = self.recorded.uses[self._index].pause_ns
        self._at(self._now() + pause_ns, self._turn)

    def _turn(self) -> None:
        """It wants the next layer, after what it has to say before."""
        if self.over:
            return
        if self._said < self._index:
            self._said = self._index
            for event in self.recorded.says.get(self._index, ()):
                if isinstance(event, Plan):
                    self._plan = self._request()
                    event = replace(event, request=self._plan)
                self._send(replace(event, at_ns=self._now(), client=self.number))
        if self._turned_ns is None:
            self._turned_ns = self._now()
        if self._plan is not None:
            return
        self._ask(self._index)
        for index in self._with.get((self._index, True), ()):
            self._ask(index)
        if self._index in self._leases:
            self._begin()

    def _ask(self, index: int) -> None:
        if index in self._asked:
            return
        self._asked.add(index)
        request = self._request()
        self._requests[request] = index
        key = self.recorded.uses[index].key
        self._send(Acquire(self._now(), self.number, request, key, index != self._index))

    def _begin(self) -> None:
        assert self._turned_ns is not None
        waited_ns = self._now() - self._turned_ns
        self.stall_ns += waited_ns
        self.in_time += waited_ns == 0
        self._used(self.recorded.uses[self._index].key)
        self._turned_ns = None
        self._computing = True
        for index in self._with.get((self._index, False), ()):
            self._ask(index)
        compute_ns = self.recorded.uses[self._index].compute_ns
        self.compute_ns += compute_ns
        self._at(self._now() + compute_ns, self._end)

    def _end(self) -> None:
        self._computing = False
        self._send(Release(self._now(), self.number, self._leases.pop(self._index)))
        self._index += 1
        self._next()

    # ------------------------------------------------------------------------------------- answers

    def granted(self, grant: Grant) -> None:
        index = self._requests.pop(grant.request)
        self._leases[index] = grant.lease
        if index == self._index and self._turned_ns is not None and not self.over:
            self._begin()

    def answered(self, action: Action) -> None:
        """Admit, Later, Refuse."""
        if self.over:
            return
        match action:
            case Admit() if action.request == self._plan:
                self._plan = None
                self._resume()
            case Later():
                index = self._requests.pop(action.request)
                self._asked.discard(index)
                if index == self._index and self._turned_ns is not None:
                    self._ask(index)
            case Refuse() if action.request == self._plan:
                self._give_up(action)
            case Refuse():
                self._refused(action, self._requests.pop(action.request))
            case _:
                pass

    def _resume(self) -> None:
        if self._turned_ns is not None:
            self._at(self._now(), self._turn)

    def _refused(self, refusal: Refuse, index: int) -> None:
        self._asked.discard(index)
        if refusal.code != "lease_limit":
            self._give_up(refusal)
        elif index == self._index and self._turned_ns is not None:
            for other in [held for held in self._leases if held > index]:
                self._asked.discard(other)
                self._send(Release(self._now(), self.number, self._leases.pop(other)))
            self._at(self._now() + RETRY_NS, self._resume)

    def _give_up(self, refusal: Refuse) -> None:
        """This budget does not serve the client: the rest of its day is left out."""
        self.refused = f"{refusal.code}: {refusal.text}"
        if not self._computing:
            self.leave()
