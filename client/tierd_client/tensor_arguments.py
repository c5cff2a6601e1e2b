"""What a stored tensor takes as input and output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_client.errors import BadTensorArgument

if TYPE_CHECKING:
    import torch

    from tierd_client.tensors import PackedTensor


def check_x(tensor: PackedTensor, x: torch.Tensor) -> None:
    """Raise BadTensorArgument unless `x` can be multiplied with it, LeaseEnded after its lease."""
    import torch

    tensor.lease.check()
    name, shape = tensor.name, tensor.shape
    if len(shape) != 2:
        raise BadTensorArgument(f"linear needs a matrix, tensor {name!r} has shape {list(shape)}")
    if x.dtype != tensor.dtype:
        raise BadTensorArgument(f"x is {x.dtype}, tensor {name!r} is {tensor.dtype}")
    if x.device != tensor.device:
        raise BadTensorArgument(f"x is on {x.device}, tensor {name!r} is on {tensor.device}")
    if x.dim() == 0 or x.shape[-1] != shape[1]:
        raise BadTensorArgument(
            f"x has shape {list(x.shape)}, tensor {name!r} takes [..., {shape[1]}]"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise BadTensorArgument(
            f"x requires a gradient, tensor {name!r} computes forward only: use torch.no_grad()"
        )


def check_out(tensor: PackedTensor, out: torch.Tensor) -> None:
    """Raise BadTensorArgument unless the tensor can be expanded into `out`."""
    name, shape = tensor.name, tensor.shape
    if out.dtype != tensor.dtype:
        raise BadTensorArgument(f"out is {out.dtype}, tensor {name!r} is {tensor.dtype}")
    if tuple(out.shape) != shape:
        raise BadTensorArgument(
            f"out has shape {list(out.shape)}, tensor {name!r} has {list(shape)}"
        )
    if out.device != tensor.device:
        raise BadTensorArgument(f"out is on {out.device}, tensor {name!r} is on {tensor.device}")
    if not out.is_contiguous():
        raise BadTensorArgument(
            f"out has strides {list(out.stride())}, dense() fills contiguous memory only"
        )
