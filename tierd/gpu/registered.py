"""What a driver knows of registered host memory, for devices that have no driver.

It refuses what CUDA refuses, so that tests without a GPU find what would go wrong with one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from tierd.gpu.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.gpu.registration import Span


class Registered:
    """Thread-safe."""

    def __init__(self, name: str) -> None:
        """name: of who asks, for texts."""
        self._name = name
        self._sizes: dict[int, int] = {}  # by address
        self._lock = threading.Lock()

    def add(self, address: int, nbytes: int) -> None:
        with self._lock:
            if nbytes <= 0 or self._touched(address, nbytes):
                raise DeviceError(
                    f"{self._name}: {nbytes} bytes at {address:#x} cannot be registered: "
                    f"{'a part is registered already' if nbytes > 0 else 'nothing to register'}"
                )
            self._sizes[address] = nbytes

    def remove(self, address: int) -> None:
        with self._lock:
            if self._sizes.pop(address, None) is None:
                raise DeviceError(f"{self._name}: no registration begins at {address:#x}")

    def check(self, spans: Iterable[Span]) -> None:
        """Raises DeviceError unless each span lies in one registration, or meets none."""
        with self._lock:
            for span in spans:
                touched = self._touched(span.address, span.nbytes)
                inside = any(
                    address <= span.address
                    and span.address + span.nbytes <= address + self._sizes[address]
                    for address in touched
                )
                if bool(touched) != span.pinned or span.pinned != inside:
                    raise DeviceError(
                        f"{self._name}: {span.nbytes} bytes at {span.address:#x} are not in one "
                        "registration"
                    )

    def _touched(self, address: int, nbytes: int) -> list[int]:
        return [
            start
            for start, size in self._sizes.items()
            if start < address + nbytes and address < start + size
        ]
