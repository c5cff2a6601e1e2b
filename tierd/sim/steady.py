"""What a pass costs on a given node, once the first passes are over: the real core, run under
devices that have a bandwidth and a latency, by clients that do what `tierd_client` does.

Deterministic, and fast enough for a command line: nothing is checked here (`simulation` does that).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Admit,
    ArenaAdded,
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Grant,
    Later,
    LayerKey,
    ModelAdded,
    Plan,
    Read,
    ReadDone,
    Refuse,
    Release,
    Tick,
)
from tierd.core.stack import TierStack
from tierd.core.stack_model import (
    Copy,
    CopyDone,
    DirectRead,
    GpuArenaAdded,
    JoinedGpu,
    ModelPlaced,
    StackAction,
    StackConfig,
    StackEvent,
)
from tierd.sim.agenda import Agenda
from tierd.sim.errors import DoesNotFit
from tierd.sim.passes import Mark, Passes

if TYPE_CHECKING:
    from collections.abc import Callable

SECOND_NS = 1_000_000_000
TICK_NS = SECOND_NS  #: as the engine does, while something is decided by time alone
SPANS = 64  #: budgets that the arena's address space holds
COPY_LATENCY_NS = 20_000
BLOCK_BYTES = 4 << 20  #: an early copy is so far behind the read of its layer
DRAM, GPU = 0, 1  #: arenas


@dataclass(frozen=True, slots=True)
class Node:
    """The machine to predict for. Bytes, and bytes per second."""

    dram_bytes: int
    ssd_bytes_per_s: int
    latency_ns: int = 100_000
    reads_in_flight: int = 2
    granule_bytes: int = 2 << 20
    gpu_bytes: int | None = None  #: None: clients compute from DRAM
    copy_bytes_per_s: int = 0  #: from DRAM to the GPU
    direct: bool = False  #: the GPU reads past DRAM what that has not


@dataclass(frozen=True, slots=True)
class Work:
    """What each of `clients` does, for ever. compute_ns: of each step of `order`."""

    layer_bytes: tuple[int, ...]
    order: tuple[int, ...]
    compute_ns: tuple[int, ...]
    clients: int = 1
    tokens_per_pass: int = 1


@dataclass(frozen=True, slots=True)
class SteadyState:
    """Means over the last passes of all clients."""

    pass_ns: int
    stall_ns: int  #: of a pass
    compute_ns: int  #: of a pass
    ssd_bytes: int  #: read for one pass of one client
    ssd_share: float  #: of the time, in which the device was busy
    copy_bytes: int  #: copied to the GPU for one pass of one client
    copy_share: float
    passes: int  #: simulated, of each client
    settled: bool  #: the last passes cost what those before them did

    @property
    def compute_share(self) -> float:
        return self.compute_ns / self.pass_ns if self.pass_ns else 0.0


def steady_state(node: Node, work: Work) -> SteadyState:
    """Runs until a pass costs what the ones before it did. Raises DoesNotFit."""
    return SteadyRun(node, work).run()


@dataclass(slots=True)
class _Device:
    """Transfers one byte after the other; what is asked for meanwhile waits its turn."""

    bytes_per_s: int
    latency_ns: int
    free_ns: int = 0
    busy_ns: int = 0
    nbytes: int = 0

    def done_ns(self, now_ns: int, nbytes: int) -> int:
        takes_ns = nbytes * SECOND_NS // self.bytes_per_s
        self.free_ns = max(self.free_ns, now_ns) + takes_ns
        self.busy_ns += takes_ns
        self.nbytes += nbytes
        return self.free_ns + self.latency_ns


@dataclass(slots=True, eq=False)
class _Client:
    """Computes with one layer, and has asked for the next one ahead."""

    number: int
    step: int = 0  #: into the order
    wanted: int | None = None  #: the layer that it waits for
    since_ns: int = 0
    stall_ns: int = 0
    leases: dict[int, int] = field(default_factory=dict)  #: by layer
    asked: dict[int, int] = field(default_factory=dict)  #: layer by request


class SteadyRun:
    """One run; `tiers` is what decided in it."""

    def __init__(self, node: Node, work: Work) -> None:
        self._work = work
        self._ssd = _Device(node.ssd_bytes_per_s, node.latency_ns)
        self._link = _Device(max(node.copy_bytes_per_s, 1), COPY_LATENCY_NS)
        self._clients = [_Client(number) for number in range(work.clients)]
        self._passes = Passes(work.clients, len(work.order))
        self._agenda = Agenda()
        self._requests = 0
        self._events: deque[StackEvent] = deque()  # the first is being handled
        self._tick_ns: int | None = None  # when the next tick is due
        dram = _tier(node, node.dram_bytes)
        self.tiers: TierMachine | TierStack = TierMachine(dram)
        self._read_ns: dict[int, int] = {}  # by slot in DRAM: when its read ends
        if node.gpu_bytes is not None:
            gpu = _tier(node, node.gpu_bytes)
            self.tiers = TierStack(StackConfig(dram, (gpu,), early=True, direct=(node.direct,)))
        self._feed(ArenaAdded(0, DRAM, SPANS * dram.budget_bytes, dram.budget_bytes))
        self._feed(ModelAdded(0, 0, "predicted", DRAM, work.layer_bytes))
        if isinstance(self.tiers, TierStack):
            budget = self.tiers.config.gpus[0].budget_bytes
            self._feed(GpuArenaAdded(0, 0, GPU, SPANS * budget, budget))
            self._feed(ModelPlaced(0, 0, 0, GPU))

    @property
    def _now(self) -> int:
        return self._agenda.now

    def run(self) -> SteadyState:
        work = self._work
        # Processes do not start together; a pass takes about as long as its slowest stage.
        full_ns = sum(work.layer_bytes) * SECOND_NS // self._ssd.bytes_per_s
        apart_ns = max(sum(work.compute_ns), full_ns) // work.clients
        for client in self._clients:
            self._agenda.after(client.number * apart_ns, lambda client=client: self._join(client))  # type: ignore[misc]
        while self._agenda and not self._passes.over:
            self._agenda.step()
        return self._summary()

    # ------------------------------------------------------------------------------------ clients

    def _join(self, client: _Client) -> None:
        work = self._work
        if isinstance(self.tiers, TierStack):
            self._feed(JoinedGpu(self._now, client.number, 0))
        else:
            self._feed(ClientJoined(self._now, client.number))
        plan = Plan(
            self._now, client.number, self._request(), 0, work.order,
            tokens_per_pass=work.tokens_per_pass,
        )  # fmt: skip
        self._feed(plan)

    def _enter(self, client: _Client) -> None:
        layer = self._work.order[client.step]
        client.wanted, client.since_ns = layer, self._now
        if layer in client.leases:
            self._begin(client)
        elif layer not in client.asked.values():
            self._ask(client, layer, ahead=False)

    def _begin(self, client: _Client) -> None:
        work = self._work
        client.wanted = None
        client.stall_ns += self._now - client.since_ns
        following = work.order[(client.step + 1) % len(work.order)]
        self._agenda.after(work.compute_ns[client.step], lambda: self._leave(client, following))
        if following not in client.leases:
            self._ask(client, following, ahead=True)

    def _leave(self, client: _Client, following: int) -> None:
        layer = self._work.order[client.step]
        if layer != following:
            self._feed(Release(self._now, client.number, client.leases.pop(layer)))
        client.step += 1
        if client.step == len(self._work.order):
            client.step = 0
            ssd, link = self._ssd, self._link
            mark = Mark(
                self._now, client.stall_ns, ssd.nbytes, ssd.busy_ns, link.nbytes, link.busy_ns
            )
            self._passes.ended(client.number, mark)
        self._enter(client)

    def _ask(self, client: _Client, layer: int, *, ahead: bool) -> None:
        request = self._request()
        client.asked[request] = layer
        self._feed(Acquire(self._now, client.number, request, LayerKey(0, layer), ahead))

    # ----------------------------------------------------------------------------------- the core

    def _feed(self, event: StackEvent) -> None:
        """As the engine does: what comes up while actions are carried out waits for its turn."""
        self._events.append(event)
        if len(self._events) > 1:
            return
        while self._events:
            for action in self.tiers.handle(self._events[0]):  # type: ignore[arg-type]
                self._act(action)
            self._events.popleft()
        if self.tiers.waits_for_time:
            at_ns, wakes_ns = self._now + TICK_NS, self.tiers.wakes_at_ns
            if wakes_ns is not None:
                at_ns = min(at_ns, max(wakes_ns, self._now))
            if self._tick_ns is None or at_ns < self._tick_ns:
                self._tick_ns = at_ns
                self._agenda.at(at_ns, self._tick)

    def _act(self, action: StackAction) -> None:
        match action:
            case Read():
                done_ns = self._ssd.done_ns(self._now, action.nbytes)
                self._read_ns[action.slot] = done_ns
                self._agenda.at(done_ns, self._read(action.slot))
            case Copy():
                done_ns = self._copy_done_ns(action)
                self._agenda.at(done_ns, self._copied(action.gpu, action.slot))
            case DirectRead():
                done_ns = self._ssd.done_ns(self._now, action.nbytes)
                self._agenda.at(done_ns, self._copied(action.gpu, action.slot))
            case Discard():
                self._agenda.after(0, self._discarded(action))
            case Admit():
                self._enter(self._clients[action.client])
            case Grant():
                client = self._clients[action.client]
                layer = client.asked.pop(action.request)
                client.leases[layer] = action.lease
                if client.wanted == layer:
                    self._begin(client)
            case Later():
                client = self._clients[action.client]
                layer = client.asked.pop(action.request)
                if client.wanted == layer:
                    self._ask(client, layer, ahead=False)
            case Refuse():
                raise DoesNotFit(action.text)
            case _:
                pass  # evictions take no time

    def _copy_done_ns(self, copy: Copy) -> int:
        """One that is filling ends one block after its read, at the earliest."""
        done_ns = self._link.done_ns(self._now, copy.nbytes)
        if not copy.filling:
            return done_ns
        block_ns = min(BLOCK_BYTES, copy.nbytes) * SECOND_NS // self._link.bytes_per_s
        return max(done_ns, self._read_ns[copy.from_slot] + block_ns + self._link.latency_ns)

    def _tick(self) -> None:
        if self._tick_ns == self._now:
            self._tick_ns = None
            self._feed(Tick(self._now))

    def _read(self, slot: int) -> Callable[[], None]:
        return lambda: self._feed(ReadDone(self._now, slot))

    def _copied(self, gpu: int, slot: int) -> Callable[[], None]:
        return lambda: self._feed(CopyDone(self._now, gpu, slot))

    def _discarded(self, action: Discard) -> Callable[[], None]:
        arena, offset, nbytes = action.arena, action.offset, action.nbytes
        return lambda: self._feed(DiscardDone(self._now, arena, offset, nbytes))

    def _request(self) -> int:
        self._requests += 1
        return self._requests

    # ------------------------------------------------------------------------------------ the end

    def _summary(self) -> SteadyState:
        passes, clients = self._passes, len(self._clients)
        pass_ns = passes.mean_ns(lambda mark: mark.at_ns)
        return SteadyState(
            pass_ns=pass_ns,
            stall_ns=passes.mean_ns(lambda mark: mark.stall_ns),
            compute_ns=sum(self._work.compute_ns),
            ssd_bytes=int(passes.rate(lambda mark: mark.read_bytes) * pass_ns / clients),
            ssd_share=min(passes.rate(lambda mark: mark.ssd_busy_ns), 1.0),
            copy_bytes=int(passes.rate(lambda mark: mark.copied_bytes) * pass_ns / clients),
            copy_share=min(passes.rate(lambda mark: mark.copy_busy_ns), 1.0),
            passes=passes.fewest,
            settled=passes.settled,
        )


def _tier(node: Node, nbytes: int) -> CoreConfig:
    budget = nbytes // node.granule_bytes * node.granule_bytes
    return CoreConfig(
        budget_bytes=budget,
        granule_bytes=node.granule_bytes,
        reads_in_flight=node.reads_in_flight,
        story_length=1,
    )
