"""A GPU's worker under the test's hand: copies that end when it says so, or fail now and then."""

from __future__ import annotations

import queue
import random
import threading
from typing import TYPE_CHECKING, Any

from tierd.gpu.errors import DeviceError, OutOfDeviceMemory
from tierd.gpu.memfd_device import MemfdDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.gpu.device import Device, Pending
    from tierd.gpu.worker import GpuWorker

SMALL = 64 << 10  #: a chunk
PATIENCE_S = 20.0


class Loop:
    """Stands for the event loop: what threads hand over is called where `run_one` is."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[Callable[..., object], tuple[object, ...]]] = queue.Queue()

    def call_soon_threadsafe(self, call: Callable[..., object], *values: object) -> None:
        self.calls.put((call, values))

    def run_one(self) -> None:
        call, values = self.calls.get(timeout=PATIENCE_S)
        call(*values)


class Gate:
    """A `Pending` that ends when it is told to."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.failure: Exception | None = None

    def wait(self) -> None:
        assert self.opened.wait(PATIENCE_S)
        if self.failure:
            raise self.failure


class Gated(MemfdDevice):
    """Copies end when the test says so."""

    def __init__(self) -> None:
        super().__init__(0, SMALL, SMALL)
        self.gates: list[Gate] = []
        self.threads: set[str] = set()
        self.started = threading.Semaphore(0)
        self.refuses: Exception | None = None
        self.closed = False

    def copy(self, arena: int, offset: int, source: memoryview) -> Gate:
        self.threads.add(threading.current_thread().name)
        if self.refuses:
            raise self.refuses
        self.gates.append(Gate())
        self.started.release()
        return self.gates[-1]

    def close(self) -> None:
        self.closed = True
        super().close()

    def wait_started(self) -> None:
        assert self.started.acquire(timeout=PATIENCE_S)


class Flaky(MemfdDevice):
    """Refuses now and then, when a copy is started and when it is waited for."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(0, SMALL, SMALL)
        self.rng = random.Random(rng.random())

    def back(self, arena: int, first: int, count: int) -> None:
        if self.rng.random() < 0.1:
            raise OutOfDeviceMemory("gpu:0: no memory")
        super().back(arena, first, count)

    def copy(self, arena: int, offset: int, source: memoryview) -> Pending:
        if self.rng.random() < 0.1:
            raise DeviceError("gpu:0: no copy")
        pending = super().copy(arena, offset, source)
        return FailsAfter(pending) if self.rng.random() < 0.1 else pending


class FailsAfter:
    """A `Pending` that fails when its bytes were read."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending

    def wait(self) -> None:
        self.pending.wait()
        raise DeviceError("gpu:0: the copy failed")


def ask(worker: GpuWorker, loop: Loop, work: Callable[[Device], Any]) -> Any:
    answers: list[Any] = []
    worker.submit(work, answers.append)
    loop.run_one()
    return answers[0]
