"""The calls of the CUDA driver that tierd needs, with its codes as exceptions.

Nothing of CUDA is loaded before `open`. Addresses are ints, every handle is what the driver gave.
All methods but `open` and `close` are thread-safe: each makes the GPU's primary context the
thread's own, which is what the driver's calls refer to. They release the GIL (cuda-bindings since
12.9.1).
Source: the CUDA driver API reference on primary contexts, memory, virtual memory, streams, events.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tierd.gpu.device import DeviceInfo, DeviceMemory
from tierd.gpu.errors import DeviceError, DeviceLost, DeviceUnavailable, OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Callable

_OUT_OF_MEMORY = 2
#: After these codes every call in the context fails: the driver's page on CUresult says for each
#: "the process must be terminated and relaunched", or that the context is gone.
_LOST = frozenset({
    4,  # DEINITIALIZED
    46,  # DEVICE_UNAVAILABLE
    214, 220, 226,  # ECC_UNCORRECTABLE, NVLINK_UNCORRECTABLE, CONTAINED
    700, 702,  # ILLEGAL_ADDRESS, LAUNCH_TIMEOUT
    709, 710,  # CONTEXT_IS_DESTROYED, ASSERT
    714, 715, 716, 717, 718, 719,  # HARDWARE_STACK_ERROR to LAUNCH_FAILED
    721,  # TENSOR_MEMORY_LEAK
    810,  # MPS_CLIENT_TERMINATED
})  # fmt: skip

_NAME_BYTES = 256
INSTALL = "install cuda-bindings (pip install cuda-bindings) beside tierd"
NO_DRIVER = "install the NVIDIA driver, or give the container its GPUs; nvidia-smi says what works"


def load_bindings() -> Any:
    """The module of cuda-bindings."""
    return importlib.import_module("cuda.bindings.driver")


class CudaDriver:
    """The driver, for one GPU."""

    def __init__(self, number: int, load: Callable[[], Any] = load_bindings) -> None:
        """number: N of `gpu:N`, as nvidia-smi counts. load: gives the module (tests: a fake)."""
        self.number = number
        self.direct = False  #: memory that is created is for other devices to write into
        self._load = load
        self._api: Any = None
        self._device: Any = None
        self._context: Any = None

    def open(self) -> DeviceInfo:
        """Load the driver and take the GPU's primary context. Raises DeviceUnavailable."""
        # As nvidia-smi, not the fastest first: an operator's numbers are those.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        try:
            self._api = self._load()
        except ImportError as error:
            raise DeviceUnavailable(
                f"gpu:{self.number}: cuda-bindings cannot be imported ({error})", INSTALL
            ) from error
        try:
            self._call("cuInit", "", 0)
            count = self._call("cuDeviceGetCount", "")
        except DeviceError as error:
            raise DeviceUnavailable(str(error), NO_DRIVER) from error
        if self.number >= count:
            raise DeviceUnavailable(
                f"gpu:{self.number} does not exist: the driver shows {count} GPUs",
                "see nvidia-smi and CUDA_VISIBLE_DEVICES",
            )
        try:
            return self._take()
        except DeviceError as error:
            self.close()
            raise DeviceUnavailable(str(error), "see nvidia-smi") from error

    def _take(self) -> DeviceInfo:
        self._device = self._call("cuDeviceGet", f"{self.number}", self.number)
        name = self._call("cuDeviceGetName", "", _NAME_BYTES, self._device)
        uuid = self._call("cuDeviceGetUuid", "", self._device)
        version = self._call("cuDriverGetVersion", "")
        self._context = self._call("cuDevicePrimaryCtxRetain", "", self._device)
        memory = self.memory()
        return DeviceInfo(
            name=bytes(name).split(b"\0")[0].decode(errors="replace"),
            uuid=f"GPU-{UUID(bytes=bytes(uuid.bytes))}",
            driver=f"CUDA {version // 1000}.{version % 1000 // 10}",
            total_bytes=memory.total_bytes,
            free_bytes=memory.free_bytes,
        )

    def enter(self) -> None:
        """Make the GPU's context that of the calling thread, for libraries beside the driver."""
        if self._context is None:
            raise DeviceError(f"gpu:{self.number} is not open")
        self._call("cuCtxSetCurrent", "", self._context)

    def has(self, attribute: str) -> bool:
        """attribute: the end of a CU_DEVICE_ATTRIBUTE_ name that is 0 or 1."""
        which = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
        return bool(self._call("cuDeviceGetAttribute", attribute, which, self._device))

    def memory(self) -> DeviceMemory:
        free_bytes, total_bytes = self._in_context("cuMemGetInfo", "")
        return DeviceMemory(total_bytes=int(total_bytes), free_bytes=int(free_bytes))

    def close(self) -> None:
        """Give the context back. Raises DeviceError; it counts as given back then too."""
        if self._context is not None:
            self._context = None
            self._call("cuDevicePrimaryCtxRelease", "", self._device)

    # ------------------------------------------------------------------------------ virtual memory

    def granularity_bytes(self) -> int:
        which = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        name = "cuMemGetAllocationGranularity"
        return int(self._in_context(name, "", self._properties(), which))

    def reserve(self, nbytes: int) -> int:
        """The address of a range without memory. Undone by `unreserve`."""
        return int(self._in_context("cuMemAddressReserve", _size(nbytes), nbytes, 0, 0, 0))

    def unreserve(self, address: int, nbytes: int) -> None:
        """Nothing may be mapped there."""
        self._in_context("cuMemAddressFree", _at(address, nbytes), address, nbytes)

    def create(self, nbytes: int) -> Any:
        """A handle of memory on this GPU that can be exported. Undone by `release`."""
        return self._in_context("cuMemCreate", _size(nbytes), nbytes, self._properties(), 0)

    def release(self, handle: Any) -> None:
        """The memory goes back when nobody maps it, nor has it by a descriptor."""
        self._in_context("cuMemRelease", "", handle)

    def map(self, address: int, nbytes: int, handle: Any) -> None:
        """All of `handle`, in reserved addresses; readable for nobody before `allow`."""
        self._in_context("cuMemMap", _at(address, nbytes), address, nbytes, 0, handle, 0)

    def unmap(self, address: int, nbytes: int) -> None:
        """Exactly what was mapped."""
        self._in_context("cuMemUnmap", _at(address, nbytes), address, nbytes)

    def allow(self, address: int, nbytes: int) -> None:
        """This GPU may read and write what is mapped there."""
        access = self._api.CUmemAccessDesc()
        access.location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.number
        access.flags = self._api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._in_context("cuMemSetAccess", _at(address, nbytes), address, nbytes, [access], 1)

    def export(self, handle: Any) -> int:
        """A new descriptor of the memory, closed on exec."""
        kind = self._descriptor_kind()
        fd = int(self._in_context("cuMemExportToShareableHandle", "", handle, kind, 0))
        os.set_inheritable(fd, False)
        return fd

    def address_range(self, address: int) -> tuple[int, int]:
        """The start and size of the allocation that `address` lies in."""
        start, nbytes = self._in_context("cuMemGetAddressRange", hex(address), address)
        return int(start), int(nbytes)

    # -------------------------------------------------------------------------------------- copies

    def new_stream(self) -> Any:
        flags = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._in_context("cuStreamCreate", "", int(flags))

    def drop_stream(self, stream: Any) -> None:
        self._in_context("cuStreamDestroy", "", stream)

    def wait_stream(self, stream: Any) -> None:
        self._in_context("cuStreamSynchronize", "", stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Start to copy host memory, all of it in one registration or all of it in none."""
        what = f"{_size(nbytes)} from {source:#x} to {target:#x}"
        self._in_context("cuMemcpyHtoDAsync", what, target, source, nbytes, stream)

    def fetch(self, address: int, nbytes: int) -> bytearray:
        """Memory of one allocation of this GPU, copied to the host."""
        found = bytearray(nbytes)
        target = (ctypes.c_char * nbytes).from_buffer(found)
        what = f"{_size(nbytes)} from {address:#x}"
        self._in_context("cuMemcpyDtoH", what, ctypes.addressof(target), address, nbytes)
        return found

    def mark(self, stream: Any) -> Any:
        """An event that passes when everything on the stream so far has. Undone by `drop_event`."""
        flags = self._api.CUevent_flags
        event = self._in_context(
            "cuEventCreate", "",
            int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING),
        )  # fmt: skip
        try:
            self._in_context("cuEventRecord", "", event, stream)
        except DeviceError:
            with contextlib.suppress(DeviceError):  # the first refusal is the one to hear of
                self.drop_event(event)
            raise
        return event

    def wait_event(self, event: Any) -> None:
        self._in_context("cuEventSynchronize", "", event)

    def drop_event(self, event: Any) -> None:
        self._in_context("cuEventDestroy", "", event)

    def register(self, address: int, nbytes: int) -> None:
        """Lock host memory for direct copies by every context of this process."""
        flags = int(self._api.CU_MEMHOSTREGISTER_PORTABLE)
        self._in_context("cuMemHostRegister", _at(address, nbytes), address, nbytes, flags)

    def unregister(self, address: int) -> None:
        self._in_context("cuMemHostUnregister", hex(address), address)

    # --------------------------------------------------------------------------------------- calls

    def _properties(self) -> Any:
        api = self._api
        found = api.CUmemAllocationProp()
        found.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        found.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        found.location.id = self.number
        found.requestedHandleTypes = self._descriptor_kind()
        found.allocFlags.gpuDirectRDMACapable = int(self.direct)
        return found

    def _descriptor_kind(self) -> Any:
        return self._api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _in_context(self, name: str, what: str, *arguments: Any) -> Any:
        if self._context is None:
            raise DeviceError(f"gpu:{self.number}: {name} on a GPU that is not open")
        self._call("cuCtxSetCurrent", f"for {name}", self._context)
        return self._call(name, what, *arguments)

    def _call(self, name: str, what: str, *arguments: Any) -> Any:
        """What the call gives, without the code: nothing, one value, or a tuple. Raises."""
        try:
            code, *values = getattr(self._api, name)(*arguments)
        except (ValueError, KeyError) as error:  # newer and older bindings, of a code unheard of
            raise DeviceError(
                f"gpu:{self.number}: {_call_text(name, what)}: unknown code ({error})"
            ) from error
        except RuntimeError as error:  # no libcuda, or one that is too old for the call
            raise DeviceError(f"gpu:{self.number}: {_call_text(name, what)}: {error}") from error
        if int(code):
            label = f"{getattr(code, 'name', 'unknown code')} ({int(code)})"
            raise refusal(f"gpu:{self.number}: {_call_text(name, what)}: {label}", int(code))
        return values[0] if len(values) == 1 else tuple(values)


def refusal(text: str, code: int) -> DeviceError:
    """The error that a code of the driver or the runtime stands for (these are the same)."""
    if code == _OUT_OF_MEMORY:
        return OutOfDeviceMemory(text)
    return DeviceLost(text) if code in _LOST else DeviceError(text)


def _call_text(name: str, what: str) -> str:
    return f"{name} ({what})" if what else name


def _size(nbytes: int) -> str:
    return f"{nbytes} bytes"


def _at(address: int, nbytes: int) -> str:
    return f"{nbytes} bytes at {address:#x}"
