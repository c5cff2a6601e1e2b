"""Devices of every kind, the CUDA ones over a fake driver, and what clients see of their memory."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.worker_by_hand import SMALL, Gated, Loop, ask
from tests.fake_cuda.driver import MEMFD_NAME, FakeDriver
from tests.fake_cuda.runtime import FakeRuntime
from tierd.gpu.cuda_driver import CudaDriver
from tierd.gpu.cuda_ipc import CudaIpcDevice
from tierd.gpu.cuda_vmm import CudaVmmDevice
from tierd.gpu.kinds import KINDS
from tierd.gpu.memfd_device import MemfdDevice
from tierd.gpu.worker import GpuWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd.gpu.device import Device, Kind
    from tierd.gpu.registration import HostMemory

MIB = 1 << 20
CHUNK = 2 * MIB
MEMORY = 24 * MIB
BUDGET = 16 * MIB


@dataclass
class Rig:
    """A device, and what stands behind it."""

    device: Device
    driver: FakeDriver
    runtime: FakeRuntime

    def content(self, arena: int, chunk: int) -> bytes:
        """What a client finds in a chunk."""
        export = self.device.export(arena, chunk)
        if export.fd is not None:
            try:
                return os.pread(export.fd, CHUNK, 0)
            finally:
                os.close(export.fd)
        assert export.handle is not None
        _, _, fd, _ = struct.unpack("<4sIIQ44x", export.handle)
        return os.pread(fd, CHUNK, chunk * CHUNK)


def make_rig(
    kind: Kind, *, budget: int = BUDGET, host: HostMemory | None = None, direct: bool = False
) -> Rig:
    """A device that is not open, of a GPU with MEMORY."""
    driver = FakeDriver(memory_bytes=MEMORY)
    runtime = FakeRuntime(driver)
    if kind == "memfd":
        device: Device = MemfdDevice(0, CHUNK, budget, memory_bytes=MEMORY, host=host)
    elif kind == "cuda_vmm":
        device = CudaVmmDevice(
            0, CHUNK, budget, host=host, direct=direct, driver=CudaDriver(0, lambda: driver)
        )
    else:
        device = CudaIpcDevice(
            0, CHUNK, budget,
            host=host, direct=direct, driver=CudaDriver(0, lambda: driver), load=lambda: runtime,
        )  # fmt: skip
    return Rig(device, driver, runtime)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def rig(kind: Kind) -> Iterator[Rig]:
    """A device of each kind in turn, open, with arena 0 over its budget. Nothing of it is left
    when it was closed."""
    before = descriptors()
    rig = make_rig(kind)
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    yield rig
    rig.device.close()
    assert rig.driver.live() == {}
    assert descriptors() == before


def descriptors() -> int:
    """Of memory of a device: how many this process has open. Others may come and go meanwhile."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            name = os.readlink(f"/proc/self/fd/{fd}")
            count += name.startswith(("/memfd:tierd-gpu", f"/memfd:{MEMFD_NAME}"))
    return count


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def device() -> Gated:
    return Gated()


@pytest.fixture
def worker(device: Gated, loop: Loop) -> Iterator[GpuWorker]:
    """Of `device`, open, with arena 0 of sixteen small chunks and two copies at a time."""
    made = GpuWorker(device, 2, loop.call_soon_threadsafe)
    ask(made, loop, lambda opened: opened.open())
    ask(made, loop, lambda opened: opened.add_arena(0, 16 * SMALL))
    yield made
    for gate in device.gates:
        gate.opened.set()
    made.close()
