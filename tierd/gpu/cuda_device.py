"""What both CUDA devices do alike: open the GPU, copy to it, register DRAM for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Generic

from tierd.gpu.cuda_driver import CudaDriver
from tierd.gpu.cuda_stream import CudaStream
from tierd.gpu.errors import DeviceError, DeviceFull, DeviceUnavailable, OutOfDeviceMemory
from tierd.gpu.registration import HostMemory
from tierd.gpu.span import Backing, Spans
from tierd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.gpu.device import DeviceInfo, DeviceMemory, Pending

log = logging.getLogger(__name__)


class CudaDevice(Generic[Backing]):
    """The common part of a `device.Device`."""

    def __init__(
        self,
        number: int,
        chunk_bytes: int,
        budget_bytes: int,
        *,
        host: HostMemory | None = None,
        direct: bool = False,
        driver: CudaDriver | None = None,
    ) -> None:
        """host: what of the host's memory is registered. direct: SSDs write into this GPU's memory.
        driver: tests give one with a fake."""
        self.number = number
        self.chunk_bytes = chunk_bytes
        self._budget_bytes = budget_bytes
        self._host = host or HostMemory()
        self._driver = driver or CudaDriver(number)
        self._direct = self._driver.direct = direct
        self._stream: CudaStream | None = None
        self._spans: Spans[Backing] = Spans(chunk_bytes)
        self._name = ""

    @property
    def unpinned_bytes(self) -> int:
        return 0 if self._stream is None else self._stream.unpinned_bytes

    def open(self) -> DeviceInfo:
        info = self._driver.open()
        self._name = info.name
        try:
            if info.free_bytes < self._budget_bytes:
                raise DeviceFull(
                    f"gpu:{self.number} ({info.name}) was given {format_size(self._budget_bytes)}, "
                    f"but {format_size(info.free_bytes)} of {format_size(info.total_bytes)} are "
                    "free",
                    self._less,
                )
            self._check()
            self._stream = CudaStream(self._driver, self._host)
        except DeviceUnavailable:
            self.close()
            raise
        except DeviceError as error:
            self.close()
            if isinstance(error, OutOfDeviceMemory):
                raise DeviceFull(str(error), self._less) from error
            raise DeviceUnavailable(str(error), self._advice) from error
        return info

    @property
    def _less(self) -> str:
        return f"lower --gpu {self.number}=SIZE, or end what uses it (nvidia-smi)"

    @property
    def _advice(self) -> str:
        """What to do when this device does not work here."""
        raise NotImplementedError

    def _check_direct(self, attribute: str) -> None:
        """Raise DeviceUnavailable where SSDs are to write, and the driver says no to that."""
        if self._direct and not self._driver.has(attribute):
            raise DeviceUnavailable(
                f"gpu:{self.number} ({self._name}): gpu_direct, and the driver says 0 to "
                f"{attribute}",
                "leave gpu_direct off",
            )

    def _check(self) -> None:
        """Raise DeviceUnavailable or DeviceError unless this device works here: by doing it."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def memory(self) -> DeviceMemory:
        return self._driver.memory()

    def copy(self, arena: int, offset: int, source: memoryview) -> Pending:
        target = self._spans[arena].target(offset, source.nbytes)
        assert self._stream is not None, "copy before open"
        return self._stream.copy(target, source)

    def parts(self, arena: int, offset: int, nbytes: int) -> list[tuple[int, int]]:
        return self._spans[arena].parts(offset, nbytes)

    def enter(self) -> None:
        self._driver.enter()

    def fetch(self, address: int, nbytes: int) -> bytearray:
        return self._driver.fetch(address, nbytes)

    def register(self, address: int, nbytes: int) -> None:
        self._driver.register(address, nbytes)

    def unregister(self, address: int, nbytes: int) -> None:
        self._driver.unregister(address)

    def _close_driver(self) -> None:
        if self._stream is not None:
            self._give_back(self._stream.close)
            self._stream = None
        self._give_back(self._driver.close)

    def _give_back(self, call: Callable[[], None]) -> None:
        """At the end: what the driver does not take is left to the end of the process."""
        try:
            call()
        except DeviceError as error:
            log.warning("left to the end of the process: %s", error)
