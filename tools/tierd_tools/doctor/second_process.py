"""The process that reads what another one copied: python -m tierd_tools.doctor.second_process FD

FD is a socket: one JSON message with the descriptors comes in, one JSON answer goes out. It maps
the chunks as a client does, reads the bytes back and answers with their hash.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import mmap
import os
import socket
import sys
from typing import Any


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 16)
    message = json.loads(data)
    try:
        answer = READERS[message["kind"]](message, fds)
    except Exception as error:  # whatever it is, the other process waits for an answer
        answer = {"error": f"{type(error).__name__}: {error}"}
    sock.sendall(json.dumps(answer).encode())


def read_memfd(message: dict[str, Any], fds: list[int]) -> dict[str, str]:
    parts = []
    for fd in fds:
        with mmap.mmap(fd, message["chunk_bytes"], prot=mmap.PROT_READ) as chunk:
            parts.append(chunk[:])
        try:
            mmap.mmap(fd, message["chunk_bytes"], prot=mmap.PROT_READ | mmap.PROT_WRITE).close()
        except PermissionError:
            continue
        return {"error": "a client can write into what others read"}
    offset = message["offset"]
    return _answer(b"".join(parts)[offset : offset + message["nbytes"]], "writing was refused")


def read_cuda_vmm(message: dict[str, Any], fds: list[int]) -> dict[str, str]:
    cuda = _bindings()
    device = _context(cuda, message["uuid"])
    nbytes = message["chunk_bytes"]
    kind = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    base = int(_checked(cuda.cuMemAddressReserve(nbytes * len(fds), 0, 0, 0)))
    for number, fd in enumerate(fds):
        handle = _checked(cuda.cuMemImportFromShareableHandle(fd, kind))
        os.close(fd)
        _checked(cuda.cuMemMap(base + number * nbytes, nbytes, 0, handle, 0))
        _checked(cuda.cuMemRelease(handle))
        _checked(cuda.cuMemSetAccess(base + number * nbytes, nbytes, [access], 1))
    return _answer(_to_host(cuda, base, message), "mapped for reading only")


def read_cuda_ipc(message: dict[str, Any], fds: list[int]) -> dict[str, str]:
    cuda = _bindings()
    runtime = importlib.import_module("cupy.cuda.runtime")
    runtime.setDevice(_context(cuda, message["uuid"]))
    base = int(runtime.ipcOpenMemHandle(bytes.fromhex(message["handles"][0])))
    answer = _answer(_to_host(cuda, base, message), "CUDA IPC cannot forbid writing")
    runtime.ipcCloseMemHandle(base)
    return answer


READERS = {"memfd": read_memfd, "cuda_vmm": read_cuda_vmm, "cuda_ipc": read_cuda_ipc}


def _bindings() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _context(cuda: Any, uuid: str) -> int:
    """The ordinal of the GPU of that UUID, whose primary context is this thread's now."""
    _checked(cuda.cuInit(0))
    for number in range(int(_checked(cuda.cuDeviceGetCount()))):
        device = _checked(cuda.cuDeviceGet(number))
        if bytes(_checked(cuda.cuDeviceGetUuid(device)).bytes).hex() in uuid.replace("-", ""):
            _checked(cuda.cuCtxSetCurrent(_checked(cuda.cuDevicePrimaryCtxRetain(device))))
            return number
    raise OSError(f"no GPU here has the UUID {uuid}: do both see the same GPUs?")


def _to_host(cuda: Any, base: int, message: dict[str, Any]) -> bytes:
    """By the chunk, as it was mapped."""
    begin, end = message["offset"], message["offset"] + message["nbytes"]
    memory = ctypes.create_string_buffer(message["nbytes"])
    at = begin
    while at < end:
        stop = min(end, (at // message["chunk_bytes"] + 1) * message["chunk_bytes"])
        target = ctypes.addressof(memory) + at - begin
        _checked(cuda.cuMemcpyDtoH(target, base + at, stop - at))
        at = stop
    return memory.raw


def _checked(result: Any) -> Any:
    code, *values = result
    if int(code):
        raise OSError(f"{getattr(code, 'name', code)} ({int(code)})")
    return values[0] if len(values) == 1 else tuple(values)


def _answer(data: bytes, write: str) -> dict[str, str]:
    return {"digest": hashlib.sha256(data).hexdigest(), "write": write}


if __name__ == "__main__":
    main()
