"""Packed tensors on a GPU, by the kernels of `device_kernels`.

With a cell for faults nothing is waited for, unless the tensor was never met; without one the call
waits, and raises TensorCorrupt.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tierd_client.device_kernels import device_kernels
from tierd_client.errors import TensorCorrupt

if TYPE_CHECKING:
    import torch

    from tierd_client.device_kernels import DeviceKernels
    from tierd_client.tensors import PackedTensor


def expand(
    tensor: PackedTensor,
    out: torch.Tensor,
    kernels: DeviceKernels | None = None,
    faults: torch.Tensor | None = None,
) -> None:
    """Expand into `out`, of the tensor's shape and dtype. Raises TensorCorrupt."""
    import tierd_kernels

    try:
        (kernels or device_kernels(tensor.device)).expand(tensor.torch_matrix(), out, faults)
    except tierd_kernels.KernelError as error:
        raise _corrupt(tensor, error) from error


def plan(tensor: PackedTensor, tokens: int, kernels: DeviceKernels) -> Any | None:
    """How to `multiply` so many tokens; None: expand it. Raises TensorCorrupt."""
    import tierd_kernels

    try:
        return kernels.plan(tensor.torch_matrix(), tokens)
    except tierd_kernels.KernelError as error:
        raise _corrupt(tensor, error) from error


def multiply(
    tensor: PackedTensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    kernels: DeviceKernels,
    plan: Any,
    *,
    faults: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [..., in_features] @ weight.T + bias as `plan` says, of x's dtype, or float32 unrounded.

    Raises TensorCorrupt.
    """
    import tierd_kernels

    rows, cols = tensor.shape
    flat = x.detach().reshape(math.prod(x.shape[:-1]), cols)
    if cols > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    if bias is not None:
        bias = bias.detach().to(x.dtype)
    out = None if dtype is None else flat.new_empty((len(flat), rows), dtype=dtype)
    try:
        product = kernels.linear(
            tensor.torch_matrix(), flat, bias, plan=plan, faults=faults, out=out
        )
    except tierd_kernels.KernelError as error:
        raise _corrupt(tensor, error) from error
    return product.view(*x.shape[:-1], rows)


def linear(
    tensor: PackedTensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor | None:
    """As `multiply`, waited for; None where expanding is faster. Raises TensorCorrupt."""
    kernels = device_kernels(tensor.device)
    chosen = plan(tensor, math.prod(x.shape[:-1]), kernels)
    if chosen is None:
        return None
    return multiply(tensor, x, bias, kernels, chosen, dtype=dtype)


def _corrupt(tensor: PackedTensor, error: Exception) -> TensorCorrupt:
    return TensorCorrupt(f"{tensor.where}: {error}")
