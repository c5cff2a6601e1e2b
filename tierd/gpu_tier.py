"""One GPU as a tier: opened in the background, its arenas, the models placed on it, its clients."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd.core.model import ClientGone, CoreConfig
from tierd.core.stack_model import Fenced, GpuArenaAdded, JoinedGpu, ModelPlaced
from tierd.errors import TierUnavailable
from tierd.fences import Fences
from tierd.gpu.errors import DeviceFull, GpuError
from tierd.gpu.kinds import make_device
from tierd.gpu.worker import GpuWorker
from tierd.gpu_filling import GpuFilling
from tierd.gpu_memory import PATIENCE_SECONDS, GpuMemory
from tierd.gpu_settings import chunk_bytes
from tierd.holders import Holders
from tierd.pressure import Pressure
from tierd.sizes import format_size
from tierd.slots import Slots

if TYPE_CHECKING:
    import asyncio

    from tierd.access import AccessGroup
    from tierd.config import Config
    from tierd.core.stack_model import StackEvent
    from tierd.engine import Engine
    from tierd.errors import TierdError
    from tierd.gpu.device import DeviceInfo
    from tierd.gpu.direct_reads import DirectReads
    from tierd.gpu.registrar import Registrar
    from tierd.gpu_settings import GpuBudget
    from tierd.pack import Pack
    from tierd.registry import Registry
    from tierd.session import Session

log = logging.getLogger(__name__)

RETRY_SECONDS = 3.0  # until a GPU is opened again on which the budget was not free
#: Arenas of DRAM count from 0, those of the GPUs from multiples of this.
ARENA_NUMBERS = 1 << 20


@dataclass(frozen=True, slots=True)
class GpuArena:
    """Addresses on the GPU for the models of one group of readers."""

    number: int
    span_bytes: int


class GpuTier:
    """Belongs to the loop's thread."""

    def __init__(
        self,
        index: int,
        budget: GpuBudget,
        config: Config,
        epoch: int,
        registrar: Registrar,
        direct: DirectReads | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """index: the GPU's number in the core. direct: where layers are read past DRAM. Loads no
        library of a GPU."""
        self.index = index
        self.number = budget.number
        self.name = budget.tier
        self.state = "opening"  #: or "ready", or "failed"
        self.reason = ""  #: why it failed
        self.info: DeviceInfo | None = None
        self.slots = Slots.create(epoch)
        self.holders = Holders(loop, self.slots.set_holders)
        chunk = chunk_bytes(config.gpu_chunk, budget.nbytes)
        self.core_config = CoreConfig(
            budget_bytes=budget.nbytes,
            granule_bytes=chunk,
            small_layer_bytes=chunk,
            reads_in_flight=config.gpu_copies_in_flight,
            convoy_wait_ns=config.convoy_wait * 1_000_000,
            slot_limit=self.slots.table.slot_count,
        )
        self.device = make_device(
            config.gpu_device, budget.number, chunk, budget.nbytes,
            copy_bandwidth=config.gpu_copy_bandwidth,
            copy_latency_us=config.gpu_copy_latency_us,
            host=registrar.host, direct=direct is not None,
        )  # fmt: skip
        self.direct = direct
        self._registrar = registrar
        self._loop = loop
        self._stopped = False
        self.worker = GpuWorker(self.device, config.gpu_copies_in_flight, loop.call_soon_threadsafe)
        self.memory = GpuMemory(
            self.name, self.worker, self.slots, loop, self._submit, self._lost, self._unanswered
        )
        self.filling = GpuFilling(index, self.worker, self.slots, self.memory, self._submit, direct)
        self.fences = Fences(loop, self._fenced)
        self.sessions: dict[int, Session] = {}  #: of its clients
        self.scratch: dict[int, int] = {}  #: by client: what it uses beside its leases, in bytes
        self.pressure = Pressure(self.slots.table, time.monotonic_ns())
        self._engine: Engine
        self._registry: Registry
        self._placed: set[int] = set()
        self._arenas: dict[AccessGroup, GpuArena | str | None] = {}  # text: refused, None: asked
        self._waiting: dict[Session, None] = {}

    # ---------------------------------------------------------------------------------------- life

    def open(self, engine: Engine, registry: Registry) -> None:
        """Begin to open the device; its clients wait until it is open or has failed."""
        self._engine, self._registry = engine, registry
        self._open()

    def _open(self) -> None:
        self.worker.submit(lambda device: device.open(), self._opened)

    def _opened(self, outcome: DeviceInfo | GpuError) -> None:
        if self._stopped:
            return
        if isinstance(outcome, GpuError):
            if self.reason != outcome.text:
                log.error("tier %s is not served: %s", self.name, outcome.text)
            self.state, self.reason = "failed", outcome.text
            if isinstance(outcome, DeviceFull):  # clients of an earlier daemon may have the memory
                self._loop.call_later(RETRY_SECONDS, self._open)
            self._go_on()
        elif self.direct is not None:
            info = outcome
            self.direct.open(self.device, lambda refusal: self._tried_direct(info, refusal))
        else:
            self._ready(outcome)

    def _tried_direct(self, info: DeviceInfo, refusal: TierdError | None) -> None:
        """What was chosen is in effect, or this GPU is not served: DRAM is no way around it."""
        if self._stopped:
            return
        if refusal is None:
            self._ready(info)
            return
        self.state, self.reason = "failed", f"gpu_direct: {refusal.text}"
        log.error("tier %s is not served: %s", self.name, self.reason)
        self._go_on()

    def _ready(self, info: DeviceInfo) -> None:
        self.state, self.reason, self.info = "ready", "", info
        log.info(
            "tier %s is ready: %s (%s), %s of %s free, budget %s in chunks of %s%s",
            self.name, info.name, self.device.kind, format_size(info.free_bytes),
            format_size(info.total_bytes), format_size(self.core_config.budget_bytes),
            format_size(self.device.chunk_bytes), ", read past DRAM" if self.direct else "",
        )  # fmt: skip
        self._registrar.add_device(self.device)
        self.place()
        self._go_on()

    def _lost(self, reason: str) -> None:
        """The GPU works no more: its clients' requests fail, others are refused."""
        if self.state != "failed":
            self.state, self.reason = "failed", reason
            log.error("tier %s works no more, until tierd starts again: %s", self.name, reason)

    def stop(self) -> None:
        """Decide nothing more."""
        self._stopped = True
        self.memory.stop()
        self.filling.stop()
        self.fences.close()
        self.holders.stop()

    def close(self) -> None:
        """After the engine stopped. Blocks while copies end; TimeoutError when they do not."""
        self.worker.close()

    def _submit(self, event: StackEvent) -> None:
        self._engine.submit(event)

    # ------------------------------------------------------------------------------------ placement

    def place(self) -> None:
        """Let clients ask for every model that is served, as soon as its arena is there."""
        if self.state != "ready":
            return
        self._placed &= self._registry.by_model.keys()
        for pack in list(self._registry.served.values()):
            if pack.model in self._placed:
                continue
            if pack.access not in self._arenas:
                self._add_arena(pack.access)
            arena = self._arenas[pack.access]
            if isinstance(arena, GpuArena):
                self._placed.add(pack.model)
                now = self._engine.now()
                self._engine.submit(ModelPlaced(now, self.index, pack.model, arena.number))

    def _add_arena(self, group: AccessGroup) -> None:
        assert self.info is not None
        number = ARENA_NUMBERS * (self.index + 1) + len(self._arenas)
        # Addresses cost nothing, and a budget may be raised.
        budget = self.core_config.budget_bytes
        span_bytes = self.device.span_bytes(
            max(budget, self.info.total_bytes) if self.device.elastic else budget
        )
        self._arenas[group] = None

        def added(outcome: GpuError | None) -> None:
            if isinstance(outcome, GpuError):
                self._arenas[group] = outcome.text
                log.error("tier %s: models of readers %s are not served: %s", self.name, group,
                    outcome.text,
                )  # fmt: skip
            else:
                self._arenas[group] = GpuArena(number, span_bytes)
                now = self._engine.now()
                self._engine.submit(GpuArenaAdded(now, self.index, number, span_bytes))
            self.place()
            self._go_on()

        self.worker.submit(lambda device: device.add_arena(number, span_bytes), added)

    def arena_of(self, pack: Pack) -> GpuArena | None:
        """Where the model's layers are; None: it is being made. Raises TierUnavailable."""
        arena = self._arenas.get(pack.access)
        if isinstance(arena, str):
            raise TierUnavailable(f"model {pack.name!r} cannot be on {self.name}: {arena}")
        return arena

    # -------------------------------------------------------------------------------------- clients

    def check_ready(self) -> bool:
        """False while the device opens. Raises TierUnavailable when that failed."""
        if self.state == "failed":
            raise TierUnavailable(f"tier {self.name} cannot be used: {self.reason}")
        return self.state == "ready"

    def wait(self, session: Session) -> None:
        """Let it go on when the device was opened or an arena made, or either failed."""
        self._waiting[session] = None

    def forget(self, session: Session) -> None:
        """It is gone."""
        self._waiting.pop(session, None)

    def _go_on(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for session in waiting:
            session.go_on()

    def joined(self, session: Session, weight: int) -> None:
        client = session.client
        self.sessions[client] = session
        self._engine.submit(JoinedGpu(self._engine.now(), client, self.index, weight))

    def left(self, client: int, pid: int, pidfd: int) -> None:
        """The connection is over: what it leased stays as it is until nothing can read it."""
        del self.sessions[client]
        self.scratch.pop(client, None)
        self.fences.begin(client, pid, pidfd)
        self._engine.submit(ClientGone(self._engine.now(), client))

    def _unanswered(self, client: int) -> None:
        """Others wait for memory that this client does not let go of: it is none any more."""
        session = self.sessions.get(client)
        if session is not None:
            text = (
                f"was asked to unmap memory of {self.name} and did not answer for "
                f"{PATIENCE_SECONDS:.0f} s"
            )
            log.error("%s is disconnected: it %s", session, text)
            session.connection.close(text)

    def _fenced(self, client: int) -> None:
        self.memory.fenced(client)
        self._engine.submit(Fenced(self._engine.now(), client))

    def described(self) -> dict[str, Any]:
        """What a client needs to find the same GPU."""
        assert self.info is not None
        return {"kind": self.device.kind, "number": self.number, "uuid": self.info.uuid}
