"""A GPU's arena by a CUDA IPC handle: opened once, whole, and only by contract not written to."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from tierd_client import fork
from tierd_client.errors import DeviceFailed, ProtocolBroken
from tierd_client.gpu.cuda_memory import CudaMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

HANDLE_BYTES = 64


class IpcRuntime(Protocol):
    """The calls of cupy.cuda.runtime that it takes; tests put a fake in their place."""

    def setDevice(self, device: int) -> None: ...
    def ipcOpenMemHandle(self, handle: bytes, flags: int = ...) -> int: ...
    def ipcCloseMemHandle(self, address: int) -> None: ...
    def deviceSynchronize(self) -> None: ...


def load_runtime() -> Any:
    """cupy.cuda.runtime, which works in the primary context, as torch does. Raises DeviceFailed."""
    try:
        return import_module("cupy").cuda.runtime
    except ImportError as error:
        raise DeviceFailed(f"a tier of device cuda_ipc needs the package cupy: {error}") from error


class IpcMemory(CudaMemory):
    """The arena, at an address that is known once its handle was opened.

    The handle of one allocation opens to one address in a process however often; it must be closed
    as often.
    """

    def __init__(self, nbytes: int, device: torch.device, runtime: IpcRuntime, what: str) -> None:
        super().__init__(0, nbytes, device, what)
        self._runtime = runtime
        self._lock = threading.Lock()
        self._close: Callable[[], None] | None = None

    def map(self, chunk: int, fd: int) -> None:
        """Refuse: the arena has one handle, no descriptors."""
        raise ProtocolBroken(f"{self.what} is a cuda_ipc device's, and came as descriptors")

    def map_all(self, handle: bytes, nbytes: int) -> None:
        """Open the arena; again does nothing. Raises ProtocolBroken, DeviceFailed."""
        if len(handle) != HANDLE_BYTES or nbytes < self.nbytes:
            raise ProtocolBroken(
                f"{self.what} came as a handle of {len(handle)} bytes for {nbytes}; a handle has "
                f"{HANDLE_BYTES}, the arena {self.nbytes}"
            )
        with self._lock:
            if self._address:
                return
            ordinal = self._device.index
            try:
                self._runtime.setDevice(ordinal)
                self._address = self._runtime.ipcOpenMemHandle(handle)
            except RuntimeError as error:  # CUDARuntimeError is one
                raise DeviceFailed(
                    f"opening {self.what} on GPU {ordinal} failed: {error}"
                ) from error
            finalizer = weakref.finalize(
                self._owner, _close, self._runtime, ordinal, self._address, fork.current()
            )
            finalizer.atexit = False  # the driver ends the context with the process
            self._close = finalizer

    def unmap(self, chunk: int) -> None:
        """Refuse: such an arena gives nothing back."""
        raise ProtocolBroken(f"chunk {chunk} of {self.what} was asked back from a cuda_ipc device")

    def unmap_all(self) -> None:
        """Close the arena; again does nothing. No tensor over it may be read any more."""
        with self._lock:
            if self._close is not None:
                self._close()
            self._close, self._address = None, 0
            self._tensors.clear()


def _close(runtime: IpcRuntime, ordinal: int, address: int, life: fork.Life) -> None:
    if life is not fork.current():  # a forked child has no CUDA
        return
    # After an error that a context does not survive nothing here works: the end of the process
    # gives the memory back.
    with suppress(RuntimeError):
        runtime.setDevice(ordinal)
        runtime.deviceSynchronize()  # what was dropped without a release may still be read
        runtime.ipcCloseMemHandle(address)
