"""One life of tierd: what it takes at the start, and how it ends.

A fault while answering one client ends that connection (`clients`). A fault of the core, the slot
table or the arenas ends the daemon: what it believes about its memory could be wrong, and systemd
starts one that looks again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from typing import TYPE_CHECKING, Any

from tierd import recovery, sdnotify
from tierd.arenas import Arenas
from tierd.budget_commands import BudgetCommands
from tierd.clients import Clients
from tierd.core.errors import IllegalEvent
from tierd.core.model import Adopted, ArenaAdded, CoreConfig
from tierd.costs import Costs
from tierd.diagnosis import Diagnosis
from tierd.engine import Engine
from tierd.garbage import Garbage
from tierd.holders import Holders
from tierd.io.memory_limits import (
    auto_budget,
    available_bytes,
    available_for,
    check_budget,
    check_least,
)
from tierd.io.pages import choose_pages
from tierd.io.ssd import ReaderPool
from tierd.models import Models, scan_for
from tierd.registry import Registry
from tierd.server import Listener
from tierd.sizes import format_size
from tierd.slots import Slots
from tierd.statistics import Statistics
from tierd.tiers import Tiers
from tierd.watchdog import Watchdog

if TYPE_CHECKING:
    from tierd.config import Config
    from tierd.io.pages import Pages
    from tierd.recovery import Inheritance
    from tierd.registry import Changes
    from tierd.session import Session

log = logging.getLogger(__name__)

SPARE_CONNECTIONS = 64  # beside the clients: for tierctl, and to tell a client that it is refused


class Daemon:
    """`run` returns the exit status."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.pid = os.getpid()
        self.epoch = secrets.randbits(63)
        self.started_ns = time.monotonic_ns()
        self.registry = Registry()
        self.clients = Clients(self)
        self.statistics = Statistics(self)
        self.diagnosis = Diagnosis(self)
        self.pool: ReaderPool
        self.slots: Slots
        self.arenas: Arenas
        self.tiers: Tiers
        self.engine: Engine
        self.models: Models
        self.budget_commands: BudgetCommands
        self.holders: Holders
        self.costs: Costs
        self._garbage: Garbage
        self._listener: Listener
        self._stop = asyncio.Event()
        self._fault: Exception | None = None

    async def run(self) -> int:
        """Serve until a signal or a fault. Raises TierdError or OSError when it cannot start."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._faulted)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        tidying = await self._start(loop)
        try:
            loop.add_signal_handler(signal.SIGHUP, self.models.reload)
            self._say_ready(loop)
            if tidying is not None:
                await tidying
            await self._stop.wait()
            await self._shut_down(loop)
        finally:
            self._listener.close()
        return 1 if self._fault is not None else 0

    # --------------------------------------------------------------------------------------- start

    async def _start(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[None] | None:
        kept = sdnotify.listen_fds(os.environ)
        kept_arenas = [fd for name in kept if recovery.is_arena(name) for fd in kept[name]]
        held_bytes = sum(os.fstat(fd).st_blocks * 512 for fd in kept_arenas)
        limit = await loop.run_in_executor(None, available_bytes)
        budget = self.config.dram_bytes or auto_budget(limit, held_bytes=held_bytes)
        pages = choose_pages(budget, kept_fds=kept_arenas)
        check_least(budget, pages.page_bytes)
        limit = await loop.run_in_executor(None, available_for, pages)
        check_budget(budget, limit, held_bytes=held_bytes)
        if pages.warning:
            log.warning("%s", pages.warning)
        control = kept.pop("control", None)
        if control:
            self._listener = Listener.inherit(control[0])
        else:
            self._listener = Listener.bind(self.config.socket, self.config.socket_mode)
        try:
            log.info(
                "tierd %d on %s: budget %s (%s) of %s available (%s), %s",
                self.pid, self._listener.path, format_size(budget),
                "chosen" if self.config.dram_bytes is None else "given",
                format_size(limit.nbytes), limit.text, pages.text,
            )  # fmt: skip
            self.pool = ReaderPool(self.config.readers, self.config.ssd_bandwidth)
            self.pool.configure(chunk_bytes=self.config.read_chunk)
            inheritance = recovery.inherit(kept, pages, mlock=self._mlock)
            changes = self.registry.apply(
                await loop.run_in_executor(None, scan_for, self.config, self.registry)
            )
            tidying = self._begin(loop, budget, pages, inheritance, changes)
        except BaseException:
            self._listener.close()
            raise
        self._listener.start(loop, self.config.max_clients + SPARE_CONNECTIONS, self.clients.joined)
        return tidying

    @property
    def _mlock(self) -> bool:
        return self.config.mlock != "off"

    def _begin(
        self,
        loop: asyncio.AbstractEventLoop,
        budget: int,
        pages: Pages,
        inheritance: Inheritance | None,
        changes: Changes,
    ) -> asyncio.Task[None] | None:
        if inheritance is not None:
            try:
                return self._begin_warm(loop, budget, pages, inheritance, changes)
            except IllegalEvent as error:  # e.g. other pages than before
                log.warning("cold start: what the earlier daemon left does not fit: %s", error)
                self.engine.stop()
                self.tiers.stop()
                self.tiers.close_slots()
                self.arenas.abandon()
                self.slots.close()
        self._begin_cold(loop, budget, pages, changes)
        return None

    def _begin_cold(
        self, loop: asyncio.AbstractEventLoop, budget: int, pages: Pages, changes: Changes
    ) -> None:
        self.slots = Slots.create(self.epoch)
        sdnotify.fdstore(recovery.TABLE, self.slots.fd, environ=os.environ)
        self._assemble(loop, budget, pages)
        self.models.take_over(changes, warm_bytes=budget)

    def _begin_warm(
        self,
        loop: asyncio.AbstractEventLoop,
        budget: int,
        pages: Pages,
        inheritance: Inheritance,
        changes: Changes,
    ) -> asyncio.Task[None]:
        """Go on with the slots of the earlier daemon. All other memory is given back before any
        read takes new memory."""
        self.slots = inheritance.slots
        self._assemble(loop, budget, pages)
        now = self.engine.now()
        for group, arena in inheritance.arenas:
            self.arenas.add(group, arena)
            self.engine.submit(ArenaAdded(now, arena.arena_id, arena.span_bytes))
        self.models.take_over(changes)
        held = recovery.living(self.slots)
        match = recovery.match(
            self.slots, self.registry.served.values(), dict(inheritance.groups()), held
        )
        self.engine.transfers.hold_reads()
        self.engine.submit(Adopted(now, tuple(match.adopted)))
        for number in match.forgotten:
            self.slots.clear(number)
        self.slots.table.epoch = self.epoch
        self.clients.expect(loop, held)
        log.info(
            "warm start: %d layers are resident, %d slots are read by %d leases of the earlier "
            "daemon, %d slots are dropped",
            sum(slot.key is not None for slot in match.adopted),
            sum(bool(slot.holders) for slot in match.adopted), len(held), len(match.forgotten),
        )  # fmt: skip
        return loop.create_task(self._tidy(match.ranges(pages.page_bytes)))

    async def _tidy(self, kept: dict[int, list[tuple[int, int]]]) -> None:
        await self.arenas.discard_all_but(kept)
        for arena, ranges in kept.items():
            for begin, end in ranges:
                self.arenas.exists(arena, begin, end - begin)
        self.engine.transfers.resume_reads()

    def _assemble(self, loop: asyncio.AbstractEventLoop, budget: int, pages: Pages) -> None:
        self.tiers = Tiers(self.config, self.epoch, loop)
        self.arenas = Arenas(
            budget, pages, mlock=self._mlock, populate=self.config.populate,
            registrar=self.tiers.registrar,
        )  # fmt: skip
        config = CoreConfig(
            budget_bytes=budget,
            granule_bytes=pages.page_bytes,
            reads_in_flight=self.config.reads_in_flight,
            convoy_wait_ns=self.config.convoy_wait * 1_000_000,
            slot_limit=self.slots.table.slot_count,
            first_generation=self.slots.table.next_generation,
            first_lease=self.slots.table.next_lease,
        )
        self.engine = Engine(
            config,
            self.slots,
            self.arenas,
            self.pool,
            self.registry,
            self.clients.sessions,
            self.tiers,
        )
        self.models = Models(self.config, self.registry, self.arenas, self.engine)
        self.budget_commands = BudgetCommands(
            self.engine, self.arenas, self.tiers, self.models.judge_all
        )
        self.clients.expect(loop)
        self.holders = Holders(loop, self.slots.set_holders)
        self.costs = Costs(
            self.config, self.registry, self.pool, self.engine,
            lambda: self.clients.busy or bool(self.engine.transfers.reads),
        )  # fmt: skip
        self.engine.transfers.after_read = self.costs.read_done

    def _say_ready(self, loop: asyncio.AbstractEventLoop) -> None:
        seconds = (time.monotonic_ns() - self.started_ns) / 1e9
        budget = format_size(self.engine.config.budget_bytes)
        text = f"{len(self.registry.served)} models, DRAM budget {budget}"
        sdnotify.notify(f"READY=1\nMAINPID={self.pid}\nSTATUS={text}", environ=os.environ)
        log.info("ready after %.3f s: %s", seconds, text)
        if not self.registry.served:
            places = ", ".join(str(path) for path in (*self.config.models, *self.config.packs))
            log.warning("nothing is served yet: no sound pack in %s; see `tierctl reload`", places)
        Watchdog(loop, self.pool, self.tiers).start()
        self.costs.probe_new(loop)
        self.tiers.open(self.engine, self.registry)
        self.models.changed = lambda: self._models_changed(loop)
        self._garbage = Garbage(loop, lambda: self.engine.heard)
        self._garbage.start()

    def _models_changed(self, loop: asyncio.AbstractEventLoop) -> None:
        self.costs.probe_new(loop)
        self.tiers.place()

    # ----------------------------------------------------------------------------------------- end

    async def _shut_down(self, loop: asyncio.AbstractEventLoop) -> None:
        self.engine.stop()
        self.holders.stop()
        self._garbage.stop()
        self.tiers.stop()
        sdnotify.notify("STOPPING=1", environ=os.environ)
        leases = self.slots.leases
        log.info("stopping: %d clients hold %d leases", len(self.clients.sessions), leases)
        self._listener.stop()
        await self.clients.see_off()
        self.models.stop()
        await loop.run_in_executor(None, self.pool.close)
        try:
            await loop.run_in_executor(None, self.tiers.close)
        except TimeoutError as error:
            # A thread of a GPU may read the arenas for ever: they cannot be unmapped under it.
            log.error("stopped all the same: %s", error)
            self._listener.close()
            logging.shutdown()
            os._exit(1)
        await asyncio.sleep(0)  # the outcomes of the last reads release their targets
        await self.arenas.close()
        self.tiers.close_slots()
        self.slots.close()
        for pack in list(self.registry.by_model.values()):
            pack.close()

    def _faulted(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Exception):
            loop.default_exception_handler(context)
            return
        log.critical("tierd ends, because of a fault: %s", context["message"], exc_info=error)
        self._fault = error
        self._stop.set()

    # ------------------------------------------------------------------------------------- clients

    @property
    def socket_path(self) -> str:
        return self._listener.path

    def connection_ended(self, session: Session) -> None:
        """Another connection may be accepted in its place."""
        self.tiers.forget(session)
        self._listener.ended()
