"""One linear layer's arithmetic, from leased bytes: expanded into scratch, fused, or in place."""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import replace
from enum import StrEnum
from time import perf_counter_ns
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from tierd_client.arithmetic_counters import ArithmeticCounters
from tierd_client.blocks import blocked_product
from tierd_client.device_kernels import VARIABLE, TorchKernels, device_kernels, kernels_name
from tierd_client.device_products import DeviceProducts
from tierd_client.errors import UnsupportedDevice, UnsupportedOperation
from tierd_client.scratch import HOST, Scratch
from tierd_client.streams import CudaStreams

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tierd_client.device_leasing import DeviceLeases
    from tierd_client.device_products import Captured
    from tierd_client.names import Stored
    from tierd_client.streams import Streams
    from tierd_client.tensors import PackedTensor

__all__ = ["FUSED_ROWS", "Arithmetic", "Compute", "blocked_product"]

#: Fused multiplication up to this many rows of x; above, blocks and dense products win
#: (`make bench ONLY=kernels` has the rows around it).
FUSED_ROWS = 16


class Compute(StrEnum):
    """How packed weights are multiplied.

    DENSE: always the whole matrix expanded, then exactly one `F.linear`: the bits of the in-memory
    model. The weights of a lossy codec (int8, int4) are rounded to the model's dtype first.
    FUSED: few rows straight from the packed form, in float32, rounded once, a lossy codec's weights
    unrounded; more rows as DENSE. On the CPU few are FUSED_ROWS, and more go a block of the matrix
    at a time; on a GPU few is what was measured there.
    """

    DENSE = "dense"
    FUSED = "fused"

    @classmethod
    def chosen(cls, name: str | None, device: torch.device) -> Compute:
        """What a user's choice for `device` means; None is FUSED, if there are kernels for it.

        Raises ValueError for an unknown name, UnsupportedDevice for one that the device has not.
        """
        fused = device.type == HOST.type or kernels_name() != TorchKernels.name
        if name is None:
            return cls.FUSED if fused else cls.DENSE
        if name not in list(cls):
            raise ValueError(f"compute {name!r} is unknown: {', '.join(cls)}")
        if name == cls.FUSED and not fused:
            raise UnsupportedDevice(
                f'compute "fused" on {device} is refused: {VARIABLE}={TorchKernels.name} asks for '
                'operations of torch, which only expand; unset it, or use compute="dense"'
            )
        return cls(name)


class Arithmetic:
    """Computes `x @ W.T + b` for the packed and dense-stored weights of one model. Thread-safe.

    On the CPU each thread that expands has one scratch buffer for as long as it lives: of the
    largest packed matrix with DENSE, of a block with FUSED. On a GPU all threads together have two
    at most. device: where inputs and leased layers are. streams: of a GPU, if not the device's own.
    Raises UnsupportedDevice.
    """

    def __init__(
        self,
        leases: DeviceLeases,
        compute: Compute,
        device: torch.device = HOST,
        streams: Streams | None = None,
    ) -> None:
        self.compute = compute
        self.device = device
        if streams is None and device.type != HOST.type:
            streams = CudaStreams(device)
        #: Those of the GPU; None on the CPU.
        self.streams = streams
        self._products = None
        if streams is not None:
            kernels = device_kernels(device)
            self._products = DeviceProducts(device, streams, kernels, leases, self.fused)
        self._leases = leases
        self._local = threading.local()
        self._scratches: weakref.WeakSet[Scratch] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._counters = ArithmeticCounters()

    @property
    def fused(self) -> bool:
        """Whether few tokens are multiplied without expanding."""
        return self.compute is Compute.FUSED

    @property
    def kernels(self) -> str:
        """Which kernels compute: "cpu", or as TIERD_GPU_KERNELS names those of a GPU."""
        return HOST.type if self._products is None else self._products.kernels.name

    def linear(self, stored: Stored, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x: [..., in_features] of the weight's dtype. Returns [..., out_features].

        Uses the lease of the layer that this thread is inside, else takes one for the call.
        Raises UnsupportedOperation when `x` wants a gradient.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UnsupportedOperation(
                f"{stored.name}: the input requires a gradient, but a served model computes "
                "forward only: use torch.no_grad()"
            )
        lease = self._leases.current(stored.layer)
        if lease is not None:
            return self._multiply(stored, lease[stored.name], x, bias)
        lease = self._leases.enter(stored.layer)
        try:
            return self._multiply(stored, lease[stored.name], x, bias)
        finally:
            self._leases.leave(stored.layer)

    def _multiply(
        self, stored: Stored, weight: PackedTensor, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not weight.packed:
            return _product(x, weight, None, bias)
        if self._products is not None:
            return self._products.linear(stored, weight, x, bias, _product)
        begin = perf_counter_ns()
        if self.fused:
            few = math.prod(x.shape[:-1]) <= FUSED_ROWS
            out = weight.linear(x, bias) if few else weight.blocked(x, bias, self._scratch())
            elapsed = perf_counter_ns() - begin
            with self._lock:
                self._counters.fused_calls += few
                self._counters.fused_ns += few * elapsed
                self._counters.blocked_calls += not few
                self._counters.blocked_ns += (not few) * elapsed
            return out
        dense = weight.dense(self._scratch().matrix(weight.shape, weight.dtype))
        elapsed = perf_counter_ns() - begin
        with self._lock:
            self._counters.expansions += 1
            self._counters.expand_ns += elapsed
        return _product(x, weight, dense, bias)

    def _scratch(self) -> Scratch:
        scratch: Scratch | None = getattr(self._local, "scratch", None)
        if scratch is None:
            scratch = self._local.scratch = Scratch()
            self._scratches.add(scratch)
        return scratch

    def begin_pass(self) -> None:
        """A pass of the whole model begins in this thread. Raises TensorCorrupt for what a GPU
        found wrong meanwhile."""
        if self._products is not None:
            self._products.begin_pass()

    def capturing(self) -> AbstractContextManager[Captured]:
        """See `DeviceProducts.capturing`; on a GPU only."""
        assert self._products is not None
        return self._products.capturing()

    def repeated(self, captured: Captured) -> None:
        """Products that were captured were done once more."""
        assert self._products is not None
        self._products.repeated(captured)

    def counters(self) -> ArithmeticCounters:
        """A copy of the sums."""
        if self._products is not None:
            return self._products.counters()
        with self._lock:
            return replace(self._counters)

    @property
    def scratch_bytes(self) -> int:
        """Private memory of all threads' scratch buffers; on a GPU with room for temporaries."""
        if self._products is not None:
            return self._products.scratch_bytes
        return sum(scratch.nbytes for scratch in list(self._scratches))


def _product(
    x: torch.Tensor, weight: PackedTensor, dense: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """One `F.linear`, with the expanded matrix or else the arena's bytes in place."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _product(x, weight, dense, bias)
    if dense is not None:
        return functional.linear(x, dense, bias)
    # The view has no name of its own here: a traceback would keep it beyond the lease.
    return functional.linear(x, _like_parameter(_view(weight)), bias)


def _view(weight: PackedTensor) -> torch.Tensor:
    view = weight.unchecked_view()
    if view.is_inference() and not torch.is_inference_mode_enabled():
        # The mapping was first seen in inference mode; such tensors take no requires_grad here.
        view = weight.view()
    return view


def _like_parameter(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix as torch sees a parameter of a model in memory: wanting a gradient, no view.

    Only then `matmul` folds a strided batch into one product; it is the same product otherwise,
    summed in another order. (`should_fold` in ATen/native/LinearAlgebra.cpp.)
    """
    return matrix.detach().requires_grad_()
