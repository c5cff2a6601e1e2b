"""Private memory of one thread that matrices are expanded into, used again and again."""

from __future__ import annotations

import math

import torch

ALIGNMENT = 64  # a cache line; what torch's own CPU allocator gives


class Scratch:
    """A buffer that starts on ALIGNMENT and grows to the largest matrix that was asked for."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._buffer = torch.empty(0, dtype=torch.uint8)
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

    def _grow(self, nbytes: int) -> None:
        self._matrices.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one
        room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
        begin = -room.data_ptr() % ALIGNMENT
        self._buffer = room[begin : begin + nbytes]
        self.nbytes = nbytes
