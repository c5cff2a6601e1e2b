"""Packed matrices expanded on a GPU, which nobody waits for: where to, how long, what was wrong.

A matrix is expanded and then multiplied in the order of one stream. How long the expansion took,
and whether a tile's contents were wrong, is known when the GPU is through with it: it is looked up
when the next one is given to it, or when somebody asks. Only a matrix that was never met is waited
for.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd_client.errors import TensorCorrupt
from tierd_client.scratch import DeviceScratch
from tierd_kernels.torch_expand import NO_FAULT, TILE_BYTES, fault_text, new_faults
from tierd_layouts.tile_grid import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from tierd_client.streams import Event, Streams
    from tierd_client.tensors import PackedTensor

#: Of temporaries for each matrix that is being expanded, at most: enough that the GPU, and not the
#: launching of its kernels, takes the time.
ROOM_BYTES = 128 << 20


@dataclass(slots=True)
class _Mark:
    """One expansion under way: its time, and a cell for the first wrong tile, here and there."""

    begin: Event
    end: Event
    cell: torch.Tensor
    host_cell: torch.Tensor
    where: str = ""


class Expansions:
    """Those of one model on one device. Thread-safe."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self._device = device
        self._streams = streams
        self._scratch = DeviceScratch(device, streams)
        self._lock = threading.Lock()
        self._limits: dict[str, tuple[int, int]] = {}
        self._pending: deque[_Mark] = deque()
        self._idle: list[_Mark] = []
        self._wrong: deque[str] = deque()
        self._count = self._ns = 0
        self._room_bytes = 0  # that one expansion needed

    @contextmanager
    def expanded(self, weight: PackedTensor) -> Iterator[torch.Tensor]:
        """The whole matrix in scratch, for what this thread gives its stream inside.

        The first time that a matrix of the model is met, the device is waited for: what is wrong
        with it is raised before anything is computed with it. Bytes that go wrong later, which no
        pack does, are raised for the next matrix after the device is through. Raises TensorCorrupt.
        """
        self._collect()
        with self._lock:
            wrong = self._wrong.popleft() if self._wrong else None
        if wrong is not None:
            raise TensorCorrupt(wrong)
        with self._scratch.borrowed(weight.shape, weight.dtype) as matrix:
            self._expand(weight, matrix)
            yield matrix

    def totals(self) -> tuple[int, int]:
        """How many there were, and the nanoseconds of those that the GPU is through with."""
        self._collect()
        with self._lock:
            return self._count, self._ns

    @property
    def nbytes(self) -> int:
        """Memory of the device for all this, temporaries included."""
        return self._scratch.nbytes + self._scratch.buffers * self._room_bytes

    def _expand(self, weight: PackedTensor, out: torch.Tensor) -> None:
        known = self._limits.get(weight.name)
        limits = known or weight.limits()
        with self._lock:
            mark = self._idle.pop() if self._idle else None
        if mark is None:
            event, cell = self._streams.event, new_faults(self._device)
            mark = _Mark(event(), event(), cell, self._streams.host_cell())
        mark.where = weight.where
        tiles = math.prod(-(-length // TILE) for length in weight.shape)
        stream = self._streams.current()
        mark.begin.record(stream)
        mark.cell.fill_(NO_FAULT)
        faults = mark.cell if known else None  # None: wait, and raise at once
        weight.expand_into(out, faults=faults, limits=limits, room_bytes=ROOM_BYTES)
        self._limits[weight.name] = limits
        mark.host_cell.copy_(mark.cell, non_blocking=True)
        mark.end.record(stream)
        with self._lock:
            self._pending.append(mark)
            self._count += 1
            self._room_bytes = max(self._room_bytes, min(tiles * TILE_BYTES, ROOM_BYTES))

    def _collect(self) -> None:
        """Look at what the GPU is through with; the others stay."""
        with self._lock:
            while self._pending and self._pending[0].end.query():
                mark = self._pending.popleft()
                self._ns += round(mark.begin.elapsed_time(mark.end) * 1e6)
                fault = int(mark.host_cell)
                if fault != NO_FAULT:
                    self._wrong.append(f"{mark.where}: {fault_text(fault)}")
                self._idle.append(mark)
