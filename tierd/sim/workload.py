"""What the clients of a recorded day did: which layers in which order, and how long they computed.

A recording shows when a client asked, was granted and released, not when it computed. Taken to have
computed one layer after the other, in the order in which it asked, a use begins when its layer was
granted and the use before it was over, and it is over when its lease is released; whatever lies
between is compute. Time in which the client neither computed nor waited is a pause before the use.
So stalls are left out, and a replay puts those of another budget in their place.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.model import (
    Acquire,
    ClientGone,
    ClientJoined,
    Grant,
    Hint,
    Later,
    LayerKey,
    Plan,
    PlanOver,
    Refuse,
    Release,
    WeightChanged,
)

if TYPE_CHECKING:
    from tierd.core.model import Action
    from tierd.sim.recording import Moment, Recording


@dataclass(slots=True, eq=False)
class Use:
    """A layer that a client asked for, computed with and released. Times are those recorded."""

    key: LayerKey
    asked_ns: int
    granted_ns: int | None = None
    released_ns: int | None = None
    pause_ns: int = 0
    compute_ns: int = 0
    begin_ns: int = 0  #: when it could begin to compute, which went on for `compute_ns`
    trigger: int = (
        0  #: index of the use with which this one is asked for; its own without lookahead
    )
    at_turn: bool = True  #: it is asked for when the trigger's turn comes, else when that has begun


@dataclass(slots=True, eq=False)
class RecordedClient:
    """One connection. `says[i]`: what it says of its plans before use `i`."""

    client: int
    weight: int  #: its last one
    joined_ns: int
    uses: list[Use] = field(default_factory=list)
    says: dict[int, list[Plan | PlanOver | Hint]] = field(default_factory=dict)

    def say(self, event: Plan | PlanOver | Hint) -> None:
        self.says.setdefault(len(self.uses), []).append(event)


def clients_of(recording: Recording) -> list[RecordedClient]:
    """Every client that used a layer, in the order in which they came."""
    reader = _Reader(recording)
    for moment in recording.moments:
        reader.take(moment)
    return reader.finished(recording.end_ns)


class _Reader:
    """Follows the moments; forgets what was put off or refused."""

    def __init__(self, recording: Recording) -> None:
        self._all: list[RecordedClient] = []
        self._connected: dict[int, RecordedClient] = {}
        self._asked: dict[tuple[int, int], Use] = {}
        self._put_off: dict[tuple[int, LayerKey], int] = {}  #: when it was asked for first
        self._leases: dict[int, Use] = {}
        for event in recording.opening:
            if isinstance(event, ClientJoined):
                self._join(event, recording.begin_ns)
            elif isinstance(event, Plan) and event.client in self._connected:
                self._connected[event.client].say(event)

    def _join(self, event: ClientJoined, at_ns: int) -> None:
        client = RecordedClient(event.client, event.weight, at_ns)
        self._connected[event.client] = client
        self._all.append(client)

    def take(self, moment: Moment) -> None:
        event = moment.event
        match event:
            case ClientJoined():
                self._join(event, moment.at_ns)
            case WeightChanged() if event.client in self._connected:
                self._connected[event.client].weight = event.weight
            case Plan() | PlanOver() | Hint() if event.client in self._connected:
                if not any(isinstance(action, Refuse) for action in moment.actions):
                    self._connected[event.client].say(event)
            case Acquire() if event.client in self._connected:
                first_ns = self._put_off.pop((event.client, event.key), moment.at_ns)
                use = Use(event.key, first_ns)
                self._asked[event.client, event.request] = use
                self._connected[event.client].uses.append(use)
            case Release():
                self._over(event.lease, moment.at_ns)
            case ClientGone():
                gone = self._connected.pop(event.client, None)
                for use in gone.uses if gone is not None else ():
                    if use.released_ns is None:
                        use.released_ns = moment.at_ns
            case _:
                pass
        for action in moment.actions:
            self._answer(action, moment.at_ns)

    def _over(self, lease: int, at_ns: int) -> None:
        use = self._leases.pop(lease, None)
        if use is not None:
            use.released_ns = at_ns

    def _answer(self, action: Action, at_ns: int) -> None:
        if not isinstance(action, Grant | Later | Refuse):
            return
        use = self._asked.pop((action.client, action.request), None)
        if use is None:
            return
        if isinstance(action, Grant):
            use.granted_ns = at_ns
            self._leases[action.lease] = use
        elif isinstance(action, Later):
            self._put_off[action.client, use.key] = use.asked_ns

    def finished(self, end_ns: int) -> list[RecordedClient]:
        clients = []
        for client in self._all:
            _drop_ungranted(client)
            if client.uses:
                _time(client, end_ns)
                clients.append(client)
        return clients


def _drop_ungranted(client: RecordedClient) -> None:
    """Requests without a grant are no uses; what was said before one is said before the next."""
    uses: list[Use] = []
    says: dict[int, list[Plan | PlanOver | Hint]] = {}
    for index in range(len(client.uses) + 1):
        if index in client.says:
            says.setdefault(len(uses), []).extend(client.says[index])
        if index < len(client.uses) and client.uses[index].granted_ns is not None:
            uses.append(client.uses[index])
    client.uses, client.says = uses, says


def _time(client: RecordedClient, end_ns: int) -> None:
    """Pauses, compute times and what is asked for ahead of what."""
    over_ns = client.joined_ns  # when the use before was over
    begins: list[int] = []
    overs: list[int] = []
    for index, use in enumerate(client.uses):
        assert use.granted_ns is not None
        turn_ns = max(over_ns, use.asked_ns)
        begin_ns = max(use.granted_ns, over_ns)
        use.pause_ns = turn_ns - over_ns
        last_ns = end_ns if use.released_ns is None else use.released_ns
        over_ns = max(last_ns, begin_ns)
        use.compute_ns = over_ns - begin_ns
        use.begin_ns = begin_ns
        # It was asked for in the course of the first use that was not over by then.
        use.trigger = bisect_right(overs, use.asked_ns)
        use.at_turn = use.trigger == index or use.asked_ns < begins[use.trigger]
        begins.append(begin_ns)
        overs.append(over_ns)
