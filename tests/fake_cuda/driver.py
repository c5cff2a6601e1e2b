"""The CUDA driver as its documentation describes it, over shared memory: a stand-in for the module
`cuda.bindings.driver`.

"GPU memory" is a memfd for each handle, "GPU addresses" are addresses of this process: a descriptor
that one process exports another imports, and what it maps for reading it cannot write. Mistakes are
answered with the codes of the real driver; a call that fails changes nothing. It knows no limits of
its own besides: `faults` and `fail_at` make calls fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from tests.fake_cuda import names
from tests.fake_cuda.names import STICKY, CUresult, Uuid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fake_cuda.names import Access, Properties

P = ParamSpec("P")
MEMFD_NAME = "fake-cuda"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


@dataclass(eq=False)
class _Memory:
    """One allocation: it lives while a handle or a mapping of this process refers to it."""

    fd: int
    nbytes: int
    uses: int = 1
    direct: bool = False  #: other devices may write into it


@dataclass
class _Mapping:
    memory: _Memory
    readable: bool = False
    writable: bool = False


class _Stream:
    def __init__(self) -> None:
        self.work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._run, name="fake-cuda-stream", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            work()

    def mark(self) -> threading.Event:
        passed = threading.Event()
        self.work.put(passed.set)
        return passed


@dataclass(eq=False)
class _Event:
    passed: threading.Event | None = None


class Refused(Exception):
    def __init__(self, code: CUresult) -> None:
        super().__init__(code.name)
        self.code = code


def _check(condition: object, code: CUresult = CUresult.CUDA_ERROR_INVALID_VALUE) -> None:
    if not condition:
        raise Refused(code)


def _call(
    needs: str = "context",
) -> Callable[
    [Callable[Concatenate[FakeDriver, P], Any]], Callable[Concatenate[FakeDriver, P], Any]
]:
    """A function of the driver: (code, values...). needs: "nothing", "init" or "context"."""

    def wrap(
        function: Callable[Concatenate[FakeDriver, P], Any],
    ) -> Callable[Concatenate[FakeDriver, P], Any]:
        @functools.wraps(function)
        def run(self: FakeDriver, /, *arguments: P.args, **named: P.kwargs) -> Any:
            try:
                with self.lock:
                    self.before(function.__name__, needs)
                    values = function(self, *arguments, **named)
                if isinstance(values, list):  # of what to wait for, without the lock
                    for passed in values:
                        passed.wait()
                    values = ()
                    _check(self.lost is None, self.lost or CUresult.CUDA_SUCCESS)
            except Refused as refused:
                return refused.code, None
            if values is None:
                values = ()
            return CUresult.CUDA_SUCCESS, *(values if isinstance(values, tuple) else (values,))

        return run

    return wrap


class FakeDriver:
    """One process' view of the driver. Attributes are named as the module's."""

    CUresult = names.CUresult
    CUdevice_attribute = names.CUdevice_attribute
    CUmemAllocationType = names.CUmemAllocationType
    CUmemLocationType = names.CUmemLocationType
    CUmemAllocationHandleType = names.CUmemAllocationHandleType
    CUmemAllocationGranularity_flags = names.CUmemAllocationGranularity_flags
    CUmemAccess_flags = names.CUmemAccess_flags
    CUstream_flags = names.CUstream_flags
    CUevent_flags = names.CUevent_flags
    CU_MEMHOSTREGISTER_PORTABLE = names.CU_MEMHOSTREGISTER_PORTABLE
    CUmemAllocationProp = names.Properties
    CUmemAccessDesc = names.Access

    def __init__(
        self, *, gpus: int = 1, memory_bytes: int = 1 << 30, granularity: int = 2 << 20
    ) -> None:
        self.gpus = gpus
        self.memory_bytes = memory_bytes
        self.granularity = granularity
        self.attributes = dict.fromkeys(map(int, names.CUdevice_attribute), 1)
        self.calls: list[str] = []
        self.faults: dict[str, CUresult] = {}  #: what calls of that name answer
        self.fault_file: str | None = None  #: `faults` are only while that exists
        self.fail_at: tuple[int, CUresult] | None = None  #: the number of a call, and its answer
        self.lost: CUresult | None = None
        self.gate = threading.Event()  #: streams do nothing while it is not set
        self.gate.set()
        self.lock = threading.RLock()
        self.initialized = False
        self.contexts: dict[int, int] = {}  # device -> how often retained
        self.current = threading.local()
        self.handles: dict[int, _Memory] = {}
        self.reserved: dict[int, int] = {}
        self.mappings: dict[int, _Mapping] = {}  # by address, of memory that cuMemMap put there
        self.allocations: dict[int, _Memory] = {}  # by address, of cudaMalloc
        self.opened: dict[int, int] = {}  # address -> size, of others' memory, by CUDA IPC
        self.registered: dict[int, int] = {}
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, _Event] = {}
        self._numbers = iter(range(1000, 1 << 60))

    def before(self, name: str, needs: str) -> None:
        self.calls.append(name)
        _check(self.lost is None, self.lost or CUresult.CUDA_SUCCESS)
        code = self.faults.get(name)
        if code is not None and self.fault_file is not None and not os.path.exists(self.fault_file):
            code = None
        if self.fail_at is not None and self.fail_at[0] == len(self.calls):
            code = self.fail_at[1]
        if code is not None:
            if code in STICKY:
                self.lost = code
            raise Refused(code)
        _check(needs == "nothing" or self.initialized, CUresult.CUDA_ERROR_NOT_INITIALIZED)
        device = self._stack()[-1] if self._stack() else None
        _check(needs != "context" or device in self.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)

    def live(self) -> dict[str, int]:
        """What was taken and not given back, by kind."""
        counts = {
            "contexts": sum(self.contexts.values()), "handles": len(self.handles),
            "reserved": len(self.reserved), "mapped": len(self.mappings),
            "allocations": len(self.allocations), "registered": len(self.registered),
            "opened": len(self.opened),
            "streams": len(self.streams), "events": len(self.events),
        }  # fmt: skip
        return {kind: count for kind, count in counts.items() if count}

    # ------------------------------------------------------------------------- devices and contexts

    @_call("nothing")
    def cuInit(self, flags: int) -> None:
        _check(flags == 0)
        _check(self.gpus, CUresult.CUDA_ERROR_NO_DEVICE)
        self.initialized = True

    @_call("init")
    def cuDeviceGetCount(self) -> int:
        return self.gpus

    @_call("nothing")
    def cuDriverGetVersion(self) -> int:
        return 13000

    @_call("init")
    def cuDeviceGet(self, ordinal: int) -> int:
        _check(0 <= ordinal < self.gpus, CUresult.CUDA_ERROR_INVALID_DEVICE)
        return ordinal

    @_call("init")
    def cuDeviceGetName(self, length: int, device: int) -> bytes:
        return b"Fake GPU".ljust(length, b"\0")

    @_call("init")
    def cuDeviceGetUuid(self, device: int) -> Uuid:
        return Uuid(bytes([device]) * 16)

    @_call("init")
    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return self.attributes[int(attribute)]

    @_call("init")
    def cuDevicePrimaryCtxRetain(self, device: int) -> int:
        self.contexts[device] = self.contexts.get(device, 0) + 1
        return device

    @_call("init")
    def cuDevicePrimaryCtxRelease(self, device: int) -> None:
        _check(device in self.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self.contexts[device] -= 1
        if not self.contexts[device]:
            del self.contexts[device]

    @_call("init")
    def cuCtxSetCurrent(self, context: int) -> None:
        _check(context in self.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._stack()[-1:] = [context]  # replaces the current one, if there is one

    @_call("init")
    def cuCtxPushCurrent(self, context: int) -> None:
        _check(context in self.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        self._stack().append(context)

    @_call()
    def cuCtxPopCurrent(self) -> int:
        context: int = self._stack().pop()
        return context

    def _stack(self) -> list[int]:
        """The contexts of this thread; the last is the current one."""
        if not hasattr(self.current, "stack"):
            self.current.stack = []
        found: list[int] = self.current.stack
        return found

    @_call()
    def cuMemGetInfo(self) -> tuple[int, int]:
        return self.memory_bytes - self.used_bytes, self.memory_bytes

    @property
    def used_bytes(self) -> int:
        memories = [*self.handles.values(), *self.allocations.values()]
        memories += [mapping.memory for mapping in self.mappings.values()]
        return sum(memory.nbytes for memory in set(memories))

    # ------------------------------------------------------------------------------ virtual memory

    @_call()
    def cuMemGetAllocationGranularity(self, properties: Properties, option: int) -> int:
        return self.granularity

    @_call()
    def cuMemAddressReserve(self, nbytes: int, alignment: int, address: int, flags: int) -> int:
        _check(nbytes > 0 and nbytes % self.granularity == 0 and flags == 0)
        base = map_at(None, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self.reserved[base] = nbytes
        return base

    @_call()
    def cuMemAddressFree(self, address: int, nbytes: int) -> None:
        _check(self.reserved.get(address) == nbytes)
        _check(not any(address <= at < address + nbytes for at in self.mappings))
        del self.reserved[address]
        _libc.munmap(address, nbytes)

    @_call()
    def cuMemCreate(self, nbytes: int, properties: Properties, flags: int) -> int:
        _check(nbytes > 0 and nbytes % self.granularity == 0 and flags == 0)
        _check(properties.type == names.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED)
        _check(properties.location.type == names.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
        _check(properties.location.id in self.contexts, CUresult.CUDA_ERROR_INVALID_DEVICE)
        memory = self.new_memory(nbytes)
        memory.direct = bool(properties.allocFlags.gpuDirectRDMACapable)
        return self._number(self.handles, memory)

    def new_memory(self, nbytes: int) -> _Memory:
        enough = self.used_bytes + nbytes <= self.memory_bytes
        _check(enough, CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        return _Memory(fd, nbytes)

    @_call()
    def cuMemRelease(self, handle: int) -> None:
        _check(handle in self.handles)
        self._drop(self.handles.pop(handle))

    @_call()
    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> None:
        _check(handle in self.handles and offset == 0 and flags == 0)
        _check(nbytes == self.handles[handle].nbytes)
        _check(any(a <= address and address + nbytes <= a + n for a, n in self.reserved.items()))
        _check(not any(True for _ in self._mapped(address, nbytes)))
        memory = self.handles[handle]
        memory.uses += 1
        map_at(address, nbytes, 0, mmap.MAP_SHARED, memory.fd)
        self.mappings[address] = _Mapping(memory)

    @_call()
    def cuMemUnmap(self, address: int, nbytes: int) -> None:
        _check(address in self.mappings and self.mappings[address].memory.nbytes == nbytes)
        map_at(address, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self._drop(self.mappings.pop(address).memory)

    @_call()
    def cuMemSetAccess(self, address: int, nbytes: int, access: list[Access], count: int) -> None:
        _check(address in self.mappings and self.mappings[address].memory.nbytes == nbytes)
        _check(count == len(access) == 1 and access[0].location.id in self.contexts)
        flags = access[0].flags
        _check(flags in list(names.CUmemAccess_flags))
        _libc.mprotect(address, nbytes, flags)  # 0, 1, 3 mean the same there
        self.mappings[address].readable = flags != 0
        self.mappings[address].writable = flags == 3

    @_call()
    def cuMemExportToShareableHandle(self, handle: int, kind: int, flags: int) -> int:
        _check(handle in self.handles and flags == 0)
        _check(kind == names.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        fd = os.dup(self.handles[handle].fd)
        os.set_inheritable(fd, True)  # the driver promises nothing about that
        return fd

    @_call()
    def cuMemImportFromShareableHandle(self, fd: int, kind: int) -> int:
        _check(kind == names.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        with contextlib.suppress(OSError):
            _check(os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{MEMFD_NAME}"))
            return self._number(self.handles, _Memory(os.dup(fd), os.fstat(fd).st_size))
        raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)

    @_call()
    def cuMemGetAddressRange(self, address: int) -> tuple[int, int]:
        for start, memory in self.allocations.items():
            if start <= address < start + memory.nbytes:
                return start, memory.nbytes
        raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)

    # ------------------------------------------------------------------------------ host and copies

    @_call()
    def cuMemHostRegister(self, address: int, nbytes: int, flags: int) -> None:
        _check(nbytes > 0 and flags == names.CU_MEMHOSTREGISTER_PORTABLE)
        taken = list(self._registrations(address, nbytes))
        _check(not taken, CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED)
        self.registered[address] = nbytes

    @_call()
    def cuMemHostUnregister(self, address: int) -> None:
        known = address in self.registered
        _check(known, CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
        del self.registered[address]

    @_call()
    def cuStreamCreate(self, flags: int) -> int:
        _check(flags == names.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return self._number(self.streams, _Stream())

    @_call()
    def cuStreamDestroy(self, stream: int) -> None:
        self._stream(stream).work.put(None)
        del self.streams[stream]

    @_call()
    def cuStreamSynchronize(self, stream: int) -> list[threading.Event]:
        return [self._stream(stream).mark()]

    @_call()
    def cuCtxSynchronize(self) -> list[threading.Event]:
        return [stream.mark() for stream in self.streams.values()]

    @_call()
    def cuMemcpyHtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> None:
        _check(nbytes > 0 and self._writable(target, nbytes))
        pinned = list(self._registrations(source, nbytes))
        if pinned:  # a part of it: the driver refuses a copy over the end of a registration
            start, size = pinned[0]
            _check(start <= source and source + nbytes <= start + size)
        staged = None if pinned else ctypes.string_at(source, nbytes)

        def move() -> None:
            self.gate.wait()
            with self.lock:
                alive = self._writable(target, nbytes)
                still = not pinned or pinned == list(self._registrations(source, nbytes))
                if not alive or not still:
                    self.lost = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
                elif self.lost is None:
                    ctypes.memmove(target, source if staged is None else staged, nbytes)

        self._stream(stream).work.put(move)

    @_call()
    def cuMemcpyDtoH(self, target: int, source: int, nbytes: int) -> None:
        readable = any(
            start <= source and source + nbytes <= start + mapping.memory.nbytes
            for start, mapping in self.mappings.items()
            if mapping.readable
        )
        _check(readable or self._allocated(source, nbytes))
        ctypes.memmove(target, source, nbytes)

    @_call()
    def cuEventCreate(self, flags: int) -> int:
        return self._number(self.events, _Event())

    @_call()
    def cuEventRecord(self, event: int, stream: int) -> None:
        _check(event in self.events, CUresult.CUDA_ERROR_INVALID_HANDLE)
        self.events[event].passed = self._stream(stream).mark()

    @_call()
    def cuEventSynchronize(self, event: int) -> list[threading.Event]:
        _check(event in self.events, CUresult.CUDA_ERROR_INVALID_HANDLE)
        passed = self.events[event].passed
        return [] if passed is None else [passed]

    @_call()
    def cuEventQuery(self, event: int) -> None:
        _check(event in self.events, CUresult.CUDA_ERROR_INVALID_HANDLE)
        passed = self.events[event].passed
        _check(passed is None or passed.is_set(), CUresult.CUDA_ERROR_NOT_READY)

    @_call()
    def cuEventDestroy(self, event: int) -> None:
        _check(event in self.events, CUresult.CUDA_ERROR_INVALID_HANDLE)
        del self.events[event]

    # -------------------------------------------------------------------------------------- inside

    def _number(self, table: dict[int, Any], value: object) -> int:
        number = next(self._numbers)
        table[number] = value
        return number

    def _drop(self, memory: _Memory) -> None:
        memory.uses -= 1
        if not memory.uses:
            os.close(memory.fd)

    def _stream(self, stream: int) -> _Stream:
        _check(stream in self.streams, CUresult.CUDA_ERROR_INVALID_HANDLE)
        return self.streams[stream]

    def _mapped(self, address: int, nbytes: int) -> Iterator[tuple[int, _Mapping]]:
        for start, mapping in sorted(self.mappings.items(), key=lambda item: item[0]):
            if start < address + nbytes and address < start + mapping.memory.nbytes:
                yield start, mapping

    def _allocated(self, address: int, nbytes: int) -> bool:
        """Whether the range lies in one allocation of cudaMalloc, ours or another process'."""
        sizes = {start: memory.nbytes for start, memory in self.allocations.items()} | self.opened
        return any(
            start <= address and address + nbytes <= start + size for start, size in sizes.items()
        )

    def _writable(self, address: int, nbytes: int) -> bool:
        if self._allocated(address, nbytes):
            return True
        at = address
        for start, mapping in self._mapped(address, nbytes):
            if start > at or not mapping.writable:
                return False
            at = start + mapping.memory.nbytes
        return at >= address + nbytes

    def _registrations(self, address: int, nbytes: int) -> Iterator[tuple[int, int]]:
        for start, size in self.registered.items():
            if start < address + nbytes and address < start + size:
                yield start, size


def map_at(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    flags |= _MAP_NORESERVE if address is None else _MAP_NORESERVE | _MAP_FIXED
    found = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    assert found not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return int(found)
