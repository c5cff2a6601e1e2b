"""The few calls of the CUDA driver that mapping another process's memory takes.

Behind this class because no test has a GPU: they put a fake in its place. Nothing of CUDA is
imported before `load`. Source: CUDA driver API, sections "Virtual Memory Management" and "Primary
Context Management"; cuda.bindings.driver returns a tuple that begins with a CUresult.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tierd_client.errors import DeviceFailed

if TYPE_CHECKING:
    from collections.abc import Iterator


class CudaDriver:
    """The driver, for one GPU by its number in this process. Thread-safe. Every method but the
    constructor runs in the primary context of the GPU, the one that torch uses."""

    def __init__(self, ordinal: int, driver: Any) -> None:
        self._driver = driver
        self._ordinal = ordinal
        self._call("cuInit", 0)
        self._device = self._call("cuDeviceGet", ordinal)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)

    @classmethod
    def load(cls, ordinal: int) -> CudaDriver:
        """The real one. Raises DeviceFailed when cuda-bindings or libcuda.so.1 is missing."""
        try:
            return cls(ordinal, import_module("cuda.bindings.driver"))
        except ImportError as error:
            raise DeviceFailed(
                f"a tier of device cuda_vmm needs the package cuda-bindings: {error}"
            ) from error
        except RuntimeError as error:  # cuda.bindings: "Failed to dlopen libcuda.so.1"
            if isinstance(error, DeviceFailed):
                raise
            raise DeviceFailed(f"the CUDA driver does not load: {error}") from error

    def reserve(self, nbytes: int, alignment: int) -> int:
        """Addresses with nothing behind them."""
        with self._current():
            return int(self._call("cuMemAddressReserve", nbytes, alignment, 0, 0))

    def free_addresses(self, address: int, nbytes: int) -> None:
        """Give addresses back, with nothing mapped in them."""
        with self._current():
            self._call("cuMemAddressFree", address, nbytes)

    def map_for_reading(self, fd: int, address: int, nbytes: int) -> None:
        """Show the memory behind a descriptor at reserved addresses, for reading only. What was
        mapped stays when the descriptor is closed."""
        kind = self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        with self._current():
            handle = self._call("cuMemImportFromShareableHandle", fd, kind)
            mapped = False
            try:
                try:
                    self._call("cuMemMap", address, nbytes, 0, handle, 0)
                    mapped = True
                    self._call("cuMemSetAccess", address, nbytes, [self._reading()], 1)
                finally:
                    self._call("cuMemRelease", handle)  # the mapping holds the memory
            except DeviceFailed:
                if mapped:
                    self._call("cuMemUnmap", address, nbytes)
                raise

    def unmap(self, address: int, nbytes: int) -> None:
        """Undo `map_for_reading`. Nothing on the GPU may still read there."""
        with self._current():
            self._call("cuMemUnmap", address, nbytes)

    def synchronize(self) -> None:
        """Wait until the GPU has done all that this process gave it."""
        with self._current():
            self._call("cuCtxSynchronize")

    def close(self) -> None:
        """Let go of the context. No method may be called afterwards."""
        self._call("cuDevicePrimaryCtxRelease", self._device)

    def _reading(self) -> Any:
        driver = self._driver
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self._ordinal
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        return access

    @contextmanager
    def _current(self) -> Iterator[None]:
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._driver, name)(*arguments)
        if int(error) != 0:
            raise DeviceFailed(f"{name} on GPU {self._ordinal} failed: {error.name}")
        return values[0] if values else None
