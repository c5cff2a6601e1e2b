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
from tierd.core.stack_feeds import Feeds
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

if TYPE_CHECKING:
    from tierd.core.machine import TierMachine
    from tierd.core.prediction import Load


class TierStack:
    """The DRAM of a node, its GPUs, and the clients of all of them."""

    def __init__(self, config: StackConfig) -> None:
        self.config = config
        self.feeds = Feeds(config)
        self.measured: dict[int, GpuMeasured] = {}  #: by GPU, the last figure
        self.fencing: dict[int, int] = {}  #: clients that are gone, not yet fenced -> their GPU
        self._gpu_of: dict[int, int] = {}  #: by client; those of DRAM are not in it
        self._gpu_of_arena: dict[int, int] = {}
        self._models: dict[int, ModelAdded] = {}
        self._placed: dict[int, list[int]] = {}  #: by model: its GPUs

    @property
    def dram(self) -> TierMachine:
        return self.feeds.books.dram

    @property
    def gpus(self) -> tuple[TierMachine, ...]:
        return self.feeds.books.gpus

    def handle(self, event: StackEvent) -> list[StackAction]:
        """Takes one event, returns what is to be done, in this order.

        Raises IllegalEvent for what cannot happen now, and is then as it was before.
        """
        books = self.feeds.books
        before_ns = books.now
        books.now = max(before_ns, event.at_ns)
        books.actions = []
        try:
            self._take(event)
        except IllegalEvent:
            books.now = before_ns
            raise
        self.feeds.work_off()
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
        return loads_of_stack(self.feeds.books)

    def copy_bandwidths(self) -> dict[int, int]:
        """Bytes per second of the links that were measured, by GPU, for `predict`."""
        return {gpu: measured.bytes_per_s for gpu, measured in self.measured.items()}

    def check(self) -> None:
        """Raises InvariantBroken where a machine or the composition contradicts itself."""
        self.dram.check()
        for gpu in self.gpus:
            gpu.check()
        check_stack(self.feeds)

    # -------------------------------------------------------------------------------------- events

    def _take(self, event: StackEvent) -> None:
        """The event to its machine. Whatever is illegal raises before anything changes."""
        feeds = self.feeds
        match event:
            case Acquire():
                gpu = self._tier_of(event.client)
                feeds.deliver(gpu, event)
                if gpu is not None:
                    feeds.plans.asked(event.client, gpu, event.key)
            case Release():
                feeds.deliver(self._tier_of(event.client), event)
            case CopyDone():
                done = ReadDone(event.at_ns, event.slot)
                self._copied(event, done)
            case CopyFailed():
                failed = ReadFailed(event.at_ns, event.slot, event.code, event.text)
                self._copied(event, failed)
            case Plan():
                gpu = self._tier_of(event.client)
                if gpu is not None and gpu in self._placed.get(event.model, ()):
                    feeds.plan(gpu, event)
                else:
                    feeds.deliver(gpu, event)
            case PlanOver():
                gpu = self._tier_of(event.client)
                feeds.deliver(gpu, event)
                feeds.plans.over(event)
            case Hint():
                feeds.deliver(self._tier_of(event.client), event)
                feeds.plans.hinted(event)
            case DiscardDone():
                feeds.deliver(self._gpu_of_arena.get(event.arena), event)
            case JoinedGpu() | ClientJoined() | ClientGone() | Fenced():
                self._come_or_go(event)
            case Tick():
                for gpu in (None, *range(len(self.gpus))):
                    feeds.deliver(gpu, event)
            case TierBudgetChanged():
                if event.gpu is not None:
                    self._check_gpu(event.gpu)
                changed = BudgetChanged(event.at_ns, event.request, event.budget_bytes)
                feeds.deliver(event.gpu, changed)
            case GpuMeasured():
                self._check_gpu(event.gpu)
                if event.bytes_per_s < 1:
                    raise self._illegal(f"no GPU copies like this: {event}")
                self.measured[event.gpu] = event
            case GpuArenaAdded() | ArenaAdded() | ModelPlaced() | ModelAdded() | ModelRemoved():
                self._set_up(event)
            case _:
                feeds.deliver(None, event)

    def _copied(self, event: CopyDone | CopyFailed, read: ReadDone | ReadFailed) -> None:
        found = None
        if 0 <= event.gpu < len(self.gpus):
            found = self.feeds.copies.copying(event.gpu, event.slot)
        if found is None:
            raise self._illegal(f"slot {event.slot} of GPU {event.gpu} is not being copied to")
        if isinstance(event, CopyDone) and (why := not_whole(found[1])) is not None:
            raise self._illegal(f"slot {event.slot} of GPU {event.gpu} cannot be whole: {why}")
        self.feeds.books.todo.append((event.gpu, read))
        self.feeds.copies.copied(*found)

    def _come_or_go(self, event: JoinedGpu | ClientJoined | ClientGone | Fenced) -> None:
        client = event.client
        match event:
            case JoinedGpu():
                self._check_new(client)
                self._check_gpu(event.gpu)
                joined = ClientJoined(event.at_ns, client, event.weight)
                self.feeds.deliver(event.gpu, joined)
                self._gpu_of[client] = event.gpu
            case ClientJoined():
                self._check_new(client)
                self.feeds.deliver(None, event)
            case ClientGone():
                gpu = self._tier_of(client)
                if gpu is None:
                    self.feeds.deliver(None, event)
                    return
                self.feeds.deliver(gpu, ClientGone(event.at_ns, client, holder=client))
                del self._gpu_of[client]
                self.fencing[client] = gpu
                self.feeds.plans.forget(client, gpu)
            case Fenced():
                if client not in self.fencing:
                    raise self._illegal(f"client {client} is not on its way out of a GPU")
                gone = HolderGone(event.at_ns, client)
                self.feeds.deliver(self.fencing.pop(client), gone)

    def _set_up(
        self, event: GpuArenaAdded | ArenaAdded | ModelPlaced | ModelAdded | ModelRemoved
    ) -> None:
        match event:
            case ArenaAdded():
                self._check_new_arena(event.arena)
                self.feeds.deliver(None, event)
            case GpuArenaAdded():
                self._check_new_arena(event.arena)
                self._check_gpu(event.gpu)
                added = ArenaAdded(event.at_ns, event.arena, event.span_bytes, event.warm_bytes)
                self.feeds.deliver(event.gpu, added)
                self._gpu_of_arena[event.arena] = event.gpu
            case ModelAdded():
                self.feeds.deliver(None, event)
                self._models[event.model] = event
                self._placed[event.model] = []
            case ModelPlaced():
                model = self._model(event.model)
                self._check_gpu(event.gpu)
                placed = ModelAdded(
                    event.at_ns, event.model, model.name, event.arena, model.layer_bytes
                )
                self.feeds.deliver(event.gpu, placed)
                self._placed[event.model].append(event.gpu)
            case ModelRemoved():
                self._model(event.model)
                del self._models[event.model]
                # GPUs first: what they still read then fails in DRAM, with the same code.
                for gpu in self._placed.pop(event.model):
                    self.feeds.deliver(gpu, event)
                self.feeds.deliver(None, event)
                self.feeds.plans.drop(event.model)

    # ------------------------------------------------------------------------------------- what is

    def _tier_of(self, client: int) -> int | None:
        """The client's GPU; None for DRAM, whose machine knows whether it is connected."""
        if client < 0:
            raise self._illegal(f"client {client}: ids below 0 belong to the stack")
        return self._gpu_of.get(client)

    def _check_new(self, client: int) -> None:
        if self._tier_of(client) is not None or client in self.dram.books.clients:
            raise self._illegal(f"client {client} is connected")
        if client in self.fencing:
            raise self._illegal(f"client {client} left GPU {self.fencing[client]}: not fenced yet")

    def _check_new_arena(self, arena: int) -> None:
        if arena in self._gpu_of_arena or self.dram.books.memory.has_arena(arena):
            raise self._illegal(f"arena {arena} exists")

    def _model(self, model: int) -> ModelAdded:
        found = self._models.get(model)
        if found is None:
            raise self._illegal(f"model {model} is not served")
        return found

    def _check_gpu(self, gpu: int) -> None:
        if not 0 <= gpu < len(self.gpus):
            raise self._illegal(f"there is no GPU {gpu}; this node has {len(self.gpus)}")

    def _illegal(self, text: str) -> IllegalEvent:
        return self.dram.books.illegal(text)
