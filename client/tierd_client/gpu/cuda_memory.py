"""Addresses on a CUDA GPU that show an arena of the daemon, as tensors by DLPack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierd_client import fork
from tierd_client.errors import BadTensorArgument
from tierd_client.gpu.dlpack import bytes_at
from tierd_client.gpu.events import CudaFence, DeviceFence

if TYPE_CHECKING:
    import torch


class Owner:
    """What every storage made from the memory holds; the addresses go when it is gone."""

    __slots__ = ("__weakref__", "owner")

    def __init__(self, owner: Any = None) -> None:
        self.owner = owner


class CudaMemory:
    """`nbytes` of addresses on `device`, from `address` on. A subclass has memory shown there and
    ends that when `_owner` is gone: never under a tensor."""

    def __init__(self, address: int, nbytes: int, device: torch.device, what: str) -> None:
        self.nbytes = nbytes
        self.what = what
        self._address = address
        self._device = device
        self._life = fork.current()
        self._owner = Owner()
        self._tensors: dict[torch.dtype, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """The GPU, with its number in this process."""
        return self._device

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """Refuse: the CPU cannot read it."""
        raise BadTensorArgument(
            f"{self.what} is on {self._device}, which the CPU cannot read: use tensors"
        )

    def tensor(
        self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        """A tensor over a range, whose storage is the whole arena.

        offset: in bytes, a multiple of the item size. Never write to it.
        """
        whole = self._tensors.get(dtype)
        if whole is None:
            import torch

            nbytes = self.nbytes // dtype.itemsize * dtype.itemsize
            with torch.inference_mode(False):  # the thread may leave inference mode later
                whole = bytes_at(self._address, nbytes, self._device, self._owner).view(dtype)
            self._tensors[dtype] = whole
        return whole.as_strided(shape, strides, offset // dtype.itemsize)

    def tracked(
        self, dtype: torch.dtype, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> tuple[torch.Tensor, Any]:
        """A tensor over a range, and an object that its storage holds."""
        held = Owner(self._owner)
        view = bytes_at(self._address + offset, nbytes, self._device, held)
        return view.view(dtype).view(shape), held

    def fence(self) -> CudaFence | None:
        """A mark in this thread's current stream; None in a forked child, which has no CUDA."""
        return CudaFence(self._device) if self._life is fork.current() else None

    def fence_all(self) -> DeviceFence | None:
        """A mark behind all streams of this process; None in a forked child."""
        return DeviceFence(self._device) if self._life is fork.current() else None
