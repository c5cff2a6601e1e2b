"""Copies to one GPU: one stream, an event for each copy, cut where registrations of DRAM end."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from tierd.gpu.copy_engine import address_of
from tierd.gpu.errors import DeviceError

if TYPE_CHECKING:
    from tierd.gpu.cuda_driver import CudaDriver
    from tierd.gpu.registration import HostMemory, Use

log = logging.getLogger(__name__)


class CudaCopy:
    """A `device.Pending`."""

    def __init__(self, stream: CudaStream, event: Any, use: Use, source: memoryview) -> None:
        self._stream = stream
        self._event = event
        self._use = use
        self._source: memoryview | None = source  # the bytes stay until they were read

    def wait(self) -> None:
        try:
            self._stream.wait(self._event)
        finally:
            self._source = None
            self._use.end()


class CudaStream:
    """`copy` on the device's thread; a copy may be waited for on another."""

    def __init__(self, driver: CudaDriver, host: HostMemory) -> None:
        self._driver = driver
        self._host = host
        self._stream = driver.new_stream()
        self._left: list[Any] = []  # events that the driver did not take back
        self.unpinned_bytes = 0  #: copied from memory that is not registered

    def copy(self, target: int, source: memoryview) -> CudaCopy:
        address = address_of(source)
        use = self._host.use(address, source.nbytes)
        try:
            for span in use.spans:
                to = target + span.address - address
                self._driver.copy(to, span.address, span.nbytes, self._stream)
            event = self._driver.mark(self._stream)
        except DeviceError:
            self._drain()
            use.end()
            raise
        self.unpinned_bytes += use.unpinned_bytes
        return CudaCopy(self, event, use, source)

    def wait(self, event: Any) -> None:
        """Until the copy is over, one way or the other."""
        try:
            self._driver.wait_event(event)
        except DeviceError:
            self._drain()
            raise
        finally:
            try:
                self._driver.drop_event(event)
            except DeviceError as error:
                log.warning("an event is left for later: %s", error)
                self._left.append(event)

    def close(self) -> None:
        """Raises DeviceError."""
        try:
            self._driver.wait_stream(self._stream)
            for event in self._left:
                self._driver.drop_event(event)
        finally:
            self._driver.drop_stream(self._stream)

    def _drain(self) -> None:
        """Wait for what was started before a failure. If that fails too, the context is broken,
        and nothing is read any more."""
        with contextlib.suppress(DeviceError):
            self._driver.wait_stream(self._stream)
