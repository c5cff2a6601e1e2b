"""The models in service: what the registry finds becomes known to the core, and to arenas."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tierd.core.model import ArenaAdded, ModelAdded, ModelRemoved
from tierd.errors import ArenaError, BadRequest
from tierd.registry import scan
from tierd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.arenas import Arenas
    from tierd.config import Config
    from tierd.engine import Engine
    from tierd.pack import Pack
    from tierd.registry import Changes, Registry, Scan
    from tierd.session import Session

log = logging.getLogger(__name__)


class Models:
    """Puts changes into effect; reloads, one at a time."""

    def __init__(self, config: Config, registry: Registry, arenas: Arenas, engine: Engine) -> None:
        self._config = config
        self._registry = registry
        self._arenas = arenas
        self._engine = engine
        self._waiters: list[tuple[Session, int]] = []
        self._wanted = False
        self._reloading: asyncio.Task[None] | None = None
        self.changed: Callable[[], None] | None = None  #: called when other packs are served

    # -------------------------------------------------------------------------------------- reload

    def reload(self) -> None:
        """Look at the directories again, soon."""
        self._wanted = True
        self._start()

    def reload_for(self, session: Session, request: int) -> None:
        """Look at the directories again and tell `session` what changed."""
        if any(waiter is session for waiter, _ in self._waiters):
            raise BadRequest("a reload for this connection is running")
        self._waiters.append((session, request))
        self._start()

    def stop(self) -> None:
        if self._reloading is not None:
            self._reloading.cancel()

    def _start(self) -> None:
        if self._reloading is None:
            loop = asyncio.get_running_loop()
            self._reloading = loop.create_task(self._reload())
            self._reloading.add_done_callback(self._reloaded)

    async def _reload(self) -> None:
        loop = asyncio.get_running_loop()
        while self._wanted or self._waiters:
            waiters, self._waiters = self._waiters, []
            self._wanted = False
            found = await loop.run_in_executor(None, scan_for, self._config, self._registry)
            changes = self._registry.apply(found)
            self.take_over(changes)
            reply = {
                "added": [pack.name for pack in changes.added],
                "replaced": [pack.name for _, pack in changes.replaced],
                "removed": [pack.name for pack in changes.removed],
                "failed": [{"name": name, "text": text} for name, text in changes.failed],
            }
            log.info("reload: %s", reply)
            for session, request in waiters:
                session.reply(request, reply)

    def _reloaded(self, task: asyncio.Task[None]) -> None:
        self._reloading = None
        if not task.cancelled():
            task.result()  # a fault ends the daemon

    # ------------------------------------------------------------------------------------- effects

    def take_over(self, changes: Changes, warm_bytes: int = 0) -> None:
        """Tell the core what changed. warm_bytes: memory that new arenas may take beforehand."""
        for name, text in changes.failed:
            log.warning("model %s is not loaded: %s", name, text)
        for old in (*changes.removed, *(old for old, _ in changes.replaced)):
            log.info("model %s (id %d) is %s", old.name, old.model, old.state)
            self.retire(old)
        fresh = [*changes.added, *(new for _, new in changes.replaced)]
        total = sum(pack.index.pack_bytes for pack in fresh)
        granule = self._engine.config.granule_bytes
        for pack in fresh:
            if pack.access in self._arenas.by_group:
                continue
            try:
                arena = self._arenas.create(pack.access)
            except ArenaError as error:
                log.error("model %s cannot be served: %s", pack.name, error)
                self._withdraw(pack, changes, str(error))
                continue
            group = sum(p.index.pack_bytes for p in fresh if p.access == pack.access)
            warm = min(warm_bytes * group // total, group) // granule * granule
            self._engine.submit(
                ArenaAdded(self._engine.now(), arena.arena_id, arena.span_bytes, warm)
            )
            self._arenas.populate(arena.arena_id, 0, warm)
        for pack in fresh:
            if self._registry.served.get(pack.name) is pack:
                self._serve(pack)
        if self.changed is not None:
            self.changed()

    def retire(self, pack: Pack) -> None:
        """End a pack that is served no more: a removed one now, a replaced one when no client has
        it open, because its files are whole and a model process may be in the middle of it."""
        gone = pack.state == "removed" or (pack.state == "replaced" and not pack.users)
        if gone and self._registry.by_model.get(pack.model) is pack:
            self._engine.submit(ModelRemoved(self._engine.now(), pack.model))
            self._registry.forget(pack)

    def _serve(self, pack: Pack) -> None:
        engine = self._engine
        pack.arena = self._arenas.by_group[pack.access].arena_id
        sizes = tuple(layer.nbytes for layer in pack.index.layers)
        engine.submit(
            ModelAdded(engine.now(), pack.model, pack.name, pack.arena, sizes, pack.device)
        )
        engine.operators.model_served(pack)
        self._judge(pack)
        log.info(
            "model %s (id %d): %d layers, %s (dense %s), readers %s, arena %d",
            pack.name, pack.model, len(sizes), format_size(pack.index.pack_bytes),
            format_size(pack.index.dense_bytes), pack.access, pack.arena,
        )  # fmt: skip

    def judge_all(self) -> None:
        """The budget is another one."""
        for pack in self._registry.served.values():
            self._judge(pack)

    def _judge(self, pack: Pack) -> None:
        """Say so if the budget cannot hold the pack's largest layer."""
        granule, budget = self._engine.config.granule_bytes, self._engine.machine.budget_bytes
        largest = max(pack.index.layers, key=lambda layer: layer.nbytes)
        needed = -(-largest.nbytes // granule) * granule
        before, pack.state = pack.state, "served"
        if needed > budget:
            pack.state = (
                f"budget too small: layer {largest.name!r} needs {needed} bytes, "
                f"the budget is {budget}"
            )
        if pack.state not in ("served", before):
            log.warning("model %s: %s", pack.name, pack.state)

    def _withdraw(self, pack: Pack, changes: Changes, text: str) -> None:
        del self._registry.served[pack.name]
        self._registry.failed[pack.name] = text
        changes.failed.append((pack.name, text))
        self._registry.forget(pack)


def scan_for(config: Config, registry: Registry) -> Scan:
    """What the configured directories hold. Blocks on the disk: for a thread."""
    return scan(config.models, config.packs, registry.identities())
