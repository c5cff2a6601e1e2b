"""A GPU's arena by CUDA's virtual memory management: chunks by descriptor, mapped for reading."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from tierd_client import fork
from tierd_client.errors import DeviceFailed, ProtocolBroken
from tierd_client.gpu.cuda_memory import CudaMemory

if TYPE_CHECKING:
    import torch

    from tierd_client.gpu.cuda_driver import CudaDriver


class VmmMemory(CudaMemory):
    """Addresses for the whole arena; a kernel that writes there fails. Raises DeviceFailed.

    driver: of this memory alone, which closes it.
    """

    def __init__(
        self, nbytes: int, chunk_bytes: int, device: torch.device, driver: CudaDriver, what: str
    ) -> None:
        super().__init__(driver.reserve(nbytes, chunk_bytes), nbytes, device, what)
        self._driver = driver
        self._chunk_bytes = chunk_bytes
        self._mapped: set[int] = set()
        finalizer = weakref.finalize(
            self._owner,
            _let_go,
            driver,
            self._address,
            nbytes,
            chunk_bytes,
            self._mapped,
            fork.current(),
        )
        finalizer.atexit = False  # the driver ends the context with the process

    def map(self, chunk: int, fd: int) -> None:
        """Show a chunk. Raises DeviceFailed."""
        address = self._address + chunk * self._chunk_bytes
        self._driver.map_for_reading(fd, address, self._chunk_bytes)
        self._mapped.add(chunk)

    def map_all(self, handle: bytes, nbytes: int) -> None:
        """Refuse: these chunks have descriptors."""
        raise ProtocolBroken(f"{self.what} is a cuda_vmm device's, and came as a handle")

    def unmap(self, chunk: int) -> None:
        """Let go of a chunk, in which every lease went back behind its fences.
        Raises DeviceFailed."""
        self._driver.unmap(self._address + chunk * self._chunk_bytes, self._chunk_bytes)
        self._mapped.remove(chunk)

    def unmap_all(self) -> None:
        """Nothing was mapped whole."""


def _let_go(
    driver: CudaDriver,
    address: int,
    nbytes: int,
    chunk_bytes: int,
    mapped: set[int],
    life: fork.Life,
) -> None:
    if life is not fork.current():  # a forked child has no CUDA
        return
    # After an error that a context does not survive nothing here works: the end of the process
    # gives the memory back.
    with suppress(DeviceFailed):
        driver.synchronize()  # what was dropped without a release may still be read
        while mapped:
            driver.unmap(address + mapped.pop() * chunk_bytes, chunk_bytes)
        driver.free_addresses(address, nbytes)
        driver.close()
