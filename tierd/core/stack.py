"""Three tiers: one DRAM `TierMachine` and one for each GPU, composed by nothing but their events.

What a GPU's machine wants to `Read` is asked of the DRAM machine by a pseudo-client (`stack_feed`);
its `Grant` is a `Copy`, whose completion fills the slot of the GPU and releases the lease in DRAM:

    GPU Read -> Acquire -> (SSD Read -> ReadDone ->) Grant -> Copy -> CopyDone -> ReadDone, Release

So a client on a GPU is granted what is there, and every promise of a tier is that of its machine.
Why nothing waits for ever in the composition: README.md beside this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.errors import IllegalEvent
from tierd.core.model import (
    Acquire,
    ArenaAdded,
    BudgetChanged,
    ClientGone,
    ClientJoined,
    DiscardDone,
    Hint,
    HolderGone,
    ModelAdded,
    ModelRemoved,
    Plan,
    PlanOver,
    ReadDone,
    ReadFailed,
    Release,
    Tick,
)
from tierd.core.stack_check import check_stack
from tierd.core.stack_copies import not_whole
from tierd.core.stack_exchange import Exchange
from tierd.core.stack_model import (
    CopyDone,
    CopyFailed,
    Fenced,
    GpuArenaAdded,
    GpuMeasured,
    JoinedGpu,
    ModelPlaced,
    StackAction,
    StackConfig,
    StackEvent,
    TierBudgetChanged,
)
from tierd.core.stack_outlook import loads_of_stack
from tierd.core.stack_roster import Roster

if TYPE_CHECKING:
    from tierd.core.machine import TierMachine
    from tierd.core.prediction import Load


class TierStack:
    """The DRAM of a node, its GPUs, and the clients of all of them."""

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self.exchange = Exchange(config)
        self.measured: dict[int, GpuMeasured] = {}  #: by GPU, the last figure
        self._roster = Roster(self.exchange.books)

    @property
    def dram(self) -> TierMachine:
        return self.exchange.books.dram

    @property
    def gpus(self) -> tuple[TierMachine, ...]:
        return self.exchange.books.gpus

    def handle(self, event: StackEvent) -> list[StackAction]:
        """Takes one event, returns what is to be done, in this order.

        Raises IllegalEvent for what cannot happen now, and is then as it was before.
        """
        books = self.exchange.books
        before_ns = books.now
        books.now = max(before_ns, event.at_ns)
        books.actions = []
        try:
            self._take(event)
        except IllegalEvent:
            books.now = before_ns
            raise
        self.exchange.work_off()
        return books.actions

    def pressed(self, gpu: int | None) -> bool:
        """Whether clients of the tier should give back leases that they keep (`TierMachine`)."""
        return (self.dram if gpu is None else self.gpus[gpu]).pressed

    @property
    def waits_for_time(self) -> bool:
        """Whether something is decided by time alone: then send a `Tick` now and then."""
        return self.dram.waits_for_time or any(gpu.waits_for_time for gpu in self.gpus)

    @property
    def wakes_at_ns(self) -> int | None:
        """When at the latest a `Tick` is needed; None if time alone changes nothing by then."""
        times = [machine.wakes_at_ns for machine in (self.dram, *self.gpus)]
        return min((time for time in times if time is not None), default=None)

    def loads(self) -> list[Load]:
        """What a pass of each client asks of disks and of links to GPUs, for `predict`."""
        return loads_of_stack(self.exchange.books)

    def copy_bandwidths(self) -> dict[int, int]:
        """Bytes per second of the links that were measured, by GPU, for `predict`."""
        return {gpu: measured.bytes_per_s for gpu, measured in self.measured.items()}

    def check(self) -> None:
        """Raises InvariantBroken where a machine or the composition contradicts itself."""
        self.dram.check()
        for gpu in self.gpus:
            gpu.check()
        check_stack(self.exchange)

    # -------------------------------------------------------------------------------------- events

    def _take(self, event: StackEvent) -> None:
        """The event to its machine. Whatever is illegal raises before anything changes."""
        exchange = self.exchange
        match event:
            case Acquire():
                gpu = self._roster.tier_of(event.client)
                exchange.deliver(gpu, event)
                if gpu is not None:
                    exchange.plans.asked(event.client, gpu, event.key)
            case Release():
                exchange.deliver(self._roster.tier_of(event.client), event)
            case CopyDone():
                done = ReadDone(event.at_ns, event.slot)
                self._copied(event, done)
            case CopyFailed():
                failed = ReadFailed(event.at_ns, event.slot, event.code, event.text)
                self._copied(event, failed)
            case Plan():
                gpu = self._roster.tier_of(event.client)
                if gpu is not None and gpu in self._roster.placed.get(event.model, ()):
                    exchange.plan(gpu, event)
                else:
                    exchange.deliver(gpu, event)
            case PlanOver():
                gpu = self._roster.tier_of(event.client)
                exchange.deliver(gpu, event)
                exchange.plans.over(event)
            case Hint():
                exchange.deliver(self._roster.tier_of(event.client), event)
                exchange.plans.hinted(event)
            case DiscardDone():
                exchange.deliver(self._roster.gpu_of_arena.get(event.arena), event)
            case JoinedGpu() | ClientJoined() | ClientGone() | Fenced():
                self._come_or_go(event)
            case Tick():
                for gpu in (None, *range(len(self.gpus))):
                    exchange.deliver(gpu, event)
            case TierBudgetChanged():
                if event.gpu is not None:
                    self._roster.check_gpu(event.gpu)
                changed = BudgetChanged(event.at_ns, event.request, event.budget_bytes)
                exchange.deliver(event.gpu, changed)
            case GpuMeasured():
                self._roster.check_gpu(event.gpu)
                if event.bytes_per_s < 1:
                    raise self._roster.illegal(f"no GPU copies like this: {event}")
                self.measured[event.gpu] = event
            case GpuArenaAdded() | ArenaAdded() | ModelPlaced() | ModelAdded() | ModelRemoved():
                self._set_up(event)
            case _:
                exchange.deliver(None, event)

    def _copied(self, event: CopyDone | CopyFailed, read: ReadDone | ReadFailed) -> None:
        found = None
        if 0 <= event.gpu < len(self.gpus):
            found = self.exchange.copies.copying(event.gpu, event.slot)
        slot = f"slot {event.slot} of GPU {event.gpu}"
        if found is None:
            raise self._roster.illegal(f"{slot} is not being copied to")
        if isinstance(event, CopyDone) and (why := not_whole(found[1])) is not None:
            raise self._roster.illegal(f"{slot} cannot be whole: {why}")
        self.exchange.books.todo.append((event.gpu, read))
        self.exchange.copies.copied(*found)

    def _come_or_go(self, event: JoinedGpu | ClientJoined | ClientGone | Fenced) -> None:
        client = event.client
        match event:
            case JoinedGpu():
                self._roster.check_new(client)
                self._roster.check_gpu(event.gpu)
                joined = ClientJoined(event.at_ns, client, event.weight)
                self.exchange.deliver(event.gpu, joined)
                self._roster.gpu_of[client] = event.gpu
            case ClientJoined():
                self._roster.check_new(client)
                self.exchange.deliver(None, event)
            case ClientGone():
                gpu = self._roster.tier_of(client)
                if gpu is None:
                    self.exchange.deliver(None, event)
                    return
                self.exchange.deliver(gpu, ClientGone(event.at_ns, client, holder=client))
                del self._roster.gpu_of[client]
                self._roster.fencing[client] = gpu
                self.exchange.plans.forget(client, gpu)
            case Fenced():
                if client not in self._roster.fencing:
                    raise self._roster.illegal(f"client {client} is not on its way out of a GPU")
                gone = HolderGone(event.at_ns, client)
                self.exchange.deliver(self._roster.fencing.pop(client), gone)

    def _set_up(
        self, event: GpuArenaAdded | ArenaAdded | ModelPlaced | ModelAdded | ModelRemoved
    ) -> None:
        match event:
            case ArenaAdded():
                self._roster.check_new_arena(event.arena)
                self.exchange.deliver(None, event)
            case GpuArenaAdded():
                self._roster.check_new_arena(event.arena)
                self._roster.check_gpu(event.gpu)
                added = ArenaAdded(event.at_ns, event.arena, event.span_bytes, event.warm_bytes)
                self.exchange.deliver(event.gpu, added)
                self._roster.gpu_of_arena[event.arena] = event.gpu
            case ModelAdded():
                self.exchange.deliver(None, event)
                self._roster.models[event.model] = event
                self._roster.placed[event.model] = []
            case ModelPlaced():
                model = self._roster.model(event.model)
                self._roster.check_gpu(event.gpu)
                placed = ModelAdded(
                    event.at_ns, event.model, model.name, event.arena, model.layer_bytes
                )
                self.exchange.deliver(event.gpu, placed)
                self._roster.placed[event.model].append(event.gpu)
            case ModelRemoved():
                self._roster.model(event.model)
                del self._roster.models[event.model]
                # GPUs first: what they still read then fails in DRAM, with the same code.
                for gpu in self._roster.placed.pop(event.model):
                    self.exchange.deliver(gpu, event)
                self.exchange.deliver(None, event)
                self.exchange.plans.drop(event.model)
