"""The probes: each answers one question about a GPU, in a process of its own (see `talk`)."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import signal
import socket
import sys
import time
from typing import Any

from tests.gpu import cuda_calls
from tests.gpu.cuda_calls import check, free_bytes, map_memory, properties, read, write
from tests.gpu.direct_probe import direct_read  # noqa: F401 (a probe of its own module)
from tests.gpu.talk import Talk

MARK, OTHER = b"\x77\x11\x22\x33", b"\xde\xad\xbe\xef"
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE
_ADD_SEALS = 1033
COPY_BYTES = 64 << 20


def ms(begin: float) -> float:
    return round((time.perf_counter() - begin) * 1e3, 3)


# ---------------------------------------------------------------------------- memory by descriptor


def vmm_owner(talk: Talk, nbytes: str) -> None:
    """Makes memory with MARK at its start, exports it, then says what is there when asked."""
    cuda_calls.start()
    cuda, size = cuda_calls.cuda, int(nbytes)
    minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    granularity = int(check(cuda.cuMemGetAllocationGranularity(properties(), minimum)))
    begin = time.perf_counter()
    handle = check(cuda.cuMemCreate(size, properties(), 0))
    created = ms(begin)
    address = map_memory(handle, size, writable=True)
    write(address, MARK)
    begin = time.perf_counter()
    fd = int(check(cuda.cuMemExportToShareableHandle(handle, cuda_calls.descriptor_kind(), 0)))
    exported = ms(begin)
    link = os.readlink(f"/proc/self/fd/{fd}")
    talk.say(
        {"granularity": granularity, "created_ms": created, "exported_ms": exported, "link": link},
        [fd],
    )
    os.close(fd)
    while talk.hear() == "read":
        talk.say(read(address, len(MARK)).hex())


def vmm_client(talk: Talk, nbytes: str, mode: str, use: str) -> None:
    """Maps what it gets, and reads it; then `use`: read, copy, kernel (writes), or torch."""
    cuda_calls.start()
    cuda, size = cuda_calls.cuda, int(nbytes)
    talk.hear()
    begin = time.perf_counter()
    handle = check(cuda.cuMemImportFromShareableHandle(talk.fds[0], cuda_calls.descriptor_kind()))
    imported, begin = ms(begin), time.perf_counter()
    address = map_memory(handle, size, writable=mode == "rw")
    check(cuda.cuMemRelease(handle))
    found = {"imported_ms": imported, "mapped_ms": ms(begin), "mark": read(address, 4).hex()}
    if use == "torch":
        found |= _as_tensor(address, size)
    elif use != "read":
        try:
            _write_by(use, address)
            found["write"] = "succeeded"
        except (OSError, RuntimeError) as error:
            found["write"] = f"refused: {str(error).splitlines()[0]}"
    talk.say(found)


def _write_by(use: str, address: int) -> None:
    if use == "copy":
        write(address, OTHER)
        return
    import torch

    from tierd_client.gpu import dlpack

    tensor = dlpack.bytes_at(address, 4096, torch.device("cuda", 0), None)
    tensor.fill_(0xDE)
    torch.cuda.synchronize()


def _as_tensor(address: int, nbytes: int) -> dict[str, Any]:
    import torch

    from tierd_client.gpu import dlpack

    begin = time.perf_counter()
    tensor = dlpack.bytes_at(address, nbytes, torch.device("cuda", 0), None)
    made = ms(begin)
    return {
        "made_ms": made,
        "zero_copy": tensor.data_ptr() == address,
        "sum": int(tensor[:4].to(torch.int64).sum()),
    }


def free_memory(talk: Talk) -> None:
    """How much memory is free, as often as it is asked."""
    cuda_calls.start()
    while True:
        talk.say(free_bytes())
        if talk.hear() != "again":
            return


# ------------------------------------------------------------------------------- registered memory


def attributes(talk: Talk) -> None:
    """What the driver says that this GPU can do, by the end of the attribute's name."""
    device = cuda_calls.start()
    cuda = cuda_calls.cuda
    names = (
        "READ_ONLY_HOST_REGISTER_SUPPORTED", "HOST_REGISTER_SUPPORTED", "PAGEABLE_MEMORY_ACCESS",
        "PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES",
        "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
        "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED", "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED",
    )  # fmt: skip
    found = {}
    for name in names:
        which = getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        found[name] = int(check(cuda.cuDeviceGetAttribute(which, device)))
    talk.say(found)


def register(talk: Talk, kind: str, mode: str, flags: str, nbytes: str) -> None:
    """Registers a memfd of one kind of pages, and copies from it before and after."""
    cuda_calls.start()
    cuda, size = cuda_calls.cuda, int(nbytes)
    memory_flags = os.MFD_HUGETLB if kind == "hugetlb" else os.MFD_ALLOW_SEALING
    fd = os.memfd_create("tierd-probe", os.MFD_CLOEXEC | memory_flags)
    os.ftruncate(fd, size)
    memory = mmap.mmap(fd, size)
    if kind == "thp":
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = time.perf_counter()
    memory.madvise(_POPULATE_WRITE)
    populated = ms(begin)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if kind == "sealed":
        import fcntl

        fcntl.fcntl(fd, _ADD_SEALS, _FUTURE_WRITE)
    if mode == "ro":
        address = _map_for_reading(fd, size)
    before = _copy_rate(address)
    begin = time.perf_counter()
    code = int(cuda.cuMemHostRegister(address, size, int(flags))[0])
    found: dict[str, Any] = {
        "code": code, "populated_ms": populated, "registered_ms": ms(begin), "before": before,
    }  # fmt: skip
    if code == 0:
        found["after"] = _copy_rate(address)
        check(cuda.cuMemHostUnregister(address))
    talk.say(found)


def _map_for_reading(fd: int, nbytes: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
    )  # fmt: skip
    address = libc.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return int(address)


def _copy_rate(address: int) -> float:
    """GB/s of the second of two rounds of copies of 64 MiB from there."""
    cuda = cuda_calls.cuda
    target, stream = check(cuda.cuMemAlloc(COPY_BYTES)), cuda_calls.new_stream()
    for _ in range(2):
        begin = time.perf_counter()
        for number in range(4):
            source = address + number * COPY_BYTES
            check(cuda.cuMemcpyHtoDAsync(target, source, COPY_BYTES, stream))
        check(cuda.cuStreamSynchronize(stream))
        seconds = time.perf_counter() - begin
    check(cuda.cuMemFree(target))
    return round(4 * COPY_BYTES / seconds / 1e9, 2)


# ----------------------------------------------------------------------------------------- CUDA IPC


def ipc_owner(talk: Talk, nbytes: str) -> None:
    """Takes memory by the runtime, tries to open its own handle, then says what is there."""
    cuda_calls.start()
    runtime = importlib.import_module("cupy.cuda.runtime")
    runtime.setDevice(0)
    address = int(runtime.malloc(int(nbytes)))
    write(address, MARK)
    begin = time.perf_counter()
    handle = bytes(runtime.ipcGetMemHandle(address))
    took = ms(begin)
    inside = bytes(runtime.ipcGetMemHandle(address + int(nbytes) // 2))
    try:
        runtime.ipcOpenMemHandle(handle)
        same_process = "works"
    except RuntimeError as error:
        same_process = f"fails: {error}"
    talk.say(
        {
            "handle": handle.hex(),
            "handle_ms": took,
            "inside_is_the_same": inside == handle,
            "same_process": same_process,
            "aligned": address % (2 << 20) == 0,
        }
    )
    while talk.hear() == "read":
        talk.say(read(address, len(MARK)).hex())


def ipc_client(talk: Talk, handle: str) -> None:
    """Opens the handle twice, reads, writes; reads again when its owner is dead."""
    cuda_calls.start()
    runtime = importlib.import_module("cupy.cuda.runtime")
    runtime.setDevice(0)
    begin = time.perf_counter()
    address = int(runtime.ipcOpenMemHandle(bytes.fromhex(handle)))
    first, begin = ms(begin), time.perf_counter()
    again = int(runtime.ipcOpenMemHandle(bytes.fromhex(handle)))
    found: dict[str, Any] = {
        "first_ms": first, "second_ms": ms(begin), "same_address": again == address,
        "mark": read(address, 4).hex(),
    }  # fmt: skip
    found |= _as_tensor(address, 4096)
    write(address, OTHER)
    talk.say(found)
    talk.hear()  # the owner is dead
    try:
        after = read(address, 4).hex()
    except OSError as error:
        after = f"fails: {error}"
    talk.say(after)


def event_owner(talk: Talk, cycles: str) -> None:
    """Records an event behind a kernel that spins."""
    torch: Any = importlib.import_module("torch")
    # Imports and the first launch must not count.
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()
    event = torch.cuda.Event(interprocess=True)
    event.record()
    talk.say(event.ipc_handle().hex())
    talk.hear()
    torch.cuda._sleep(int(cycles))
    event.record()
    begin = time.perf_counter()
    talk.say("recorded")
    torch.cuda.synchronize()
    talk.say(ms(begin))


def event_client(talk: Talk, handle: str) -> None:
    """Waits on its own stream for the event of another process."""
    torch: Any = importlib.import_module("torch")
    event = torch.cuda.Event.from_ipc_handle(torch.device("cuda", 0), bytes.fromhex(handle))
    stream = torch.cuda.Stream()
    talk.say("open")
    talk.hear()
    begin = time.perf_counter()
    stream.wait_event(event)
    stream.synchronize()
    talk.say(ms(begin))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    name, fd, *arguments = sys.argv[1:]
    talk = Talk(socket.socket(fileno=int(fd)))
    try:
        globals()[name](talk, *arguments)
    except EOFError:
        return  # the test is over
    except Exception as error:  # the boundary of the process: the test shall read it
        talk.say({"exception": f"{name}: {type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
