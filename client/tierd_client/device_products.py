"""Products with packed matrices on a GPU, which nobody waits for."""

from __future__ import annotations

import math
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tierd_client import device_tensors
from tierd_client.arithmetic_counters import ArithmeticCounters
from tierd_client.expansions import Expansions
from tierd_client.fault_cells import FaultCells
from tierd_client.scratch import Scratch
from tierd_client.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tierd_client.device_kernels import DeviceKernels
    from tierd_client.expansions import Glimpses
    from tierd_client.names import Stored
    from tierd_client.streams import Streams
    from tierd_client.tensors import PackedTensor

#: One fused product in so many is timed: two marks take as long to set as a small product.
TIMED_EVERY = 16
#: So many products at most are given to a GPU before somebody looks whether a matrix was wrong.
LOOK_EVERY = 64


class Captured:
    """Products in a graph: how many, and where its matrices are expanded."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = Scratch(device)
        self.fused_calls = self.expansions = 0


class _Place(threading.local):
    """What one thread is capturing."""

    def __init__(self) -> None:
        self.captured: Captured | None = None


class DeviceProducts:
    """Those of one model on one device. Thread-safe.

    fused: few tokens are multiplied without expanding, where the kernels found that faster.
    """

    def __init__(
        self,
        device: torch.device,
        streams: Streams,
        kernels: DeviceKernels,
        leases: Glimpses,
        fused: bool,
    ) -> None:
        self.kernels = kernels
        self._fused = fused
        self._cells = FaultCells(streams)
        self._expansions = Expansions(device, streams, kernels, self._cells, leases)
        self._watch = Stopwatch(streams, TIMED_EVERY)
        self._plans: dict[tuple[str, int], Any] = {}
        self._device = device
        self._place = _Place()
        self._captures: weakref.WeakSet[Captured] = weakref.WeakSet()
        self._unseen = 0  # products since the cells were looked at

    def linear(
        self,
        stored: Stored,
        weight: PackedTensor,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        product: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """x @ weight.T + bias. product: of x, the tensor, its expanded matrix, bias.

        Raises TensorCorrupt: for this matrix when it is met for the first time, later for one that
        went wrong meanwhile.
        """
        if self._place.captured is not None:
            return self._capture(self._place.captured, weight, x, bias, product)
        self._look()
        plan = self._plan(weight, math.prod(x.shape[:-1])) if self._fused else None
        if plan is None:
            with self._expansions.expanded(stored, weight) as matrix:
                return product(x, weight, matrix, bias)
        cell = self._cells.cell(weight.name, weight.where)
        with torch.no_grad(), self._watch.running():
            out = device_tensors.multiply(weight, x, bias, self.kernels, plan, faults=cell)
        self._cells.raise_unmet(weight.name)
        return out

    def _capture(
        self,
        captured: Captured,
        weight: PackedTensor,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        product: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """As `linear`, without marks: one stream does it all, with one buffer."""
        plan = self._plan(weight, math.prod(x.shape[:-1])) if self._fused else None
        cell = self._cells.cell(weight.name, weight.where)
        if plan is not None:
            captured.fused_calls += 1
            with torch.no_grad():
                return device_tensors.multiply(weight, x, bias, self.kernels, plan, faults=cell)
        captured.expansions += 1
        captured.scratch.reserve(self._expansions.largest_bytes)
        matrix = captured.scratch.matrix(weight.shape, weight.dtype)
        device_tensors.expand(weight, matrix, self.kernels, cell)
        return product(x, weight, matrix, bias)

    @contextmanager
    def capturing(self) -> Iterator[Captured]:
        """Inside, what this thread gives its stream is captured: only what a pass like it has met
        before."""
        captured = Captured(self._device)
        self._captures.add(captured)
        self._place.captured = captured
        try:
            yield captured
        finally:
            self._place.captured = None

    def repeated(self, captured: Captured) -> None:
        """A graph was replayed."""
        self._watch.count(captured.fused_calls)
        self._expansions.count(captured.expansions)

    def begin_pass(self) -> None:
        """A pass begins. Raises TensorCorrupt for what went wrong in an earlier one."""
        if self._place.captured is None:
            self._unseen = LOOK_EVERY
            self._look()

    def counters(self) -> ArithmeticCounters:
        """The sums."""
        expansions, expand_ns = self._expansions.totals()
        fused_calls, fused_ns = self._watch.totals()
        return ArithmeticCounters(
            expansions=expansions,
            expand_ns=expand_ns,
            expanded_ahead=self._expansions.ahead,
            used_ahead=self._expansions.used_ahead,
            fused_calls=fused_calls,
            fused_ns=fused_ns,
        )

    @property
    def scratch_bytes(self) -> int:
        """Memory of the device that this model has for itself."""
        captured = sum(each.scratch.nbytes for each in list(self._captures))
        return self._expansions.nbytes + captured

    def _plan(self, weight: PackedTensor, tokens: int) -> Any | None:
        key = weight.name, tokens
        if key not in self._plans:
            self._plans[key] = device_tensors.plan(weight, tokens, self.kernels)
        return self._plans[key]

    def _look(self) -> None:
        self._unseen += 1
        if self._unseen > LOOK_EVERY:
            self._unseen = 0
            self._cells.raise_found()
            self._cells.sweep()
