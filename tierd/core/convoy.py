"""Bringing clients of one model into phase, by a wait that is bounded and that pays.

Clients of one model whose positions are close share every read. Mostly they get there by
themselves: who is behind finds what the others left in memory and catches up, or waits for the same
read. Where memory is too small for that, or where nobody waits for the device, they stay apart, and
layers are read once for each of them. Then some are *held*: no read is started for a held client
(what is resident is granted at once, as ever) until the runner behind it has come to its position
(`phases` has the search). The device serves the runner meanwhile, so little of its time is lost.

No hold is longer than `convoy_wait_ns`, nor than one and a half times what the runner should need;
it ends at once when one of the two dies or has another plan. Who was held is left alone for a pass
of its own, and twice as long each time that it fell out of phase soon: clients that do not stay
together are not tied together.

There is one search in the time in which the clients make half a pass, O(1) on average for a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.phases import NEAR, PAYBACK, Cycle, Rider

if TYPE_CHECKING:
    from tierd.core.books import Books, Client
    from tierd.core.phases import Gathering
    from tierd.core.plans import PlanState
    from tierd.core.served import ModelState

LONGEST_REST = 64  #: passes for which a client that keeps falling out of phase is left alone
SILENT_STEPS = 4  #: a client without a sign of life for so many steps neither runs nor is held


@dataclass(slots=True, eq=False)
class Hold:
    """A client for which nothing is read."""

    client: int
    runner: int  #: the client that it waits for
    device: int
    since_ns: int
    until_ns: int


@dataclass(slots=True, eq=False)
class Past:
    """What a client did under its plan so far."""

    steps: int = 0
    rests_until: int = 0  #: step before which it is not held again
    soon_until: int = 0  #: being held before this step means that the last time was in vain
    rest: int = 1  #: passes
    stepped_ns: int = 0
    stall_ns: int = 0  #: of the client, when it stepped last
    compute_ns: int = 0  #: running mean of a step without its stall


class Convoys:
    """Who is held, and for whom."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._holds: dict[int, Hold] = {}  #: by held client
        self._behind: dict[int, list[Hold]] = {}  #: by runner, the nearest last
        self._past: dict[int, Past] = {}
        self._steps: dict[int, int] = {}  #: by model: of all its clients since the last search
        self.wakes_at_ns: int | None = None  #: the earliest end of a hold

    # ----------------------------------------------------------------------- told by the machine

    def stepped(self, client: Client) -> None:
        """The client asked for another layer of its plan."""
        plan = client.plan
        assert plan is not None
        past = self._past.setdefault(client.id, Past())
        past.steps += 1
        self._measure(past, client)
        waiting = self._behind.get(client.id)
        while waiting and self._reached(client, waiting[-1]):
            self._end(waiting[-1], "client {} has come", client.id)
        model = self._books.models[plan.model]
        steps = self._steps.get(model.id, 0) + 1
        if 2 * steps >= len(plan.order) * len(model.plans):
            steps = 0
            if model.missing and len(model.plans) > 1 and self._books.config.convoy_wait_ns:
                self._search(model)
        self._steps[model.id] = steps

    def plan_dropped(self, client: Client) -> None:
        """The client is gone, or will have another plan."""
        self._past.pop(client.id, None)
        for hold in list(self._behind.get(client.id, ())):
            self._end(hold, "client {} does not come", client.id)
        if (own := self._holds.get(client.id)) is not None:
            self._end(own, "its plan ended")

    def model_removed(self, model: int) -> None:
        """No client has a plan over the model any more."""
        self._steps.pop(model, None)

    def expire(self) -> None:
        """Ends the holds whose time is over."""
        if self.wakes_at_ns is None or self._books.now < self.wakes_at_ns:
            return
        for hold in list(self._holds.values()):
            if self._books.now >= hold.until_ns:
                self._end(hold, "client {} did not come in time", hold.runner)

    # ------------------------------------------------------------------------------------- search

    def _measure(self, past: Past, client: Client) -> None:
        now = self._books.now
        stall_ns = client.stall_ns - past.stall_ns
        if past.steps > 1:
            computed_ns = max(now - past.stepped_ns - stall_ns, 0)
            past.compute_ns += (computed_ns - past.compute_ns) // min(past.steps - 1, 8)
        past.stepped_ns, past.stall_ns = now, client.stall_ns

    def _search(self, model: ModelState) -> None:
        """Holds clients of the model where that pays."""
        if any(client in self._holds for client in model.plans):
            return
        order: tuple[int, ...] | None = None
        riders = []
        for client, plan in model.plans.items():
            if self._rides(client, plan) and (order is None or plan.order == order):
                order = plan.order
                riders.append(self._rider(client, plan))
        if order is None or len(riders) < 2:
            return
        device = self._books.devices[model.device]
        read_ns = device.ns_per_mib * sum(model.layer_bytes) // len(model.layer_bytes) >> 20
        cycle = Cycle([model.slots[layer] is None for layer in order], read_ns)
        gathering = cycle.gather(riders, self._books.config.convoy_wait_ns)
        if gathering is not None:
            self._hold_all(model, gathering, read_ns)

    def _rides(self, client: int, plan: PlanState) -> bool:
        """Whether the client goes round and round, and is not silent."""
        if plan.kind != "cyclic" or client not in self._past:
            return False
        silent_ns = self._books.now - plan.last_ns
        waits = bool(self._books.clients[client].requests)
        return waits or silent_ns <= SILENT_STEPS * plan.step_ns

    def _rider(self, client: int, plan: PlanState) -> Rider:
        past = self._past[client]
        return Rider(
            client, plan.position, plan.step_ns, past.compute_ns, past.steps >= past.rests_until
        )

    # -------------------------------------------------------------------------------------- holds

    def _hold_all(self, model: ModelState, gathering: Gathering, read_ns: int) -> None:
        books = self._books
        waiting = self._behind.setdefault(gathering.runner, [])
        for wait in reversed(gathering.waits):
            longest_ns = min(books.config.convoy_wait_ns, wait.wait_ns * 3 // 2 + read_ns)
            for client in wait.clients:
                past = self._past[client]
                past.rest = min(2 * past.rest, LONGEST_REST) if past.steps < past.soon_until else 1
                until_ns = books.now + longest_ns
                hold = Hold(client, gathering.runner, model.device, books.now, until_ns)
                self._holds[client] = hold
                waiting.append(hold)
                device = books.devices[model.device]
                device.hold(device.share(client, books.clients[client].weight))
                books.count["holds"] += 1
                books.tell("hold", None, "nothing is read for client {} on model '{}' for at most "
                    "{} ns, until client {} has come from behind: about {} reads a pass are saved",
                    client, model.name, longest_ns, gathering.runner, wait.reads,
                )  # fmt: skip
        self._set_wake()

    def _reached(self, runner: Client, hold: Hold) -> bool:
        """Whether the runner is about where the held client is."""
        mine, other = runner.plan, self._books.clients[hold.client].plan
        assert mine is not None
        assert other is not None
        return (other.position - mine.position) % len(other.order) < NEAR

    def _end(self, hold: Hold, reason: str, *values: object) -> None:
        books = self._books
        del self._holds[hold.client]
        waiting = self._behind[hold.runner]
        waiting.remove(hold)
        if not waiting:
            del self._behind[hold.runner]
        self._set_wake()
        held_ns = books.now - hold.since_ns
        books.count["held_ns"] += held_ns
        client = books.clients[hold.client]
        past = self._past.get(client.id)
        if past is not None and client.plan is not None:
            length = len(client.plan.order)
            past.rests_until = past.steps + past.rest * length
            past.soon_until = past.steps + PAYBACK * past.rest * length
        device = books.devices[hold.device]
        device.resume(device.share(client.id, client.weight))
        books.tell("resume", None, "client {} was held for {} ns: " + reason, client.id, held_ns,
            *values,
        )  # fmt: skip

    def _set_wake(self) -> None:
        self.wakes_at_ns = min((hold.until_ns for hold in self._holds.values()), default=None)
