"""One stored tensor of a leased layer: expanded, multiplied, or looked at in place.

On the host the kernels of `tierd_kernels` do it, on a GPU those of `device_kernels`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tierd_client import device_tensors
from tierd_client.errors import BadTensorArgument, PackedView, TensorCorrupt, UnsupportedDevice
from tierd_client.tensor_arguments import check_out, check_x

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tierd_client.lease import Lease
    from tierd_client.scratch import Scratch
    from tierd_kernels.torch_matrix import TorchMatrix
    from tierd_layouts.index import Tensor
    from tierd_layouts.packed_matrix import PackedMatrix

#: safetensors' names of element types, and torch's.
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


#: Types of devices whose memory the kernels of `tierd_kernels` read and write.
KERNEL_DEVICES = {"cpu"}

_dtypes: dict[str, torch.dtype] = {}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    if not _dtypes:
        import torch

        _dtypes.update((name, getattr(torch, value)) for name, value in TORCH_NAMES.items())
    return _dtypes[name]


class PackedTensor:
    """A tensor inside a lease. Every method raises LeaseEnded once the lease has ended.

    `shape` is [out_features, in_features] of a linear weight, as in the checkpoint.
    """

    __slots__ = ("_lease", "_matrix", "_record", "_strides", "codec", "dtype", "name", "shape")

    def __init__(self, lease: Lease, record: Tensor) -> None:
        self._lease = lease
        self._record = record
        self._matrix: PackedMatrix | None = None
        self._strides: tuple[int, ...] | None = None
        self.name = record.name
        self.shape = record.shape
        self.codec = record.codec
        self.dtype = torch_dtype(record.dtype)

    def __repr__(self) -> str:
        return f"<PackedTensor {self.name} {list(self.shape)} {self.dtype} {self.codec}>"

    @property
    def device(self) -> torch.device:
        """Where the tensor is, and what is computed with it."""
        return self._lease.mapping.device

    @property
    def where(self) -> str:
        """Model, layer and name, for errors."""
        lease = self._lease
        return f"{lease.opened.name}/{lease.layer.name}, {self.name!r}"

    @property
    def packed(self) -> bool:
        """True when the tensor is stored compressed and has no dense bytes to view."""
        return "data" not in self._record.arrays

    # ---------------------------------------------------------------------------------------- dense

    def dense(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole tensor as private memory: a new tensor, or `out` filled and returned.

        out: same shape and dtype, contiguous, on the same device; else BadTensorArgument. Its old
        content is lost also when TensorCorrupt is raised. On a GPU a packed tensor is waited for.
        """
        import torch

        self._lease.check()
        if out is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        else:
            check_out(self, out)
        if not self.packed:
            if out.numel():
                out.detach().copy_(self.unchecked_view())
            return out
        if self._on_device:
            device_tensors.expand(self, out)
            return out
        import tierd_kernels

        try:
            tierd_kernels.expand(self._packed_matrix(), bits_of(out), threads=self._threads())
        except tierd_kernels.KernelError as error:
            raise self._corrupt(error) from error
        return out

    def torch_matrix(self) -> TorchMatrix:
        """A packed tensor's arrays in the arena, as torch sees them. The first time that the
        model's tensor is met its device is waited for. Raises TensorCorrupt."""
        import tierd_kernels

        lease = self._lease
        lease.check()
        try:
            return lease.opened.matrices.torch(lease.layer, self._record, lease.offset)
        except tierd_kernels.KernelError as error:
            raise self._corrupt(error) from error

    def view(self) -> torch.Tensor:
        """The bytes in the arena as a tensor, without a copy; dense-stored tensors only.

        It must be gone when the lease ends (ViewStillAlive), and so must everything that shares its
        storage. Never write to it. On the host the pages are read-only: that kills the process.
        """
        import torch

        self._lease.check()
        if self.packed:
            raise PackedView(
                f"tensor {self.name!r} is stored with codec {self.codec!r} and has no dense bytes "
                "to view: use dense() or linear()"
            )
        data = self._record.arrays["data"]
        if data.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        offset = self._lease.offset + data.offset
        view, held = self._lease.mapping.tracked(self.dtype, self.shape, offset, data.nbytes)
        self._lease.track(self.name, held)
        return view

    def unchecked_view(self) -> torch.Tensor:
        """As `view`, untracked and in one torch call, for code inside this package that drops it
        before the lease ends. Nothing notices when it does not."""
        if self._strides is None:
            self._strides = tuple(
                math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))
            )
        data = self._record.arrays["data"]
        offset = self._lease.offset + data.offset
        return self._lease.mapping.tensor(self.dtype, self.shape, self._strides, offset)

    # --------------------------------------------------------------------------------------- linear

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ weight.T + bias`, rounded once to x.dtype.

        x: [..., in_features] of the tensor's dtype, on its device. bias: [out_features], any float
        dtype; for a compressed tensor on the host it is added in float32 before the rounding.
        Returns [..., out_features]. A dense-stored tensor is one torch.nn.functional.linear on the
        view; on a GPU a compressed one is that too, expanded into new memory for the call, unless
        the product of so many tokens is faster without. A GPU is waited for.
        """
        if self.packed and not self._on_device:
            return self._fused(x, bias).to(x.dtype)
        import torch

        check_x(self, x)
        product = device_tensors.linear(self, x, bias) if self.packed else None
        if product is not None:
            return product
        weight = self.dense() if self.packed else self.unchecked_view()
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def linear_f32(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As `linear`, the float32 result before the rounding. Where `linear` expands, and of a
        dense-stored tensor, the weight is converted to float32 whole, in private memory."""
        if self.packed and not self._on_device:
            return self._fused(x, bias)
        import torch

        check_x(self, x)
        product = device_tensors.linear(self, x, bias, torch.float32) if self.packed else None
        if product is not None:
            return product
        weight = self.dense() if self.packed else self.unchecked_view()
        return torch.nn.functional.linear(
            x.float(), weight.float(), None if bias is None else bias.float()
        )

    def _fused(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        import torch

        import tierd_kernels

        check_x(self, x)
        rows, cols = self.shape
        tokens = x.numel() // cols if cols else math.prod(x.shape[:-1])
        out = torch.empty(tokens, rows, dtype=torch.float32)
        flat = x.detach().reshape(tokens, cols).contiguous()
        try:
            bits, matrix = bits_of(flat), self._packed_matrix()
            tierd_kernels.linear(matrix, bits, out.numpy(), threads=self._threads())
        except tierd_kernels.KernelError as error:
            raise self._corrupt(error) from error
        if bias is not None:
            if bias.shape != (rows,):
                raise BadTensorArgument(
                    f"bias of {self.name!r} has shape {list(bias.shape)}, expected [{rows}]"
                )
            out += bias.detach().float()
        return out.view(*x.shape[:-1], rows)

    def blocked(self, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        """As `linear`, for many tokens and a compressed tensor only: torch multiplies with blocks
        of rows that are expanded into `scratch`, and bias must be of the tensor's dtype. Not on a
        GPU (UnsupportedDevice)."""
        import tierd_kernels
        from tierd_client.blocks import blocked_product

        check_x(self, x)
        if self._on_device:
            raise UnsupportedDevice(
                f"a blocked product of tensor {self.name!r} on {self.device} is refused: blocks "
                "are for the caches of a processor; use linear()"
            )
        rows, cols = self.shape
        tokens = x.numel() // cols if cols else math.prod(x.shape[:-1])
        try:
            out = blocked_product(
                self._packed_matrix(),
                x.detach().reshape(tokens, cols),
                bias,
                scratch=scratch,
                threads=self._threads(),
            )
        except tierd_kernels.KernelError as error:
            raise self._corrupt(error) from error
        return out.view(*x.shape[:-1], rows)

    # --------------------------------------------------------------------------------------- checks

    @property
    def lease(self) -> Lease:
        """The lease that it is of."""
        return self._lease

    @property
    def _on_device(self) -> bool:
        """Whether the tensor is where the kernels of `tierd_kernels` itself do not compute."""
        return self.device.type not in KERNEL_DEVICES

    def _threads(self) -> int:
        from tierd_client.cores import kernel_threads

        return kernel_threads(self._lease.opened.table.holders)

    def _packed_matrix(self) -> PackedMatrix:
        """Its arrays are read-only, in the arena."""
        if self._matrix is None:
            lease = self._lease
            self._matrix = lease.opened.matrices.packed(lease.layer, self._record, lease.offset)
        return self._matrix

    def _corrupt(self, error: Exception) -> TensorCorrupt:
        return TensorCorrupt(f"{self.where}: {error}")


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The raw bits of a contiguous 16-bit or 32-bit tensor, uint16 or uint32, without a copy."""
    import torch

    bits: np.ndarray[Any, Any]
    bits = tensor.detach().view(torch.uint16 if tensor.itemsize == 2 else torch.uint32).numpy()
    return bits
