from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import pytest
import torch

from tierd_client.errors import DeviceFailed, ProtocolBroken
from tierd_client.gpu import ipc_memory
from tierd_client.gpu.ipc_memory import IpcMemory, load_runtime

SPAN = 4 << 20
HANDLE = b"h" * 64
HOST = torch.device("cpu", 0)  # the numbers of its addresses are this process's


class Runtime:
    """One allocation of another process."""

    def __init__(self) -> None:
        self.memory = np.arange(SPAN, dtype=np.uint8)
        self.calls: list[tuple[Any, ...]] = []
        self.error: RuntimeError | None = None

    def setDevice(self, device: int) -> None:
        self.calls.append(("setDevice", device))

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:
        if self.error is not None:
            raise self.error
        self.calls.append(("open", handle))
        return self.memory.ctypes.data

    def deviceSynchronize(self) -> None:
        self.calls.append(("synchronize",))

    def ipcCloseMemHandle(self, address: int) -> None:
        assert address == self.memory.ctypes.data
        self.calls.append(("close",))


def memory_of(runtime: Runtime) -> IpcMemory:
    return IpcMemory(SPAN, HOST, runtime, "arena 0 of gpu:0")


def test_one_handle_shows_the_whole_arena_and_is_opened_once() -> None:
    runtime = Runtime()
    memory = memory_of(runtime)
    memory.map_all(HANDLE, SPAN)
    memory.map_all(HANDLE, SPAN)
    assert runtime.calls == [("setDevice", 0), ("open", HANDLE)]
    assert memory.tensor(torch.uint8, (3,), (1,), 257).tolist() == [1, 2, 3]


def test_it_is_closed_when_the_last_tensor_is_gone() -> None:
    runtime = Runtime()
    memory = memory_of(runtime)
    memory.map_all(HANDLE, SPAN)
    tensor = memory.tensor(torch.uint8, (3,), (1,), 257)
    del memory
    gc.collect()
    assert ("close",) not in runtime.calls
    del tensor
    gc.collect()
    assert runtime.calls[-3:] == [("setDevice", 0), ("synchronize",), ("close",)]


def test_it_can_be_let_go_and_opened_anew() -> None:
    runtime = Runtime()
    memory = memory_of(runtime)
    memory.map_all(HANDLE, SPAN)
    memory.tensor(torch.uint8, (3,), (1,), 257)
    memory.unmap_all()
    memory.unmap_all()
    assert runtime.calls.count(("close",)) == 1
    memory.map_all(HANDLE, SPAN)
    assert memory.tensor(torch.uint8, (3,), (1,), 257).tolist() == [1, 2, 3]


def test_a_context_that_is_lost_is_no_error_at_the_end() -> None:
    runtime = Runtime()
    memory = memory_of(runtime)
    memory.map_all(HANDLE, SPAN)

    def lost() -> None:
        raise RuntimeError("cudaErrorIllegalAddress")

    runtime.deviceSynchronize = lost  # type: ignore[method-assign]
    del memory
    gc.collect()
    assert ("close",) not in runtime.calls


def test_a_forked_child_closes_nothing() -> None:
    runtime = Runtime()
    memory = memory_of(runtime)
    memory.map_all(HANDLE, SPAN)
    child = os.fork()
    if child == 0:
        del memory
        gc.collect()
        os._exit(1 if ("close",) in runtime.calls else 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize(("handle", "nbytes"), [(b"short", SPAN), (HANDLE, SPAN - 1)])
def test_a_handle_of_something_else_is_refused(handle: bytes, nbytes: int) -> None:
    runtime = Runtime()
    with pytest.raises(ProtocolBroken, match=f"{len(handle)} bytes for {nbytes}.* {SPAN}"):
        memory_of(runtime).map_all(handle, nbytes)
    assert runtime.calls == []


def test_a_handle_that_does_not_open_is_named_with_the_gpu() -> None:
    runtime = Runtime()
    runtime.error = RuntimeError("cudaErrorMapBufferObjectFailed")
    with pytest.raises(DeviceFailed, match="arena 0 of gpu:0 on GPU 0 failed: cudaErrorMap"):
        memory_of(runtime).map_all(HANDLE, SPAN)


def test_descriptors_and_chunks_are_refused() -> None:
    memory = memory_of(Runtime())
    with pytest.raises(ProtocolBroken, match="came as descriptors"):
        memory.map(0, 0)
    with pytest.raises(ProtocolBroken, match="chunk 3 of arena 0 of gpu:0 was asked back"):
        memory.unmap(3)


def test_without_the_package_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(ipc_memory, "import_module", missing)
    with pytest.raises(DeviceFailed, match="needs the package cupy"):
        load_runtime()
