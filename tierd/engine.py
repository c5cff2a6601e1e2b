"""The core and the world around it: events in, actions carried out, completions back in.

Nothing is decided here. Every action is written to the slot table before it takes effect. With
GPUs the core is a `TierStack` around the machine of DRAM; without, it is that machine alone.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from typing import TYPE_CHECKING, Any

from tierd.copy_sources import CopySources
from tierd.core import model as core_model
from tierd.core.machine import TierMachine
from tierd.core.model import (
    Admit,
    Discard,
    DiscardDone,
    Done,
    Evict,
    Grant,
    Later,
    Read,
    ReadDone,
    ReadFailed,
    Refuse,
    Tick,
)
from tierd.core.stack import TierStack
from tierd.core.stack_model import Copy, DirectRead, StackConfig, StopCopy, Unload
from tierd.errors import ReadError
from tierd.gpu_filling import Source
from tierd.io.ssd_job import ReadJob, ReadResult
from tierd.io.verified import VerifiedBlocks
from tierd.operators import Operators
from tierd.pressure import Pressure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tierd.arenas import Arenas
    from tierd.core.model import CoreConfig
    from tierd.core.stack_model import StackAction, StackEvent
    from tierd.io.ssd import ReaderPool
    from tierd.pack import Pack
    from tierd.registry import Registry
    from tierd.session import Session
    from tierd.slots import Slots
    from tierd.tiers import Tiers

log = logging.getLogger(__name__)

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
            registry.closing = tiers.closing
            self.machine = self.stack.dram
        self._tiers = tiers
        self.slots = slots
        self.reads = 0  #: in flight
        self._arenas = arenas
        self._pool = pool
        self._registry = registry
        self._sessions = sessions
        self._events: collections.deque[StackEvent] = collections.deque()
        self._deciding = False
        self._held: list[tuple[Read, Pack]] | None = None
        self._verified: dict[int, VerifiedBlocks] = {}  # by slot of DRAM that is being filled
        self._sources = CopySources()
        self._tick: asyncio.TimerHandle | None = None
        self._tick_at_ns = 0
        self._telling: asyncio.TimerHandle | None = None
        self._stopped = False
        self._asked: dict[int, Callable[[Done | Refuse], None]] = {}  # by request of an operator
        self._requests = 0
        self.pressure = Pressure(slots.table, self.now())  #: in DRAM
        self.operators = Operators(self, registry)
        #: called with the device of every layer that was read
        self.after_read: Callable[[int], None] | None = None

    @staticmethod
    def now() -> int:
        return time.monotonic_ns()

    def submit(self, event: StackEvent) -> None:
        """Hand an event to the core and do what it decides. Events that come up meanwhile wait."""
        if self._stopped:
            return
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
            for gpu in self._gpus.gpus:
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
        for timer in (self._tick, self._telling):
            if timer is not None:
                timer.cancel()

    def hold_reads(self) -> None:
        """Start no read before `resume_reads`: a read takes memory."""
        self._held = []

    def resume_reads(self) -> None:
        held, self._held = self._held or [], None
        for read, pack in held:
            self._start_read(read, pack)

    def _execute(self, action: StackAction) -> None:
        match action:
            case Grant():
                self._grant(action)
            case Read():
                self._read(action)
            case Evict():
                self.slots.clear(action.slot)
            case Copy():
                self._copy(action)
            case StopCopy():
                self._gpus.gpus[action.gpu].filling.stop_copy(action.slot)
            case DirectRead():
                self._read_directly(action)
            case Unload():
                self._gpus.gpus[action.gpu].slots.clear(action.slot)
            case Discard():
                self._discard(action)
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

    def _discard(self, discard: Discard) -> None:
        arena, offset, nbytes = discard.arena, discard.offset, discard.nbytes
        if arena not in self._arenas.by_id:
            self._gpus.of_arena(arena).memory.discard(discard)
            return

        def done() -> None:
            self.submit(DiscardDone(self.now(), arena, offset, nbytes))

        self._sources.when_free(
            arena, offset, nbytes, lambda: self._arenas.discard(arena, offset, nbytes, done)
        )

    @property
    def _gpus(self) -> Tiers:
        assert self._tiers is not None, "an action for a GPU where none is configured"
        return self._tiers

    def _copy(self, copy: Copy) -> None:
        pack = self._registry.by_model[copy.key.model]
        memory = self._arenas.by_id[copy.from_arena].buffer(copy.from_offset, copy.nbytes)
        source = Source(memory)
        if copy.filling:
            place = self._sources.begin(copy.from_arena, copy.from_offset, copy.nbytes)
            verified = self._verified[copy.from_slot]
            source = Source(memory, verified, lambda: self._sources.end(place))
        self._gpus.gpus[copy.gpu].filling.copy(copy, pack, source)

    def _read_directly(self, read: DirectRead) -> None:
        pack = self._registry.by_model[read.key.model]
        pack.reads += 1
        self.reads += 1

        def over() -> None:
            self.reads -= 1
            pack.reads -= 1
            self._registry.close_idle(pack)

        self._gpus.gpus[read.gpu].filling.read(read, pack, over)

    def _read(self, read: Read) -> None:
        pack = self._registry.by_model[read.key.model]
        pack.reads += 1  # from here on, though it may wait: the pack must not be closed meanwhile
        self._verified[read.slot] = VerifiedBlocks()  # a copy may follow from now on
        if self._held is not None:
            self._held.append((read, pack))
        else:
            self._start_read(read, pack)

    def _start_read(self, read: Read, pack: Pack) -> None:
        layer = pack.index.layers[read.key.layer]
        self.slots.filling(
            read.slot,
            generation=read.generation,
            arena=read.arena,
            offset=read.offset,
            nbytes=read.nbytes,
            key=pack.keys[read.key.layer],
        )
        log.debug("reading %s %s into slot %d (%s)", pack.name, layer.name, read.slot, read.reason)
        self.reads += 1
        target = self._arenas.by_id[read.arena].buffer(read.offset, read.nbytes)
        job = ReadJob.of_layer(
            pack.name, layer, pack.index.shards, pack.shards, target, pack.device,
            self._verified[read.slot],
        )  # fmt: skip
        self._pool.submit(job, lambda outcome: self._read_done(read, pack, target, outcome))

    def _read_done(
        self, read: Read, pack: Pack, target: memoryview, outcome: ReadResult | ReadError
    ) -> None:
        target.release()
        self.reads -= 1
        pack.reads -= 1
        del self._verified[read.slot]
        self._registry.close_idle(pack)
        if self._stopped:
            return
        if isinstance(outcome, ReadError):
            log.error("%s", outcome.text)
            self.submit(ReadFailed(self.now(), read.slot, outcome.code, outcome.text))
        else:
            self.slots.resident(read.slot)
            self._arenas.exists(read.arena, read.offset, read.nbytes)
            self.submit(ReadDone(self.now(), read.slot))
            if self.after_read is not None:
                self.after_read(pack.device)
