"""What a GPU found wrong with the contents of matrices, each in a cell of its own.

A kernel that meets a wrong tile notes it in the cell of its matrix and goes on with zeros. Nobody
waits for that: all cells are copied to the host behind the work of a stream, and looked at when the
copy has come.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from tierd_client.errors import TensorCorrupt
from tierd_kernels.faults import NO_FAULT, fault_text

if TYPE_CHECKING:
    import torch

    from tierd_client.streams import Event, Streams

#: Cells that are made at once.
BLOCK_CELLS = 1024


class FaultCells:
    """Those of one model on one device. Thread-safe."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._lock = threading.Lock()
        self._names: dict[str, int] = {}
        self._where: list[str] = []
        self._cells: list[torch.Tensor] = []
        #: Blocks of cells on the device and on the host.
        self._blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copied: Event | None = None
        self._under_way = False
        self._trusted: set[str] = set()

    def cell(self, name: str, where: str) -> torch.Tensor:
        """The cell of a matrix, int64 [1] on the device, at the same address for ever.

        where: model, layer and name, for errors.
        """
        number = self._names.get(name)
        if number is None:
            with self._lock:
                number = self._names.get(name)
                if number is None:
                    number = self._make(name, where)
        return self._cells[number]

    def _make(self, name: str, where: str) -> int:
        number = len(self._where)
        if number == BLOCK_CELLS * len(self._blocks):
            self._blocks.append(self._streams.cells(BLOCK_CELLS, NO_FAULT))
        there, _ = self._blocks[number // BLOCK_CELLS]
        at = number % BLOCK_CELLS
        self._cells.append(there[at : at + 1])
        self._where.append(where)
        self._names[name] = number
        return number

    def sweep(self) -> None:
        """Copy all cells behind what this thread's stream was given, unless a copy is under way."""
        with self._lock:
            if self._under_way or not self._blocks:
                return
            if self._copied is None:
                self._copied = self._streams.event()
            for there, here in self._blocks:
                here.copy_(there, non_blocking=True)
            self._copied.record(self._streams.current())
            self._under_way = True

    def raise_found(self) -> None:
        """Raise TensorCorrupt for the first wrong matrix that a copy which has come shows."""
        with self._lock:
            if not self._under_way or self._copied is None or not self._copied.query():
                return
            self._under_way = False
            for first, (_, here) in enumerate(self._blocks):
                if int(here.amin()) != NO_FAULT:
                    at = int((here != NO_FAULT).nonzero()[0])
                    number, fault = first * BLOCK_CELLS + at, int(here[at])
                    self._cells[number].fill_(NO_FAULT)
                    raise TensorCorrupt(f"{self._where[number]}: {fault_text(fault)}")

    def raise_unmet(self, name: str) -> None:
        """The first time, wait for the device, and raise TensorCorrupt if it found the matrix
        wrong."""
        if name in self._trusted:
            return
        number = self._names[name]
        fault = int(self._cells[number])
        if fault != NO_FAULT:
            self._cells[number].fill_(NO_FAULT)
            raise TensorCorrupt(f"{self._where[number]}: {fault_text(fault)}")
        self._trusted.add(name)

    def met(self, name: str) -> bool:
        """Whether the matrix was computed with, and is not waited for any more."""
        return name in self._trusted
