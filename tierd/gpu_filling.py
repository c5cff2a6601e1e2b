"""What fills the slots of a GPU: copies from DRAM, and reads past it.

Belongs to the loop's thread; what takes long is done by the worker, and by who reads directly.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.copy_meter import CopyMeter
from tierd.core.stack_model import CopyDone, CopyFailed
from tierd.errors import TierdError
from tierd.gpu.copies import CopyJob
from tierd.gpu.errors import CopyStopped, GpuError, SourceFailed
from tierd.gpu.span import chunks_of
from tierd.io.cufile import DirectJob
from tierd.io.ssd_job import extents_of
from tierd_layouts.wire import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.stack_model import Copy, DirectRead, StackEvent
    from tierd.gpu.copies import CopyResult, LayerCopy
    from tierd.gpu.device import Device
    from tierd.gpu.direct_reads import DirectReads
    from tierd.gpu.worker import GpuWorker
    from tierd.gpu_memory import GpuMemory
    from tierd.io.ssd_job import ReadResult
    from tierd.io.verified import VerifiedBlocks
    from tierd.pack import Pack
    from tierd.slots import Slots

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A layer's bytes in DRAM. They are released when nothing of the copy is under way.

    verified: of the read that is filling them; None: they are all there. over: called when nothing
    reads them any more, before the core hears of it.
    """

    memory: memoryview
    verified: VerifiedBlocks | None = None
    over: Callable[[], None] | None = None


class GpuFilling:
    """Of one GPU, number `index` of the core. Needs an open device."""

    def __init__(
        self,
        index: int,
        worker: GpuWorker,
        slots: Slots,
        memory: GpuMemory,
        submit: Callable[[StackEvent], None],
        direct: DirectReads | None,
    ) -> None:
        """memory: hears what works and what does not. direct: where layers are read past DRAM."""
        self.direct_layers = self.direct_bytes = 0  #: read past DRAM, verified
        self._index = index
        self._worker = worker
        self._slots = slots
        self._memory = memory
        self._submit = submit
        self._direct = direct
        self._stopped = False
        self._copies: dict[int, LayerCopy] = {}  # under way, by slot
        self._meter = CopyMeter(index, worker, submit)

    def stop(self) -> None:
        """Decide nothing more; what the threads do is ended by their owners."""
        self._stopped = True

    # ------------------------------------------------------------------------------------ from DRAM

    def copy(self, copy: Copy, pack: Pack, source: Source) -> None:
        name = self._begin(copy, pack)
        job = CopyJob(copy.arena, copy.offset, source.memory, name, source.verified)
        self._copies[copy.slot] = self._worker.copy(
            job, lambda outcome: self._copied(copy, name, source, outcome)
        )

    def stop_copy(self, slot: int) -> None:
        """Nobody wants what is copied there. Its answer may be on the way already."""
        copy = self._copies.get(slot)
        if copy is not None:
            self._worker.stop(copy)

    def _copied(
        self, copy: Copy, name: str, source: Source, outcome: CopyResult | GpuError
    ) -> None:
        if self._stopped:
            return
        if source.over is not None:
            source.over()
        del self._copies[copy.slot]
        if isinstance(outcome, GpuError):
            self._failed(copy.slot, name, outcome)
        else:
            self._filled(copy.slot)
            self._meter.copied()

    # ------------------------------------------------------------------------------------ past DRAM

    def read(self, read: DirectRead, pack: Pack, over: Callable[[], None]) -> None:
        """Fill a slot from the disk. over: called when nothing of it is under way any more, before
        the core hears of it."""
        name = self._begin(read, pack)
        layer = pack.index.layers[read.key.layer]

        def back(device: Device) -> list[tuple[int, int]]:
            device.back(read.arena, *chunks_of(read.offset, read.nbytes, device.chunk_bytes))
            return device.parts(read.arena, read.offset, read.nbytes)

        def backed(parts: list[tuple[int, int]] | GpuError) -> None:
            if isinstance(parts, GpuError) or self._stopped:
                done(parts if isinstance(parts, GpuError) else CopyStopped(name))
                return
            assert self._direct is not None, "a direct read on a GPU that has none"
            device = self._worker.device
            extents = extents_of(layer, pack.index.shards, pack.shards)
            job = DirectJob(pack.name, layer.name, extents, tuple(parts), device.fetch)
            self._direct.read(device, job, done)

        def done(outcome: ReadResult | TierdError) -> None:
            over()
            if self._stopped:
                return
            if isinstance(outcome, TierdError):
                self._failed(read.slot, name, outcome)
            else:
                self.direct_layers += 1
                self.direct_bytes += outcome.nbytes
                self._filled(read.slot)

        self._worker.submit(back, backed)

    # --------------------------------------------------------------------------------------- either

    def _begin(self, action: Copy | DirectRead, pack: Pack) -> str:
        """Before the first byte changes. The layer's name, for texts."""
        self._slots.filling(action, pack.keys[action.key.layer])
        return f"layer {pack.index.layers[action.key.layer].name!r} of pack {pack.name!r}"

    def _filled(self, slot: int) -> None:
        self._memory.worked()
        self._slots.resident(slot)
        self._submit(CopyDone(time.monotonic_ns(), self._index, slot))

    def _failed(self, slot: int, name: str, error: TierdError) -> None:
        code, text = error.code, error.text
        if isinstance(error, SourceFailed):
            code = error.failure.code  # said in the log by who read it
        elif isinstance(error, GpuError):
            code, text = (
                ErrorCode.COPY_FAILED,
                f"{name} was not copied to {self._memory.name}: {text}",
            )
        if isinstance(error, SourceFailed | CopyStopped):
            log.debug("%s", text)
        else:
            log.error("%s", text)
            self._memory.failed(error)
        self._submit(CopyFailed(time.monotonic_ns(), self._index, slot, code, text))
