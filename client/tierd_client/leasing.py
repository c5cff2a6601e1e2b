"""Leases of a running model: taken as its layers are entered, one ahead, given back as they end.

All threads of a process that run one model share a `LayerLeases`. Per layer there is at most one
lease, with a count of the threads that are inside. A thread holds one layer at a time and asks for
the next one of the plan ahead, so a resident layer costs no round trip in front of the compute.
While the daemon says that memory is not short, leases are kept from pass to pass (see `holdings`),
and cost no round trip at all; `tend` gives them back, also when nobody computes.

Two threads may need more than the daemon has reserved for this client; it then refuses one with
`LeaseLimit`. That thread keeps the *turn* (the right to ask) and waits until another leaves a
layer. Leaving needs no turn and nobody asks ahead meanwhile, so somebody always moves on.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING

from tierd_client import fork
from tierd_client.course import Course
from tierd_client.errors import (
    ClientClosed,
    LeaseLimit,
    LeaseLost,
    Refused,
    UnsupportedOperation,
    ViewStillAlive,
)
from tierd_client.holdings import Held, Holdings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd_client.lease import Lease, PendingLease
    from tierd_client.opened import OpenedModel

#: A thread that waits for another one to leave a layer gives up after this long.
LIMIT_WAIT_S = 120.0
#: How long what was given back may still count: the grant of a cancelled request goes back as its
#: reply is read, a release may be sent behind another thread's request. And how often to ask again.
CANCEL_S = 10.0
RELEASE_S = 1.0
RETRY_S = 0.002


@dataclass(slots=True)
class LeasingCounters:
    """entries: layers entered; leases: of them, those that asked the daemon; ahead: of these, those
    that were asked ahead; kept: entries for which the lease was there, kept since an earlier one;
    stall_ns: time that entries waited."""

    entries: int = 0
    leases: int = 0
    ahead: int = 0
    kept: int = 0
    stall_ns: int = 0


class _Place(threading.local):
    """Where one thread is. No slots: they would be shared between threads."""

    def __init__(self) -> None:
        self.inside: dict[int, int] = {}  # layer: entries not left
        #: Layers that it may enter while what it gives its stream is captured, and not done.
        self.frozen: frozenset[int] | None = None


class LayerLeases:
    """The leases of one opened model. Thread-safe.

    order: layer numbers in the expected order of use in one pass; a tied head repeats its layer
    (see `Course`). Raises what `OpenedModel.plan` raises.
    """

    def __init__(
        self, opened: OpenedModel, order: Sequence[int], *, tokens_per_pass: int = 1
    ) -> None:
        self.opened = opened
        self._life = fork.current()
        self._closed = False
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._left = threading.Condition(self._lock)
        self._holdings = Holdings()
        self._pending: dict[int, PendingLease] = {}
        self._asked_by: dict[int, int] = {}  # layer asked for ahead and not entered yet: thread
        self._released = 0  # leases given back so far
        self._leaving = 0  # leases taken out of the holdings whose release is not sent yet
        self._settled_at = 0.0  # when all that was given back has surely reached the daemon
        self._used_at = 0.0  # when a layer was last left
        self._asking: int | None = None  # layer that the holder of the turn is acquiring
        self._starved = False  # the holder of the turn was refused: nobody asks ahead
        self._counters = LeasingCounters()
        self._place = _Place()
        self._course = Course(opened, order, tokens_per_pass)

    @property
    def order(self) -> tuple[int, ...]:
        """The plan: layer numbers in the order of use."""
        return self._course.order

    def check(self) -> None:
        """Raise ForkedClient in a forked child, ClientClosed after `close`, DaemonGone."""
        fork.check(self._life, f"model {self.opened.name!r}")
        if self._closed:
            raise ClientClosed(f"model {self.opened.name!r} was closed")
        self.opened.check_connection()  # leases that are kept ask nothing and would not notice

    # --------------------------------------------------------------------------------- enter, leave

    def enter(self, layer: int) -> Lease:
        """The lease of `layer`, until `leave(layer)`; asks for its successor ahead.

        Raises what `OpenedModel.acquire` raises; then there is nothing to leave.
        """
        self.check()
        frozen = self._place.frozen
        if frozen is not None and layer not in frozen:
            raise UnsupportedOperation(
                f"layer {self.opened.layer_name(layer)} of model {self.opened.name!r} was in no "
                "pass before: a graph that has it cannot be captured"
            )
        inside, following = self._place.inside, self._course.advance(layer)
        with self._lock:
            self._counters.entries += 1
            held = self._join(layer)
        if held is None:
            with self._turn:
                held = self._acquire(layer)
        inside[layer] = inside.get(layer, 0) + 1
        if following is not None and frozen is None:
            try:
                self._ask_ahead(following)
            except BaseException:
                self.leave(layer)
                raise
        return held.lease

    def leave(self, layer: int) -> None:
        """End one `enter`. Raises LeaseLost, ViewStillAlive; the layer is left nevertheless."""
        inside = self._place.inside
        inside[layer] -= 1
        if not inside[layer]:
            del inside[layer]
        self._end_use(layer)

    def _end_use(self, layer: int) -> None:
        with self._left:
            held = self._holdings.leave(layer)
            self._used_at = monotonic()
            sound = held.lease.leave(fenced=self._place.frozen is None)
            stays = sound and (held.wanted or not self.opened.pressed)
            ended = not held.users and (not stays or self._starved or self._closed)
            if ended:
                self._holdings.remove(layer)
                self._leaving += 1
        if ended:
            self._release([held.lease])

    def _release(self, leases: list[Lease]) -> None:
        """Give back leases that were taken out of the holdings and added to `_leaving`."""
        try:
            for lease in leases:
                lease.release()
        finally:
            with self._left:
                self._leaving -= len(leases)
                self._released += len(leases)
                self._settled_at = max(self._settled_at, monotonic() + RELEASE_S)
                self._left.notify_all()

    def _release_unused(self, leases: list[Lease]) -> None:
        """As `_release`; whoever used these leases checked them when it left the layer."""
        for lease in leases:
            with suppress(LeaseLost, ViewStillAlive):
                self._release([lease])

    def current(self, layer: int) -> Lease | None:
        """The lease of `layer` if this thread is inside it."""
        return self._holdings[layer].lease if layer in self._place.inside else None

    def _join(self, layer: int) -> Held | None:
        self._asked_by.pop(layer, None)
        held = self._holdings.join(layer)
        if held is not None:
            self._counters.kept += held.users == 1 and not held.fresh
            held.fresh = False
        return held

    def _acquire(self, layer: int) -> Held:
        """Get a lease from the daemon. The caller has the turn."""
        with self._lock:
            held = self._join(layer)  # who had the turn before may have brought it
            if held is not None:
                return held
            self._asking = layer
            pending = self._pending.pop(layer, None)
        begin = perf_counter_ns()
        lease = None
        try:
            lease = self._wait_lease(layer, pending)
        finally:
            with self._lock:
                self._asking = None
                self._starved = False
                self._counters.stall_ns += perf_counter_ns() - begin
                if lease is not None:
                    self._counters.leases += 1
                    self._counters.ahead += pending is not None
                    held = self._holdings.add(layer, lease)
        assert held is not None
        return held

    def _wait_lease(self, layer: int, pending: PendingLease | None) -> Lease:
        deadline = monotonic() + LIMIT_WAIT_S
        while True:
            released = self._released
            try:
                return self.opened.acquire(layer) if pending is None else pending.resolve()
            except LeaseLimit:
                pending = None
                with self._left:
                    self._starved = True
                    requests, idle = self._take_idle()
                    stuck = not requests and not idle and self._released == released
                    if stuck and not self._wait_room(released, deadline):
                        raise
                self._release_unused(idle)
                for request in requests:
                    # Not cancelled: that gives back the grant only when it comes.
                    with suppress(Refused):
                        request.resolve().release()

    def _wait_room(self, released: int, deadline: float) -> bool:
        """Wait until more leases than `released` were given back; False when none will be."""
        # What is left is computed with. Another thread will leave; this one cannot.
        mine = sum(self._place.inside.values())
        others = self._holdings.users - mine + self._leaving
        if others:
            left = deadline - monotonic()
            return self._left.wait_for(lambda: self._released != released, left)
        self._left.wait(RETRY_S)
        return monotonic() < self._settled_at

    def _take_idle(self) -> tuple[list[PendingLease], list[Lease]]:
        """Take out all that nobody is in: requests ahead, and leases."""
        self._asked_by.clear()
        requests = list(self._pending.values())
        self._pending.clear()
        idle = self._holdings.take_idle()
        self._leaving += len(idle)
        return requests, idle

    # ---------------------------------------------------------------------------------------- ahead

    def _ask_ahead(self, layer: int) -> None:
        me = threading.get_ident()
        idle: list[Lease] = []
        with self._lock:
            if self._starved or self._closed:
                return
            # What this thread asked for and did not enter was a wrong guess.
            for wrong in [at for at, who in self._asked_by.items() if who == me and at != layer]:
                del self._asked_by[wrong]
                self._holdings.unwant(wrong)
                if wrong in self._pending:
                    self._pending.pop(wrong).cancel()
                    self._settled_at = monotonic() + CANCEL_S
            self._asked_by[layer] = me
            wanted = self._holdings.want(layer)
            if self.opened.pressed:
                idle = self._holdings.take_kept()
                self._leaving += len(idle)
            if not wanted and layer not in self._pending and layer != self._asking:
                self._pending[layer] = self.opened.acquire_ahead(layer)
        self._release_unused(idle)

    # --------------------------------------------------------------------------------------- passes

    def begin_pass(self) -> None:
        """A forward pass of the whole model begins in this thread. Raises what `check` raises."""
        self.check()
        self.opened.look()
        self._course.begin_pass()

    def end_pass(self) -> None:
        """The pass ended well: the first one shows the order in which layers are used."""
        self._course.end_pass()

    # ------------------------------------------------------------------------------------------ end

    def tend(self, quiet_s: float | None = None) -> None:
        """Give back what is kept, if memory is short, or if no layer was used for `quiet_s`."""
        with self._lock:
            quiet = quiet_s is not None and monotonic() - self._used_at > quiet_s
            quiet = quiet and not self._holdings.users
            kept = self._holdings.take_kept() if quiet or self.opened.pressed else []
            self._leaving += len(kept)
        self._release_unused(kept)

    def abandon(self) -> None:
        """Let go of all that nobody is in: the connection is lost, and nobody will enter again."""
        with self._lock:
            requests, idle = self._take_idle()
        for request in requests:
            request.cancel()
        self._release_unused(idle)

    def close(self) -> None:
        """Give back what nobody is in, refuse new entries; the rest goes back as it is left."""
        if self._life is not fork.current():
            return
        with self._lock:
            self._closed = True
        self.abandon()

    def counters(self) -> LeasingCounters:
        """A copy of the sums."""
        with self._lock:
            return replace(self._counters)
