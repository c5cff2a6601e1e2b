"""What the core wants moved: layers from SSDs to DRAM, to GPUs from there or past it; and back.

A slot is FILLING in its slot table before its first byte changes, and RESIDENT after the last.
Belongs to the loop's thread; what takes long is done by readers and by the threads of GPUs.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from tierd.copy_sources import CopySources
from tierd.core.model import DiscardDone, ReadDone, ReadFailed
from tierd.errors import ReadError
from tierd.gpu_filling import Source
from tierd.io.ssd_job import ReadJob, ReadResult
from tierd.io.verified import VerifiedBlocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.arenas import Arenas
    from tierd.core.model import Discard, Read
    from tierd.core.stack_model import Copy, DirectRead, StackEvent, StopCopy, Unload
    from tierd.io.ssd import ReaderPool
    from tierd.pack import Pack
    from tierd.registry import Registry
    from tierd.slots import Slots
    from tierd.tiers import Tiers

log = logging.getLogger(__name__)


class Transfers:
    """Takes actions, and submits what became of them as events."""

    def __init__(
        self,
        submit: Callable[[StackEvent], None],
        slots: Slots,
        arenas: Arenas,
        pool: ReaderPool,
        registry: Registry,
        tiers: Tiers | None,
    ) -> None:
        """slots: of DRAM."""
        self.reads = 0  #: in flight
        #: called with the device and the bytes of every layer that was read
        self.after_read: Callable[[int, int], None] | None = None
        self._submit = submit
        self._slots = slots
        self._arenas = arenas
        self._pool = pool
        self._registry = registry
        self._tiers = tiers
        self._held: list[tuple[Read, Pack]] | None = None
        self._verified: dict[int, VerifiedBlocks] = {}  # by slot of DRAM that is being filled
        self._sources = CopySources()
        self._stopped = False
        if tiers is not None:
            registry.closing = tiers.closing

    def stop(self) -> None:
        """What is under way ends, and changes nothing any more."""
        self._stopped = True

    # ------------------------------------------------------------------------------------ into DRAM

    def hold_reads(self) -> None:
        """Start no read before `resume_reads`: a read takes memory."""
        self._held = []

    def resume_reads(self) -> None:
        held, self._held = self._held or [], None
        for read, pack in held:
            self._start_read(read, pack)

    def read(self, read: Read) -> None:
        pack = self._registry.by_model[read.key.model]
        pack.reads += 1  # from here on, though it may wait: the pack must not be closed meanwhile
        self._verified[read.slot] = VerifiedBlocks()  # a copy may follow from now on
        if self._held is not None:
            self._held.append((read, pack))
        else:
            self._start_read(read, pack)

    def _start_read(self, read: Read, pack: Pack) -> None:
        layer = pack.index.layers[read.key.layer]
        self._slots.filling(read, pack.keys[read.key.layer])
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
        del self._verified[read.slot]
        self._over(pack)
        if self._stopped:
            return
        if isinstance(outcome, ReadError):
            log.error("%s", outcome.text)
            now = time.monotonic_ns()
            self._submit(ReadFailed(now, read.slot, outcome.code, outcome.text))
        else:
            self._slots.resident(read.slot)
            self._arenas.exists(read.arena, read.offset, read.nbytes)
            self._submit(ReadDone(time.monotonic_ns(), read.slot))
            if self.after_read is not None:
                self.after_read(pack.device, read.nbytes)

    def _over(self, pack: Pack) -> None:
        self.reads -= 1
        pack.reads -= 1
        self._registry.close_idle(pack)

    # ------------------------------------------------------------------------------------- to GPUs

    @property
    def _gpus(self) -> Tiers:
        assert self._tiers is not None, "an action for a GPU where none is configured"
        return self._tiers

    def copy(self, copy: Copy) -> None:
        pack = self._registry.by_model[copy.key.model]
        memory = self._arenas.by_id[copy.from_arena].buffer(copy.from_offset, copy.nbytes)
        source = Source(memory)
        if copy.filling:
            place = self._sources.begin(copy.from_arena, copy.from_offset, copy.nbytes)
            verified = self._verified[copy.from_slot]
            source = Source(memory, verified, lambda: self._sources.end(place))
        self._gpus.gpus[copy.gpu].filling.copy(copy, pack, source)

    def stop_copy(self, stop: StopCopy) -> None:
        self._gpus.gpus[stop.gpu].filling.stop_copy(stop.slot)

    def read_directly(self, read: DirectRead) -> None:
        pack = self._registry.by_model[read.key.model]
        pack.reads += 1
        self.reads += 1
        self._gpus.gpus[read.gpu].filling.read(read, pack, lambda: self._over(pack))

    # ------------------------------------------------------------------------------------ emptied

    def evict(self, slot: int) -> None:
        """A slot of DRAM."""
        self._slots.clear(slot)

    def unload(self, unload: Unload) -> None:
        self._gpus.gpus[unload.gpu].slots.clear(unload.slot)

    def discard(self, discard: Discard) -> None:
        arena, offset, nbytes = discard.arena, discard.offset, discard.nbytes
        if arena not in self._arenas.by_id:
            self._gpus.of_arena(arena).memory.discard(discard)
            return

        def done() -> None:
            self._submit(DiscardDone(time.monotonic_ns(), arena, offset, nbytes))

        self._sources.when_free(
            arena, offset, nbytes, lambda: self._arenas.discard(arena, offset, nbytes, done)
        )
