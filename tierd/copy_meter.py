"""What copies to one GPU get: told to the core after real ones, as `costs` tells it of disks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tierd.core.copy_rate import CopyRate
from tierd.core.stack_model import GpuMeasured

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.stack_model import StackEvent
    from tierd.gpu.worker import GpuWorker

OBSERVED_BYTES = 16 << 20  # of real copies make one observation


class CopyMeter:
    """Of one GPU, number `index` of the core. Belongs to the loop's thread."""

    def __init__(self, index: int, worker: GpuWorker, submit: Callable[[StackEvent], None]) -> None:
        self._index = index
        self._worker = worker
        self._submit = submit
        self._rate = CopyRate()
        self._copied_bytes = self._busy_ns = 0  # of the worker, when it was last looked at

    def copied(self) -> None:
        """A layer was copied. Cheap, and once in a while a word to the core."""
        worker = self._worker.statistics()
        nbytes, busy_ns = worker.copied_bytes - self._copied_bytes, worker.busy_ns - self._busy_ns
        if nbytes < OBSERVED_BYTES or busy_ns <= 0:
            return
        self._copied_bytes, self._busy_ns = worker.copied_bytes, worker.busy_ns
        rate = self._rate.observe(nbytes, busy_ns)
        self._submit(GpuMeasured(time.monotonic_ns(), self._index, rate))
