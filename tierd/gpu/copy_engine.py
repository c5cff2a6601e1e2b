"""A copy engine without a GPU: a thread that moves bytes in order, as slowly as it was told to.

Like a GPU's: a copy's latency passes while the copies before it move, its bytes come after theirs.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque

import numpy as np

from tierd.gpu.errors import DeviceError

STEP_BYTES = 1 << 20  # with a bandwidth, bytes arrive in pieces of this size
_SECOND_NS = 1_000_000_000


class EngineCopy:
    """A `device.Pending`."""

    def __init__(self, target: int, source: memoryview) -> None:
        self.target = target
        self.source: memoryview | None = source  # until it was read
        self.address = address_of(source)
        self.nbytes = source.nbytes
        self.submitted_ns = time.monotonic_ns()
        self.failure: str | None = None
        self.done = threading.Event()

    def wait(self) -> None:
        self.done.wait()
        if self.failure is not None:
            raise DeviceError(self.failure)


class CopyEngine:
    def __init__(self, name: str, bandwidth: int | None, latency_us: int) -> None:
        """bandwidth: bytes per second, None = what the memory gives."""
        if (bandwidth is not None and bandwidth <= 0) or latency_us < 0:
            raise ValueError(
                f"bandwidth above 0 and latency not below 0, not {bandwidth} and {latency_us}"
            )
        self._name = name
        self._bandwidth = bandwidth
        self._latency_ns = latency_us * 1000
        self._free_at_ns = 0  # when the last byte of the copies so far is due
        self._queue: deque[EngineCopy] = deque()
        self._queued = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, target: int, source: memoryview) -> EngineCopy:
        """Copy `source` to the address `target`; both must stay until `wait` returned."""
        copy = EngineCopy(target, source)
        with self._queued:
            if self._closing:
                raise DeviceError(f"{self._name} is closed: {copy.nbytes} bytes are not copied")
            self._queue.append(copy)
            self._queued.notify()
        return copy

    def close(self) -> None:
        """Finish what was started, and end the thread."""
        with self._queued:
            self._closing = True
            self._queued.notify()
        self._thread.join()

    def _run(self) -> None:
        while (copy := self._next()) is not None:
            try:
                self._move(copy)
            except Exception as failure:  # a thread's boundary: whoever waits hears of it
                copy.failure = f"{self._name}: {copy.nbytes} bytes were not copied: {failure!r}"
            copy.source = None
            copy.done.set()

    def _next(self) -> EngineCopy | None:
        with self._queued:
            self._queued.wait_for(lambda: self._queue or self._closing)
            return self._queue.popleft() if self._queue else None

    def _move(self, copy: EngineCopy) -> None:
        start_ns = max(copy.submitted_ns + self._latency_ns, self._free_at_ns)
        step = copy.nbytes if self._bandwidth is None else STEP_BYTES
        _sleep_until(start_ns)
        self._free_at_ns = start_ns
        for offset in range(0, copy.nbytes, step):
            nbytes = min(step, copy.nbytes - offset)
            ctypes.memmove(copy.target + offset, copy.address + offset, nbytes)  # without the GIL
            if self._bandwidth is not None:
                self._free_at_ns = start_ns + (offset + nbytes) * _SECOND_NS // self._bandwidth
                _sleep_until(self._free_at_ns)


def address_of(view: memoryview) -> int:
    """Where a view in one piece lies, a read-only one too. It must live as long as the address is
    used; this takes no hold of it."""
    if not view.c_contiguous:
        raise ValueError("a copy's source lies in one piece")
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def _sleep_until(at_ns: int) -> None:
    left_ns = at_ns - time.monotonic_ns()
    if left_ns > 0:
        time.sleep(left_ns / 1e9)
