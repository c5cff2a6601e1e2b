"""A GPU through CUDA IPC: one allocation, whose handle every client opens once.

For where the virtual memory calls do not work. All memory is taken at the first arena and none goes
back: there can be no second one, and the budget cannot be lowered. Every client can write through a
handle: it is read-only by agreement alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tierd.gpu.cuda_device import CudaDevice
from tierd.gpu.cuda_driver import refusal
from tierd.gpu.device import Export
from tierd.gpu.errors import DeviceError, DeviceUnavailable
from tierd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.gpu.cuda_driver import CudaDriver
    from tierd.gpu.device import Kind
    from tierd.gpu.registration import HostMemory

#: Smaller allocations may share a block with others, whose handle would show these too.
ALIGNMENT_BYTES = 2 << 20


def load_cupy() -> Any:
    """The CUDA runtime as CuPy gives it."""
    return importlib.import_module("cupy.cuda.runtime")


class CudaIpcDevice(CudaDevice[None]):
    """A `device.Device`."""

    kind: Kind = "cuda_ipc"
    elastic = False

    def __init__(
        self,
        number: int,
        chunk_bytes: int,
        budget_bytes: int,
        *,
        host: HostMemory | None = None,
        direct: bool = False,
        driver: CudaDriver | None = None,
        load: Callable[[], Any] = load_cupy,
    ) -> None:
        """load: gives CuPy's runtime (tests: a fake)."""
        super().__init__(number, chunk_bytes, budget_bytes, host=host, direct=direct, driver=driver)
        self._load = load
        self._runtime: Any = None
        self._handle = b""
        self._allocation: tuple[int, int] | None = None  # address, size

    @property
    def backed_bytes(self) -> int:
        return 0 if self._allocation is None else self._allocation[1]

    def span_bytes(self, budget_bytes: int) -> int:
        return budget_bytes // self.chunk_bytes * self.chunk_bytes

    @property
    def _advice(self) -> str:
        return "--gpu-device cuda_vmm is the preferred way"

    def _check(self) -> None:
        try:
            self._runtime = self._load()
        except ImportError as error:
            raise DeviceUnavailable(
                f"gpu:{self.number}: cuda_ipc needs CuPy, which cannot be imported ({error})",
                "install it (pip install cupy-cuda13x), or take --gpu-device cuda_vmm",
            ) from error
        if self.chunk_bytes % ALIGNMENT_BYTES:
            raise DeviceUnavailable(
                f"gpu:{self.number}: cuda_ipc needs chunks that are multiples of "
                f"{format_size(ALIGNMENT_BYTES)}, not {format_size(self.chunk_bytes)}",
                "choose another --gpu-chunk",
            )
        self._check_direct("GPU_DIRECT_RDMA_SUPPORTED")
        self._allocate(ALIGNMENT_BYTES)
        self._free()

    def add_arena(self, arena: int, span_bytes: int) -> None:
        self._spans.check_new(arena, span_bytes)
        if len(self._spans):
            raise DeviceUnavailable(
                f"gpu:{self.number}: cuda_ipc has one arena for all of its "
                f"{format_size(self.backed_bytes)}, so models with other readers cannot be on it",
                "take --gpu-device cuda_vmm",
            )
        self._handle = self._allocate(span_bytes)
        assert self._allocation is not None
        self._spans.add(arena, self._allocation[0], span_bytes)

    def back(self, arena: int, first: int, count: int) -> None:
        span = self._spans[arena]
        span.chunks.update(dict.fromkeys(span.missing(first, count)))

    def free(self, arena: int, first: int, count: int) -> None:
        span = self._spans[arena]
        for chunk in span.present(first, count):
            del span.chunks[chunk]

    def parts(self, arena: int, offset: int, nbytes: int) -> list[tuple[int, int]]:
        return [(self._spans[arena].target(offset, nbytes), nbytes)]

    def export(self, arena: int, chunk: int) -> Export:
        self._spans[arena].backing(chunk)
        return Export(self.backed_bytes, handle=self._handle)

    def close(self) -> None:
        self._spans.take_all()
        if self._allocation is not None:
            self._give_back(self._free)
            self._allocation = None
        self._close_driver()

    def _allocate(self, nbytes: int) -> bytes:
        """The handle of `_allocation`, which nothing else shares. Raises DeviceError."""
        if self._allocation is not None:  # of an attempt that could not be undone
            self._free()
        self._call("setDevice", f"{self.number}", self.number)
        address = int(self._call("malloc", f"{nbytes} bytes", nbytes))
        self._allocation = (address, nbytes)
        try:
            start, size = self._driver.address_range(address)
            if start != address:
                raise DeviceError(
                    f"gpu:{self.number}: cudaMalloc ({nbytes} bytes) gave a part of a block of "
                    f"{size} bytes at {start:#x}, whose handle would show all of it"
                )
            return bytes(self._call("ipcGetMemHandle", hex(address), address))
        except DeviceError:
            self._give_back(self._free)
            raise

    def _free(self) -> None:
        """Raises DeviceError; then `close` tries again."""
        assert self._allocation is not None
        address, _ = self._allocation
        self._call("setDevice", f"{self.number}", self.number)
        self._call("free", hex(address), address)
        self._allocation = None

    def _call(self, name: str, what: str, *arguments: Any) -> Any:
        """As CuPy's runtime, with its errors as ours: CUDARuntimeError is a RuntimeError with a
        `status`."""
        try:
            return getattr(self._runtime, name)(*arguments)
        except RuntimeError as error:
            status = getattr(error, "status", "no code")
            text = (
                f"gpu:{self.number}: cuda{name[0].upper()}{name[1:]} ({what}): {error} ({status})"
            )
            raise refusal(text, status if isinstance(status, int) else -1) from error
