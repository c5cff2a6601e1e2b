from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.fake_cuda.driver import FakeDriver

if TYPE_CHECKING:
    from collections.abc import Iterator

GPUS = 2


@pytest.fixture
def fake() -> Iterator[FakeDriver]:
    """A driver with two GPUs, whose addresses are addresses of this process. Nothing may be left
    with it at the end."""
    driver = FakeDriver(gpus=GPUS)
    yield driver
    assert driver.live() == {}


class Exporter:
    """Another process's memory: a descriptor for each chunk, closed at the end."""

    def __init__(self) -> None:
        self._driver: Any = FakeDriver()
        self._fds: list[int] = []
        self._call("cuInit", 0)
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", 0))

    def chunk(self, content: bytes, nbytes: int) -> int:
        """A new chunk that begins with `content`."""
        driver = self._driver
        properties = driver.CUmemAllocationProp()
        properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = 0
        kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        handle = self._call("cuMemCreate", nbytes, properties, 0)
        fd: int = self._call("cuMemExportToShareableHandle", handle, kind, 0)
        os.pwrite(fd, content, 0)
        self._fds.append(fd)
        return fd

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        assert int(error) == 0, (name, error)
        return values[0] if values else None


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter()
    yield exporter
    exporter.close()
