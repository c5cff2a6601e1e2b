"""Private memory that matrices are expanded into, used again and again."""

from __future__ import annotations

import math

import torch

ALIGNMENT = 64  # a cache line; what torch's own CPU allocator gives
HOST = torch.device("cpu")


class Scratch:
    """A buffer that starts on ALIGNMENT and grows to the largest matrix that was asked for."""

    def __init__(self, device: torch.device = HOST) -> None:
        self.nbytes = 0
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._matrices: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def matrix(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor at the buffer's start; the previous one's content is lost.

        To torch it looks like the parameter of a model in memory: it wants a gradient.
        """
        found = self._matrices.get((shape, dtype))
        if found is None:
            nbytes = math.prod(shape) * dtype.itemsize
            with torch.inference_mode(False):  # the thread may leave inference mode later
                if nbytes > self.nbytes:
                    self._grow(nbytes)
                found = self._buffer[:nbytes].view(dtype).view(shape).detach().requires_grad_()
            self._matrices[shape, dtype] = found
        return found

    def reserve(self, nbytes: int) -> None:
        """Grow to `nbytes` before anybody asks for a matrix."""
        if nbytes > self.nbytes:
            with torch.inference_mode(False):
                self._grow(nbytes)

    def _grow(self, nbytes: int) -> None:
        self._matrices.clear()
        self.nbytes = 0  # should there be no room for the new one
        # The old one goes before the new one comes.
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=self._device)
        begin = -room.data_ptr() % ALIGNMENT
        self._buffer = room[begin : begin + nbytes]
        self.nbytes = nbytes
