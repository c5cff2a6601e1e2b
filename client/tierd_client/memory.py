"""What leases and tensors ask of the memory that a layer lies in, on the host or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Fence(Protocol):
    """A mark behind what a GPU was given to do until it was made."""

    def passed(self) -> bool:
        """Whether the GPU is through with it. One behind all streams waits for them."""

    def wait(self) -> None:
        """Wait until it is."""


class ArenaMemory(Protocol):
    """An arena, mapped for reading. Ranges are in bytes, and the caller checked them."""

    nbytes: int

    @property
    def device(self) -> torch.device:
        """Where its tensors are: "cpu", also for a GPU that is played by the host, or "cuda:N"."""

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """A read-only view of a range. Raises BadTensorArgument when it is not the host's."""

    def tensor(
        self, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        """A tensor over a range, whose storage is the whole arena: one torch call, no tracking."""

    def tracked(
        self, dtype: torch.dtype, shape: tuple[int, ...], offset: int, nbytes: int
    ) -> tuple[torch.Tensor, Any]:
        """A tensor over a range, and an object that its storage holds: a weak reference to that
        tells when the last tensor that shares the storage is gone."""

    def fence(self) -> Fence | None:
        """A mark behind what this thread's stream was given to do; None on the host, where what a
        thread computes is done when the call returns."""

    def fence_all(self) -> Fence | None:
        """A mark behind what all streams of this process were given to do, for where nobody knows
        which one read the memory. Takes no time to make, but to ask."""
