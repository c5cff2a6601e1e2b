"""Leases of a running model: taken as its layers are entered, one ahead, given back as they end.

All threads of a process that run one model share a `LayerLeases`. Per layer there is at most one
lease, with a count of the threads that are inside. A thread holds one layer at a time and asks for
the next one of the plan ahead, so a resident layer costs no round trip in front of the compute.

Two threads may hold more than the daemon has reserved for this client; the daemon then refuses with
`LeaseLimit`. The refused thread waits until another leaves a layer. Nobody waits for the *turn*
(the right to ask) while holding a layer that a waiter needs gone, so somebody always moves on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING

from tierd_client import fork
from tierd_client.errors import ClientClosed, LeaseLimit

if TYPE_CHECKING:
    from tierd_client.lease import Lease, PendingLease
    from tierd_client.opened import OpenedModel

#: A thread that waits for another one to leave a layer gives up after this long.
LIMIT_WAIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a model's forward passes have cost since it was loaded, over all threads.

    stall_ns: time spent waiting for layers. ahead: entries that found their layer asked for ahead.
    expand_ns: expanding into scratch; fused_ns: multiplying straight from the packed form.
    private_bytes: norms, biases and scratch, the model's own memory beside the shared arena.
    """

    entries: int
    leases: int
    ahead: int
    stall_ns: int
    expansions: int
    expand_ns: int
    fused_calls: int
    fused_ns: int
    private_bytes: int


@dataclass(slots=True)
class Held:
    """A lease and how many threads are inside its layer. `kept`: asked for again while held."""

    lease: Lease
    users: int
    kept: bool = False


@dataclass(slots=True)
class _Place(threading.local):
    """Where one thread is in the plan."""

    position: int = 0
    #: Layers entered in the pass that is under way, while the order is being learned.
    trace: list[int] | None = None


@dataclass(slots=True)
class Counters:
    """Sums behind `Statistics`, guarded by the lock of `LayerLeases`."""

    entries: int = 0
    leases: int = 0
    ahead: int = 0
    stall_ns: int = 0


class LayerLeases:
    """The leases of one opened model. Thread-safe.

    order: layer numbers in the expected order of use in one pass; a tied head repeats its layer.
    It is declared to the daemon as a cyclic plan, and replaced by the order that the first whole
    forward pass shows.
    """

    def __init__(self, opened: OpenedModel, order: Sequence[int]) -> None:
        self.opened = opened
        self._life = fork.current()
        self._closed = False
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._left = threading.Condition(self._lock)
        self._held: dict[int, Held] = {}
        self._pending: dict[int, PendingLease] = {}
        self._asked_by: dict[int, int] = {}  # layer asked for ahead: thread
        self._asking: int | None = None  # layer that the holder of the turn is acquiring
        self._starved = False  # somebody was refused and waits: nobody asks ahead
        self._counters = Counters()
        self._place = _Place()
        self._learned = False
        self._order: tuple[int, ...] = ()
        self._declare(order)

    @property
    def order(self) -> tuple[int, ...]:
        """The plan: layer numbers in the order of use."""
        return self._order

    def check(self) -> None:
        """Raise ForkedClient in a forked child, ClientClosed after `close`."""
        fork.check(self._life, f"model {self.opened.name!r}")
        if self._closed:
            raise ClientClosed(f"model {self.opened.name!r} was closed")

    # --------------------------------------------------------------------------------- enter, leave

    def enter(self, layer: int, prepare: Callable[[Lease], None] | None = None) -> Lease:
        """The lease of `layer`, until `leave(layer)`; asks for its successor ahead.

        prepare: called with the lease, by one thread at a time, before `enter` returns.
        Raises what `OpenedModel.acquire` raises; then there is nothing to leave.
        """
        self.check()
        following = self._advance(layer)
        lease = self._take(layer)
        try:
            if prepare is not None:
                with self._lock:
                    prepare(lease)
            if following is not None:
                self._ask_ahead(following)
        except BaseException:
            self.leave(layer)
            raise
        return lease

    def leave(self, layer: int) -> None:
        """End one `enter`. Raises LeaseLost, ViewStillAlive; the layer is left nevertheless."""
        with self._left:
            held = self._held[layer]
            held.users -= 1
            ended = not held.users and (not held.kept or self._starved or self._closed)
            if ended:
                del self._held[layer]
                self._left.notify_all()
        if ended:
            held.lease.release()

    def _take(self, layer: int) -> Lease:
        with self._lock:
            self._counters.entries += 1
            held = self._join(layer)
        if held is None:
            with self._turn:
                held = self._acquire(layer)
        return held.lease

    def _join(self, layer: int) -> Held | None:
        held = self._held.get(layer)
        if held is not None:
            if held.kept:
                self._counters.ahead += 1
                held.kept = False
            held.users += 1
        return held

    def _acquire(self, layer: int) -> Held:
        """Get a lease from the daemon. The caller has the turn."""
        with self._lock:
            held = self._join(layer)  # somebody who had the turn before may have brought it
            if held is not None:
                return held
            self._asking = layer
            pending = self._pending.pop(layer, None)
        begin = perf_counter_ns()
        try:
            lease = self._wait_lease(layer, pending)
        finally:
            with self._lock:
                self._asking = None
                self._starved = False
        with self._lock:
            self._counters.stall_ns += perf_counter_ns() - begin
            self._counters.leases += 1
            self._counters.ahead += pending is not None
            held = self._held[layer] = Held(lease, users=1)
        return held

    def _wait_lease(self, layer: int, pending: PendingLease | None) -> Lease:
        deadline = monotonic() + LIMIT_WAIT_S
        while True:
            try:
                return self.opened.acquire(layer) if pending is None else pending.resolve()
            except LeaseLimit:
                pending = None
                with self._left:
                    self._starved = True
                    idle = self._take_idle()
                    if not idle:
                        # Only what others compute with is left. They end: wait for one that does.
                        waited = bool(self._held) and self._left.wait(deadline - monotonic())
                        if not waited:
                            raise
                for held in idle:
                    held.lease.release()

    def _take_idle(self) -> list[Held]:
        """Give up everything that was only asked for ahead: requests, and leases nobody is in."""
        for request in self._pending.values():
            request.cancel()
        self._pending.clear()
        idle = [layer for layer, held in self._held.items() if not held.users]
        return [self._held.pop(layer) for layer in idle]

    # ---------------------------------------------------------------------------------------- ahead

    def _advance(self, layer: int) -> int | None:
        """Note that this thread is at `layer`; the layer after it in the plan."""
        place, order = self._place, self._order
        if place.trace is not None:
            place.trace.append(layer)
        for step in range(len(order)):
            position = (place.position + step) % len(order)
            if order[position] == layer:
                place.position = (position + 1) % len(order)
                return order[place.position]
        return None  # not in the plan: it says nothing about what follows

    def _ask_ahead(self, layer: int) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._starved or self._closed:
                return
            # What this thread asked for and did not enter was a wrong guess.
            stale = [at for at, who in self._asked_by.items() if who == me and at != layer]
            for at in stale:
                del self._asked_by[at]
                if at in self._pending:
                    self._pending.pop(at).cancel()
            self._asked_by[layer] = me
            held = self._held.get(layer)
            if held is not None:
                held.kept = True
            elif layer not in self._pending and layer != self._asking:
                self._pending[layer] = self.opened.acquire_ahead(layer)

    # ----------------------------------------------------------------------------------------- plan

    def begin_pass(self) -> None:
        """A forward pass of the whole model begins in this thread."""
        self.check()
        self._place.position = 0
        if not self._learned:
            self._place.trace = []

    def end_pass(self) -> None:
        """The pass ended well: the first one shows the order in which layers are used."""
        trace, self._place.trace = self._place.trace, None
        if not trace:
            return
        with self._lock:
            if self._learned:
                return
            self._learned = True
        if tuple(trace) != self._order:
            self._declare(trace)

    def _declare(self, order: Sequence[int]) -> None:
        names = [self.opened.index.layers[layer].name for layer in order]
        self.opened.plan(names, cyclic=True, lookahead=1)
        self._order = tuple(order)

    # ------------------------------------------------------------------------------------------ end

    def close(self) -> None:
        """Give back what nobody is in; what is in use is given back as it is left."""
        with self._lock:
            self._closed = True
            idle = self._take_idle()
        for held in idle:
            held.lease.release()

    def counters(self) -> Counters:
        """A copy of the sums."""
        with self._lock:
            now = self._counters
            return Counters(now.entries, now.leases, now.ahead, now.stall_ns)
