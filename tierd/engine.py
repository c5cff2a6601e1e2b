"""The core and the world around it: events in, actions carried out, completions back in.

Nothing is decided here. Every action is written to the slot table before it takes effect. With
GPUs the core is a `TierStack` around the machine of DRAM; without, it is that machine alone.
"""

from __future__ import annotations

import asyncio
import collections
import time
from typing import TYPE_CHECKING, Any

from tierd.core import model as core_model
from tierd.core.machine import TierMachine
from tierd.core.model import (
    Admit,
    Discard,
    Done,
    Evict,
    Grant,
    Later,
    Read,
    Refuse,
    Tick,
)
from tierd.core.stack import TierStack
from tierd.core.stack_model import Copy, DirectRead, StackConfig, StopCopy, Unload
from tierd.operators import Operators
from tierd.pressure import Pressure
from tierd.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tierd.arenas import Arenas
    from tierd.core.model import CoreConfig
    from tierd.core.stack_model import StackAction, StackEvent
    from tierd.io.ssd import ReaderPool
    from tierd.registry import Registry
    from tierd.session import Session
    from tierd.slots import Slots
    from tierd.tiers import Tiers


TICK_NS = 1_000_000_000  # while a decision of the core is a matter of time
TELL_SECONDS = 0.002  # after which clients can see whether memory is wanted: not in every answer
SOONEST_TICK_NS = 1_000_000  # the resolution of the loop's timers


class Engine:
    """Owns the core. Everything it touches belongs to the loop's thread."""

    def __init__(
        self,
        config: CoreConfig,
        slots: Slots,
        arenas: Arenas,
        pool: ReaderPool,
        registry: Registry,
        sessions: Mapping[int, Session],
        tiers: Tiers | None = None,
    ) -> None:
        """sessions: those that said hello, by client; the owner keeps it up to date. tiers: where
        there are GPUs."""
        self.config = config
        self.stack: TierStack | None = None  #: None without GPUs
        self.machine: TierMachine  #: of DRAM
        if tiers is None or not tiers.gpus:
            self.machine = TierMachine(config)
            self.core: Any = self.machine  #: what takes events and decides
        else:
            gpus = tuple(gpu.core_config for gpu in tiers.gpus)
            direct = tuple(gpu.direct is not None for gpu in tiers.gpus)
            stack = StackConfig(config, gpus, early=True, direct=direct)
            self.core = self.stack = TierStack(stack)
            self.machine = self.stack.dram
        self._tiers = tiers
        self.slots = slots
        self.transfers = Transfers(self.submit, slots, arenas, pool, registry, tiers)
        self._sessions = sessions
        self._events: collections.deque[StackEvent] = collections.deque()
        self._deciding = False
        self._tick: asyncio.TimerHandle | None = None
        self._tick_at_ns = 0
        self._telling: asyncio.TimerHandle | None = None
        self._stopped = False
        self._asked: dict[int, Callable[[Done | Refuse], None]] = {}  # by request of an operator
        self._requests = 0
        self.heard = 0  #: events so far
        self.pressure = Pressure(slots.table, self.now())  #: in DRAM
        self.operators = Operators(self, registry)

    @staticmethod
    def now() -> int:
        return time.monotonic_ns()

    def submit(self, event: StackEvent) -> None:
        """Hand an event to the core and do what it decides. Events that come up meanwhile wait."""
        if self._stopped:
            return
        self.heard += 1
        self._events.append(event)
        if self._deciding:
            return
        self._deciding = True
        try:
            while self._events:
                for action in self.core.handle(self._events.popleft()):
                    self._execute(action)
        finally:
            self._deciding = False
        if self.core.waits_for_time:
            self._tick_soon()
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(TELL_SECONDS, self._tell_pressed)

    def _tell_pressed(self) -> None:
        """Write down for the clients of each tier whether they may keep leases."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        now_ns = self.now()
        self.pressure.tell(self.machine.pressed, now_ns)
        if self.stack is not None:
            assert self._tiers is not None
            for gpu in self._tiers.gpus:
                gpu.pressure.tell(self.stack.pressed(gpu.index), now_ns)

    def command(
        self, event: Callable[[int], StackEvent], answered: Callable[[Done | Refuse], None]
    ) -> None:
        """Submit what an operator wants, made with a request number of its own."""
        self._requests += 1
        self._asked[self._requests] = answered
        self.submit(event(self._requests))

    def _tick_soon(self) -> None:
        """A tick within the usual time, or when the core has to decide something."""
        now, wakes_at_ns = self.now(), self.core.wakes_at_ns
        tick_at_ns = now + TICK_NS
        if wakes_at_ns is not None:
            tick_at_ns = min(tick_at_ns, max(wakes_at_ns, now + SOONEST_TICK_NS))
        if self._tick is not None:
            if self._tick_at_ns <= tick_at_ns:
                return
            self._tick.cancel()
        # Kept here: for a delay below its resolution, uvloop returns a handle that has no time.
        self._tick_at_ns = tick_at_ns
        loop = asyncio.get_running_loop()
        self._tick = loop.call_later((tick_at_ns - now) / 1e9, self._time_passed)

    def _time_passed(self) -> None:
        self._tick = None
        self.submit(Tick(self.now()))

    def stop(self) -> None:
        """Decide nothing more, and leave the slot table as it is: whoever holds a lease may read
        on, and the next daemon will respect it."""
        self._stopped = True
        self.transfers.stop()
        for timer in (self._tick, self._telling):
            if timer is not None:
                timer.cancel()

    def _execute(self, action: StackAction) -> None:
        match action:
            case Grant():
                self._grant(action)
            case Read():
                self.transfers.read(action)
            case Evict():
                self.transfers.evict(action.slot)
            case Copy():
                self.transfers.copy(action)
            case StopCopy():
                self.transfers.stop_copy(action)
            case DirectRead():
                self.transfers.read_directly(action)
            case Unload():
                self.transfers.unload(action)
            case Discard():
                self.transfers.discard(action)
            case Later():
                if session := self._sessions.get(action.client):
                    session.told_later(action)
            case Admit():
                self._tell_pressed()  # it may look at once
                if session := self._sessions.get(action.client):
                    session.plan_admitted(action)
            case Done() | Refuse(client=core_model.OPERATOR):
                self._asked.pop(action.request)(action)
            case Refuse():
                if session := self._sessions.get(action.client):
                    session.refused(action)

    def _grant(self, grant: Grant) -> None:
        session = self._sessions.get(grant.client)
        if session is None:
            return  # its ClientGone waits behind this event and frees the lease
        pid, started = session.process
        session.slots.lease(
            grant.lease, pid=pid, start_time=started, slot=grant.slot, generation=grant.generation
        )
        session.lease_granted(grant)
