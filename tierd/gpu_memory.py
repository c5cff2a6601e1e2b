"""What happens to a GPU's memory: chunks handed to clients, asked back, given to the driver.

Belongs to the loop's thread; what a driver may take long for is done by the GPU's worker.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

from tierd.core.model import DiscardDone
from tierd.gpu.errors import DeviceLost, GpuError
from tierd.gpu.span import chunks_of
from tierd.mappings import Discarding, Mappings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable

    from tierd.core.model import Discard
    from tierd.core.stack_model import StackEvent
    from tierd.errors import TierdError
    from tierd.gpu.device import Device, Export
    from tierd.gpu.worker import GpuWorker
    from tierd.mappings import Chunk
    from tierd.slots import Slots

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0  # until memory that the driver did not take back is offered again
LATE_NS = 5_000_000_000  # a client that was asked so long ago is said not to answer ...
PATIENCE_SECONDS = 30.0  # ... and is disconnected after this long


class GpuMemory:
    """Of one GPU. Needs an open device."""

    def __init__(
        self,
        name: str,
        worker: GpuWorker,
        slots: Slots,
        loop: asyncio.AbstractEventLoop,
        submit: Callable[[StackEvent], None],
        lost: Callable[[str], None],
        unanswered: Callable[[int], None],
    ) -> None:
        """lost: called when nothing on the GPU will work any more, with the reason. unanswered:
        called with a client that was asked in vain, to be disconnected."""
        self.mappings = Mappings()
        self.note: str | None = None  #: what went wrong, if that was the last thing tried
        self.name = name
        self._worker = worker
        self._slots = slots
        self._loop = loop
        self._submit = submit
        self._lost = lost
        self._unanswered = unanswered
        self._stopped = False

    @property
    def _device(self) -> Device:
        return self._worker.device

    def stop(self) -> None:
        """Decide nothing more; what the worker does is ended by its owner."""
        self._stopped = True

    # ------------------------------------------------------------------------------------- clients

    def export(
        self,
        client: int,
        arena: int,
        chunks: list[int],
        done: Callable[[list[Export] | GpuError], None],
    ) -> None:
        """Hand chunks in which the client has a lease to it; `done` closes the descriptors."""
        if self._device.elastic:  # else nothing is ever asked back
            self.mappings.give(client, arena, chunks)

        def finished(outcome: list[Export] | GpuError) -> None:
            if isinstance(outcome, GpuError):
                log.error("%s: client %d is given no chunks: %s", self.name, client, outcome.text)
                self.failed(outcome)
                self.unmapped(client, [(arena, chunk) for chunk in chunks])
            done(outcome)

        self._worker.submit(lambda device: _export_all(device, arena, chunks), finished)

    def unmapped(self, client: int, chunks: Iterable[Chunk]) -> None:
        """The client has these chunks no more."""
        for discarding in self.mappings.take(client, chunks):
            self._free(discarding)

    def fenced(self, client: int) -> None:
        """The client is gone, with all that it had mapped."""
        for discarding in self.mappings.gone(client):
            self._free(discarding)

    def late_clients(self) -> set[int]:
        """Those that were asked to unmap something and do not answer."""
        return self.mappings.late(time.monotonic_ns() - LATE_NS)

    # ------------------------------------------------------------------------------------- discards

    def discard(self, discard: Discard) -> None:
        """Give memory back to the driver, once no client has it."""
        first, count = chunks_of(discard.offset, discard.nbytes, self._device.chunk_bytes)
        discarding = Discarding(discard.arena, first, count, time.monotonic_ns())
        if self.mappings.discard(discarding):
            self._free(discarding)
        else:
            self._slots.table.call_attention()
            self._loop.call_later(PATIENCE_SECONDS, self._lose_patience, discarding.since_ns)

    def _lose_patience(self, since_ns: int) -> None:
        """One bad client must not hold up the others for ever. What it still has mapped is its own
        from then on: no chunk takes that memory again."""
        if self._stopped:
            return
        for client in sorted(self.mappings.late(since_ns + 1)):
            self._unanswered(client)

    def _free(self, gone: Discarding) -> None:
        if self._stopped:
            return
        self._worker.submit(
            lambda device: device.free(gone.arena, gone.first, gone.count),
            lambda outcome: self._freed(gone, outcome),
        )

    def _freed(self, gone: Discarding, outcome: GpuError | None) -> None:
        if self._stopped:
            return
        if isinstance(outcome, GpuError):
            # Until the driver takes it, the memory counts: the core waits for it.
            log.error("%s: memory was not given back: %s", self.name, outcome.text)
            self.failed(outcome)
            if not isinstance(outcome, DeviceLost):
                self._loop.call_later(RETRY_SECONDS, self._free, gone)
            return
        self.worked()
        chunk_bytes = self._device.chunk_bytes
        offset, nbytes = gone.first * chunk_bytes, gone.count * chunk_bytes
        self._submit(DiscardDone(time.monotonic_ns(), gone.arena, offset, nbytes))

    def worked(self) -> None:
        self.note = None

    def failed(self, error: TierdError) -> None:
        self.note = error.text
        if isinstance(error, DeviceLost):
            self._lost(error.text)


def _export_all(device: Device, arena: int, chunks: list[int]) -> list[Export]:
    exports: list[Export] = []
    try:
        for chunk in chunks:
            exports.append(device.export(arena, chunk))
            if exports[-1].handle is not None:
                break  # it is the whole arena's
    except BaseException:
        close_all(exports)
        raise
    return exports


def close_all(exports: Iterable[Export]) -> None:
    for export in exports:
        if export.fd is not None:
            os.close(export.fd)
