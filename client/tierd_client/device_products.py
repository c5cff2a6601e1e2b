"""Products with packed matrices on a GPU, which nobody waits for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from tierd_client import device_tensors
from tierd_client.arithmetic_counters import ArithmeticCounters
from tierd_client.expansions import Expansions
from tierd_client.fault_cells import FaultCells
from tierd_client.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_client.device_kernels import DeviceKernels
    from tierd_client.expansions import Glimpses
    from tierd_client.names import Stored
    from tierd_client.streams import Streams
    from tierd_client.tensors import PackedTensor

#: One fused product in so many is timed: two marks take as long to set as a small product.
TIMED_EVERY = 16
#: So many products at most are given to a GPU before somebody looks whether a matrix was wrong.
LOOK_EVERY = 64


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

    def begin_pass(self) -> None:
        """A pass begins. Raises TensorCorrupt for what went wrong in an earlier one."""
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
        return self._expansions.nbytes

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
