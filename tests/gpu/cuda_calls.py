"""The CUDA driver for probes: plain calls that raise, and nothing else."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

cuda: Any = None  # cuda.bindings.driver, from `start` on


def start() -> int:
    """Load the driver and take GPU 0's primary context, torch's too. Returns the device."""
    global cuda
    cuda = importlib.import_module("cuda.bindings.driver")
    check(cuda.cuInit(0))
    device = check(cuda.cuDeviceGet(0))
    check(cuda.cuCtxSetCurrent(check(cuda.cuDevicePrimaryCtxRetain(device))))
    return int(device)


def check(result: Any) -> Any:
    """What the call gave. Raises OSError with the name of the code."""
    code, *values = result
    if int(code):
        raise OSError(f"{getattr(code, 'name', 'code')} ({int(code)})")
    return values[0] if len(values) == 1 else tuple(values)


def properties() -> Any:
    """Of memory on GPU 0 that can be exported as a descriptor."""
    made = cuda.CUmemAllocationProp()
    made.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    made.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    made.location.id = 0
    made.requestedHandleTypes = descriptor_kind()
    return made


def descriptor_kind() -> Any:
    return cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def map_memory(handle: Any, nbytes: int, *, writable: bool) -> int:
    """The address at which GPU 0 sees the memory."""
    flags = cuda.CUmemAccess_flags
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = 0
    access.flags = (
        flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        if writable
        else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    )
    address = int(check(cuda.cuMemAddressReserve(nbytes, 0, 0, 0)))
    check(cuda.cuMemMap(address, nbytes, 0, handle, 0))
    check(cuda.cuMemSetAccess(address, nbytes, [access], 1))
    return address


def new_stream() -> Any:
    return check(cuda.cuStreamCreate(int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))


def write(address: int, data: bytes) -> None:
    """Copy to the GPU, and wait."""
    source = ctypes.create_string_buffer(data, len(data))
    stream = new_stream()
    check(cuda.cuMemcpyHtoDAsync(address, ctypes.addressof(source), len(data), stream))
    check(cuda.cuStreamSynchronize(stream))


def read(address: int, nbytes: int) -> bytes:
    memory = ctypes.create_string_buffer(nbytes)
    check(cuda.cuMemcpyDtoH(ctypes.addressof(memory), address, nbytes))
    return memory.raw


def free_bytes() -> int:
    """Of GPU 0, other processes' use taken off."""
    return int(check(cuda.cuMemGetInfo())[0])
