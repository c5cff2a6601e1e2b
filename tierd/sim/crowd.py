"""Who comes and goes in a run of a fleet: clients, one for each that left, models that are replaced
by others of the same sizes, and the commands of an operator."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

from tierd.core.model import OPERATOR, ModelAdded, ModelRemoved
from tierd.core.stack_model import Fenced, ModelPlaced
from tierd.sim.virtual_client import VirtualClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.model import Event
    from tierd.core.stack_model import StackEvent
    from tierd.sim.agenda import Agenda
    from tierd.sim.fleet import Fleet
    from tierd.sim.operator import Operator
    from tierd.sim.sessions import Sessions

OPERATOR_NS = 60_000_000  #: on average, between two commands of the operator
COME_NS = 500_000_000  #: within this time the first clients come
COME_AGAIN_NS = 20_000_000  #: from one that left to the next that comes, at most


class Crowd:
    """Of one run. send: takes what clients send; feed: what the server itself tells the core."""

    def __init__(
        self,
        fleet: Fleet,
        rng: random.Random,
        agenda: Agenda,
        sessions: Sessions,
        operator: Operator,
        send: Callable[[Event], None],
        feed: Callable[[StackEvent], None],
    ) -> None:
        self.came = 0  #: clients, ever
        self.models = len(fleet.models)  #: that were ever served
        self.layers = 0  #: computed by clients that left
        self.given_back = 0  #: kept leases, by clients that left
        self.stall_ns = 0  #: of clients that left
        self.served = [model.number for model in fleet.models]  #: by place: the id at present
        self.tier: dict[int, int | None] = {}  #: of present clients
        self.fencing: dict[int, int] = {}  #: clients that are gone -> their GPU
        self._fleet = fleet
        self._rng = rng
        self._agenda = agenda
        self._sessions = sessions
        self._operator = operator
        self._send = send
        self._feed = feed
        self._leaving = False

    def begin(self) -> None:
        for place in range(len(self._fleet.models)):
            self._serve(place)
        for _ in range(self._fleet.size.clients):
            self._agenda.after(self._rng.randint(0, COME_NS), self._come)
        self._agenda.after(self._pause_ns(), self._replace_a_model)
        self._agenda.after(OPERATOR_NS, self._operate)

    def leave(self) -> None:
        """Everybody goes, nobody comes any more, and nothing is replaced."""
        self._leaving = True
        self._feed(self._operator.unpin_all(self._agenda.now))
        self._operator.check_answered()
        for client in list(self._sessions.clients.values()):
            client.leave()

    def gone(self, client: int) -> int | None:
        """A client left; returns the tier that it was on. Soon another one comes."""
        tier = self.tier.pop(client)
        left = self._sessions.clients.pop(client)
        self.layers += left.done
        self.given_back += left.given_back
        self.stall_ns += left.stall_ns
        if tier is not None:
            delay = self._rng.choice([0, self._rng.randint(0, self._fleet.fence_ns)])
            self._agenda.after(delay, lambda: self._feed(Fenced(self._agenda.now, client)))
            self.fencing[client] = tier
        self._agenda.after(self._rng.randint(0, COME_AGAIN_NS), self._come)
        return tier

    def _come(self) -> None:
        if self._leaving:
            return
        self.came += 1
        number = OPERATOR + self.came
        drawn = self._fleet.profile(self._rng, self._agenda.now)
        profile = replace(drawn, model=self.served[drawn.model])  # the id that it has at present
        client = VirtualClient(
            number, profile, random.Random(f"{self._fleet.seed}/{number}"), self._send,
            self._agenda.after, self._agenda.time, lambda: self._sessions.pressed[profile.gpu],
        )  # fmt: skip
        self._sessions.clients[number] = client
        self.tier[number] = profile.gpu
        client.start()

    def _serve(self, place: int) -> None:
        sizes = self._fleet.models[place].layer_bytes
        model, now = self.served[place], self._agenda.now
        self._feed(ModelAdded(now, model, f"m{place}", 0, sizes))
        for gpu, places in enumerate(self._fleet.placed):
            if place in places:
                self._feed(ModelPlaced(now, gpu, model, 1 + gpu))

    def _replace_a_model(self) -> None:
        if self._leaving:
            return
        place = self._rng.randrange(len(self.served))
        self._feed(ModelRemoved(self._agenda.now, self.served[place]))
        self.served[place] = self.models
        self.models += 1
        self._serve(place)
        self._agenda.after(self._pause_ns(), self._replace_a_model)

    def _operate(self) -> None:
        """An operator pins, unpins and evicts layers in DRAM, some of them of models long gone, and
        changes budgets."""
        if self._leaving:
            return
        self._feed(self._operator.command(self._agenda.now, self.served, self.models))
        self._operator.check_answered()
        self._agenda.after(self._rng.randint(1, 2 * OPERATOR_NS), self._operate)

    def _pause_ns(self) -> int:
        return self._rng.randint(1, 2 * self._fleet.replace_ns)
