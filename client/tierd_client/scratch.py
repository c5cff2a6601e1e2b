"""Private memory that matrices are expanded into, used again and again."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_client.streams import Streams

ALIGNMENT = 64  # a cache line; what torch's own CPU allocator gives
#: On a GPU, of all threads of a model together. More threads than that wait for each other, for as
#: long as it takes to give the GPU its work.
MOST_BUFFERS = 2
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

    def _grow(self, nbytes: int) -> None:
        self._matrices.clear()
        # The old one goes before the new one comes.
        self._buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
        room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=self._device)
        begin = -room.data_ptr() % ALIGNMENT
        self._buffer = room[begin : begin + nbytes]
        self.nbytes = nbytes


class _Buffer:
    """A scratch on a GPU, and the stream that used it last, with a mark behind that use."""

    def __init__(self, device: torch.device, mark: Any) -> None:
        self.scratch = Scratch(device)
        self.stream: Any = None
        self.mark = mark


class DeviceScratch:
    """The scratch of a model on a GPU: at most MOST_BUFFERS buffers, for any number of threads.

    What is given to one stream is done in its order, so a thread that uses its buffer again waits
    for nothing. Another stream waits, on the GPU, until the last use is over.
    """

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self._device = device
        self._streams = streams
        self._free: list[_Buffer] = []
        self._made: list[_Buffer] = []
        self._places = threading.Semaphore(MOST_BUFFERS)
        self._lock = threading.Lock()

    @contextmanager
    def borrowed(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A matrix as `Scratch.matrix` gives it, for what this thread gives its stream inside."""
        with self._places:
            buffer = self._take()
            stream = self._streams.current()
            try:
                if buffer.stream is not None:
                    self._wait_before(buffer, stream, math.prod(shape) * dtype.itemsize)
                yield buffer.scratch.matrix(shape, dtype)
            finally:
                buffer.mark.record(stream)
                buffer.stream = stream
                with self._lock:
                    self._free.append(buffer)

    @property
    def buffers(self) -> int:
        """How many were ever needed at once."""
        return len(self._made)

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.scratch.nbytes for buffer in list(self._made))

    def _take(self) -> _Buffer:
        with self._lock:
            if self._free:
                return self._free.pop()
            buffer = _Buffer(self._device, self._streams.event())
            self._made.append(buffer)
            return buffer

    def _wait_before(self, buffer: _Buffer, stream: Any, nbytes: int) -> None:
        if nbytes > buffer.scratch.nbytes:
            # The old memory goes back to torch, which knows only of the stream that asked for it.
            buffer.mark.synchronize()
        elif buffer.stream != stream:
            stream.wait_event(buffer.mark)
