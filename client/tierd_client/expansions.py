"""Matrices expanded on a GPU, which nobody waits for: where to, and which one beforehand.

A matrix is expanded and then multiplied in the order of one stream. While that goes on, the matrix
that followed it the last time is expanded in another stream, if its layer's lease is there. Only a
matrix that was never met is waited for.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from tierd_client import device_tensors
from tierd_client.device_scratch import DeviceScratch
from tierd_client.errors import TierdError
from tierd_client.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from tierd_client.device_kernels import DeviceKernels
    from tierd_client.fault_cells import FaultCells
    from tierd_client.lease import Lease
    from tierd_client.names import Stored
    from tierd_client.streams import Streams
    from tierd_client.tensors import PackedTensor


class Glimpses(Protocol):
    """What is asked of a model's leases."""

    def glimpse(self, layer: int) -> AbstractContextManager[Lease | None]:
        """The lease of a layer if it is there without waiting. What is given to the stream that is
        current at the end is fenced."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """What a buffer was filled with before anybody asked: the matrix as one lease had it."""

    name: str
    lease: weakref.ref[Lease]


class _Place(threading.local):
    """What one thread expanded last, and before that."""

    def __init__(self) -> None:
        self.last: tuple[str, str] = ("", "")


class Expansions:
    """Those of one model on one device. Thread-safe."""

    def __init__(
        self,
        device: torch.device,
        streams: Streams,
        kernels: DeviceKernels,
        cells: FaultCells,
        leases: Glimpses,
    ) -> None:
        self._streams = streams
        self._kernels = kernels
        self._cells = cells
        self._leases = leases
        self._scratch = DeviceScratch(device, streams)
        self._watch = Stopwatch(streams)
        self._place = _Place()
        #: Which matrix followed two others, the last time.
        self._followers: dict[tuple[str, str], Stored] = {}
        self._no_room = False
        self._room_bytes = 0  # that one expansion needed
        #: Expansions that began before their matrix was asked for, and those of them that were then
        #: used.
        self.ahead = self.used_ahead = 0

    @contextmanager
    def expanded(self, stored: Stored, weight: PackedTensor) -> Iterator[torch.Tensor]:
        """The whole matrix in scratch, for what this thread gives its stream inside.

        The first time that a matrix of the model is met, the device is waited for: what is wrong
        with it is raised before anything is computed with it. Later faults are in the cells.
        Raises TensorCorrupt.
        """

        def wanted(ahead: object) -> bool:
            return (
                isinstance(ahead, _Ahead)
                and ahead.name == weight.name
                and ahead.lease() is weight.lease
            )

        with self._scratch.borrowed(weight.shape, weight.dtype, wanted) as (matrix, there):
            if there:
                self.used_ahead += 1
            else:
                self._expand(weight, matrix)
            yield matrix
            following = self._following(stored)
            if following is not None:  # into the other buffer
                self._expand_ahead(following)

    def totals(self) -> tuple[int, int]:
        """How many there were, and the nanoseconds of those that the GPU is through with."""
        return self._watch.totals()

    def count(self, times: int) -> None:
        """So many were done in a graph."""
        self._watch.count(times)

    @property
    def largest_bytes(self) -> int:
        """Of the matrices that were expanded."""
        return self._scratch.largest_bytes

    @property
    def nbytes(self) -> int:
        """Memory of the device for all this, temporaries included."""
        return self._scratch.nbytes + self._scratch.buffers * self._room_bytes

    def _expand(self, weight: PackedTensor, out: torch.Tensor) -> None:
        cell = self._cells.cell(weight.name, weight.where)
        with self._watch.running():
            device_tensors.expand(weight, out, self._kernels, cell)
        if not self._cells.met(weight.name):
            self._cells.raise_unmet(weight.name)
            needed = self._kernels.temporary_bytes(weight.torch_matrix())
            self._room_bytes = max(self._room_bytes, needed)

    def _following(self, stored: Stored) -> Stored | None:
        """Note that this thread is at a matrix; returns the one that it may expand next."""
        before, last = self._place.last
        self._followers[before, last] = stored
        self._place.last = last, stored.name
        return self._followers.get(self._place.last)

    def _expand_ahead(self, stored: Stored) -> None:
        if self._no_room or not self._cells.met(stored.name):
            return  # it would be waited for
        try:
            self._try_ahead(stored)
        except torch.OutOfMemoryError:
            self._no_room = True  # for a second buffer: nothing needs it
        except TierdError:
            pass  # it is said where the matrix is asked for

    def _try_ahead(self, stored: Stored) -> None:
        with (
            self._streams.aside(),
            self._leases.glimpse(stored.layer) as lease,
        ):
            if lease is None:
                return
            weight, label = lease[stored.name], _Ahead(stored.name, weakref.ref(lease))
            with self._scratch.filled_ahead(weight.shape, weight.dtype, label) as matrix:
                if matrix is not None:
                    self._expand(weight, matrix)
                    self.ahead += 1
