"""An operator changes the budget of a tier while tierd runs.

Less is refused only below what was promised; what is above goes back as leases end. More is refused
above what the machine, or the GPU, has left.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from tierd import fields
from tierd.core.model import BudgetChanged, Refuse
from tierd.core.snapshot import memory_of
from tierd.core.stack_model import TierBudgetChanged
from tierd.errors import BadRequest, BudgetTooLarge, TierUnavailable
from tierd.gpu.errors import GpuError
from tierd.io.memory_limits import available_for, check_budget
from tierd.operators import check_operator
from tierd.sizes import LARGEST, format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.arenas import Arenas
    from tierd.core.machine import TierMachine
    from tierd.core.model import Done
    from tierd.engine import Engine
    from tierd.gpu.device import DeviceMemory
    from tierd.gpu_tier import GpuTier
    from tierd.io.memory_limits import Limit
    from tierd.session import Session
    from tierd.tiers import Tiers

log = logging.getLogger(__name__)


class BudgetCommands:
    """Checks a command, hands it to the core, answers. `changed` is called after each change."""

    def __init__(
        self, engine: Engine, arenas: Arenas, tiers: Tiers, changed: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._arenas = arenas
        self._tiers = tiers
        self._changed = changed
        self.commanded: set[str] = set()  #: tiers whose budget is not the configured one

    def command(self, session: Session, request: int, message: dict[str, Any]) -> None:
        """Raises AccessDenied, BadRequest, TierUnavailable."""
        peer = session.connection.peer
        check_operator(message["op"], peer)
        tier = fields.text(message, "tier")
        nbytes = fields.number(message, "bytes", 1, LARGEST)
        log.info("uid %d (pid %d): budget %s %d", peer.uid, peer.pid, tier, nbytes)
        gpu = self._tiers.find(tier)
        config = self._engine.config if gpu is None else gpu.core_config
        if nbytes < config.granule_bytes:
            raise BadRequest(
                f"budget: {nbytes} bytes is less than the least of {tier}, {config.granule_bytes}"
            )
        raises = nbytes > self._machine(gpu).budget_bytes

        def refuse(error: GpuError | BudgetTooLarge) -> None:
            session.refuse(request, error.code, error.text)

        def change() -> None:
            self._submit(session, request, tier, gpu, nbytes)

        if gpu is not None:
            self._check_gpu(gpu)
            if raises:
                self._when_gpu_has(gpu, nbytes, change, refuse)
                return
        elif raises:
            self._when_machine_has(nbytes, change, refuse)
            return
        change()

    def _check_gpu(self, gpu: GpuTier) -> None:
        if not gpu.check_ready():
            raise TierUnavailable(f"tier {gpu.name} is being opened: try again")
        if not gpu.device.elastic:
            raise BadRequest(
                f"budget: the memory of {gpu.name} was taken in one piece ({gpu.device.kind}): use "
                "gpu_device cuda_vmm for a budget that can change"
            )

    def _when_gpu_has(
        self,
        gpu: GpuTier,
        nbytes: int,
        change: Callable[[], None],
        refuse: Callable[[GpuError | BudgetTooLarge], None],
    ) -> None:
        def looked(found: DeviceMemory | GpuError) -> None:
            if isinstance(found, GpuError):
                refuse(found)
            elif nbytes - gpu.device.backed_bytes > found.free_bytes:
                refuse(
                    BudgetTooLarge(
                        f"a budget of {format_size(nbytes)} ({nbytes} bytes) for {gpu.name} is "
                        f"above what it can have: {format_size(gpu.device.backed_bytes)} taken, "
                        f"{format_size(found.free_bytes)} free of "
                        f"{format_size(found.total_bytes)}"
                    )
                )
            else:
                change()

        gpu.worker.submit(lambda device: device.memory(), looked)

    def _when_machine_has(
        self,
        nbytes: int,
        change: Callable[[], None],
        refuse: Callable[[GpuError | BudgetTooLarge], None],
    ) -> None:
        loop = asyncio.get_running_loop()

        def looked(found: asyncio.Future[Limit]) -> None:
            try:
                check_budget(nbytes, found.result(), held_bytes=self._arenas.populated_bytes)
            except BudgetTooLarge as error:
                refuse(error)
            else:
                change()

        look = loop.run_in_executor(None, available_for, self._arenas.pages)
        look.add_done_callback(looked)

    def _submit(
        self, session: Session, request: int, tier: str, gpu: GpuTier | None, nbytes: int
    ) -> None:
        def answered(answer: Done | Refuse) -> None:
            if isinstance(answer, Refuse):
                session.refuse(request, answer.code, answer.text)
                return
            self.commanded.add(tier)
            self._changed()
            memory = memory_of(self._machine(gpu).books)
            session.reply(
                request, {"budget_bytes": memory.budget_bytes, "used_bytes": memory.used_bytes}
            )

        now = self._engine.now()
        if self._engine.stack is None:
            self._engine.command(lambda number: BudgetChanged(now, number, nbytes), answered)
        else:
            index = None if gpu is None else gpu.index
            self._engine.command(
                lambda number: TierBudgetChanged(now, number, index, nbytes), answered
            )

    def _machine(self, gpu: GpuTier | None) -> TierMachine:
        if gpu is None:
            return self._engine.machine
        assert self._engine.stack is not None
        return self._engine.stack.gpus[gpu.index]

    def config(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The effective settings, with the budgets that were commanded."""
        for entry in entries:
            if entry["key"] == "dram" and "dram" in self.commanded:
                entry["value"] = self._engine.machine.budget_bytes
                entry["source"] = "tierctl budget"
            if entry["key"] == "gpus" and self.commanded - {"dram"}:
                entry["value"] = [
                    f"{gpu.number}={self._machine(gpu).budget_bytes}" for gpu in self._tiers.gpus
                ]
                entry["source"] = "tierctl budget"
        return entries
