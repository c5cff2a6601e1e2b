"""Memory of a GPU that matrices are expanded into: two buffers, for all threads of a model."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tierd_client.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from tierd_client.streams import Event, Streams

#: More threads than that wait for each other, for as long as it takes to give the GPU its work.
MOST_BUFFERS = 2


class Buffer:
    """A scratch, the stream that used it last, with a mark behind that use, and the thread.

    ahead: what it was filled with before anybody asked, until somebody uses it.
    """

    def __init__(self, device: torch.device, mark: Event) -> None:
        self.scratch = Scratch(device)
        self.stream: Any = None
        self.thread = 0
        self.mark = mark
        self.ahead: object = None


class DeviceScratch:
    """The scratch of a model on a GPU: at most MOST_BUFFERS buffers, for any number of threads.

    What is given to one stream is done in its order, so a thread that uses its buffer again waits
    for nothing. Another stream waits, on the GPU, until the last use is over.
    """

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self._device = device
        self._streams = streams
        self._free: list[Buffer] = []
        self._made: list[Buffer] = []
        self._places = threading.Semaphore(MOST_BUFFERS)
        self._lock = threading.Lock()

    @contextmanager
    def borrowed(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        wanted: Callable[[object], bool] = lambda ahead: False,
    ) -> Iterator[tuple[torch.Tensor, bool]]:
        """A matrix as `Scratch.matrix` gives it, for what this thread gives its stream inside.

        wanted: whether a label of `filled_ahead` says what the caller would fill it with; then that
        buffer is taken, and the second item is True: it is there, or will be when it is its turn.
        """
        with self._places:
            buffer = self._take(wanted)
            there = buffer.ahead is not None and wanted(buffer.ahead)
            with self._used(buffer, shape, dtype) as matrix:
                yield matrix, there

    @contextmanager
    def filled_ahead(
        self, shape: tuple[int, ...], dtype: torch.dtype, label: object
    ) -> Iterator[torch.Tensor | None]:
        """A matrix for what is given to a stream inside, and left there under `label`.

        None, if no buffer is free that this thread used last, or would have to grow. Waits for
        nothing on the host. A label stays until anybody borrows the buffer.
        """
        buffer = self._take_spare(math.prod(shape) * dtype.itemsize)
        if buffer is None:
            yield None
            return
        try:
            with self._used(buffer, shape, dtype, label) as matrix:
                yield matrix
        finally:
            self._places.release()

    @property
    def buffers(self) -> int:
        """How many were ever needed at once."""
        return len(self._made)

    @property
    def largest_bytes(self) -> int:
        """Memory of the largest buffer."""
        return max((buffer.scratch.nbytes for buffer in list(self._made)), default=0)

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.scratch.nbytes for buffer in list(self._made))

    @contextmanager
    def _used(
        self, buffer: Buffer, shape: tuple[int, ...], dtype: torch.dtype, label: object = None
    ) -> Iterator[torch.Tensor]:
        stream = self._streams.current()
        left: object = None
        buffer.ahead, buffer.thread = None, threading.get_ident()
        try:
            if buffer.stream is not None:
                self._wait_before(buffer, stream, math.prod(shape) * dtype.itemsize)
            yield buffer.scratch.matrix(shape, dtype)
            left = label
        finally:
            buffer.mark.record(stream)
            buffer.stream, buffer.ahead = stream, left
            with self._lock:
                self._free.append(buffer)

    def _take(self, wanted: Callable[[object], bool]) -> Buffer:
        with self._lock:
            for buffer in self._free:
                if buffer.ahead is not None and wanted(buffer.ahead):
                    self._free.remove(buffer)
                    return buffer
            # What was filled ahead may still be wanted, if not by this thread.
            for buffer in reversed(self._free):
                if buffer.ahead is None:
                    self._free.remove(buffer)
                    return buffer
            return self._free.pop() if self._free else self._make()

    def _take_spare(self, nbytes: int) -> Buffer | None:
        """A place and a buffer, if there is one that nobody will miss."""
        if not self._places.acquire(blocking=False):
            return None
        buffer = None
        try:
            with self._lock:
                buffer = self._spare(nbytes)
        finally:
            if buffer is None:
                self._places.release()
        return buffer

    def _spare(self, nbytes: int) -> Buffer | None:
        me = threading.get_ident()
        for buffer in self._free:
            if buffer.thread == me and nbytes <= buffer.scratch.nbytes:
                self._free.remove(buffer)
                return buffer
        if len(self._made) < MOST_BUFFERS and all(each.thread == me for each in self._made):
            return self._make(max(nbytes, self.nbytes))
        return None

    def _make(self, nbytes: int = 0) -> Buffer:
        buffer = Buffer(self._device, self._streams.event())
        buffer.scratch.reserve(nbytes)
        self._made.append(buffer)
        return buffer

    def _wait_before(self, buffer: Buffer, stream: Any, nbytes: int) -> None:
        if nbytes > buffer.scratch.nbytes:
            # The old memory goes back to torch, which knows only of the stream that asked for it.
            buffer.mark.synchronize()
        elif buffer.stream != stream:
            stream.wait_event(buffer.mark)
