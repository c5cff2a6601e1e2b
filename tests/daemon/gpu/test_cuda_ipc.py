from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK, MEMORY, Rig, make_rig
from tests.fake_cuda.driver import FakeDriver
from tierd.gpu.cuda_driver import CudaDriver
from tierd.gpu.cuda_ipc import CudaIpcDevice
from tierd.gpu.errors import DeviceError, DeviceLost, DeviceUnavailable, OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = make_rig("cuda_ipc")
    rig.device.open()
    yield rig
    rig.runtime.faults.clear()
    rig.device.close()
    assert rig.driver.live() == {}


def test_all_memory_is_taken_with_the_arena_and_given_back_at_the_end(rig: Rig) -> None:
    assert rig.device.backed_bytes == 0
    assert rig.device.span_bytes(BUDGET + 5) == BUDGET
    rig.device.add_arena(0, BUDGET)
    assert rig.device.backed_bytes == BUDGET
    rig.device.back(0, 0, 8)
    rig.device.free(0, 0, 8)
    assert rig.device.backed_bytes == BUDGET
    assert rig.device.memory().free_bytes == MEMORY - BUDGET
    assert not rig.device.elastic


def test_there_is_one_handle_for_all_chunks(rig: Rig) -> None:
    rig.device.add_arena(0, BUDGET)
    rig.device.back(0, 0, 2)
    first, second = rig.device.export(0, 0), rig.device.export(0, 1)
    assert first == second
    assert first.fd is None
    assert first.nbytes == BUDGET
    assert first.handle is not None
    assert len(first.handle) == 64


def test_a_second_arena_is_refused_with_the_device_that_can_do_it(rig: Rig) -> None:
    rig.device.add_arena(0, CHUNK)
    with pytest.raises(DeviceUnavailable, match="cuda_ipc has one arena") as found:
        rig.device.add_arena(1, CHUNK)
    assert found.value.advice == "take --gpu-device cuda_vmm"


def test_an_arena_that_does_not_fit_is_refused_and_may_be_tried_again(rig: Rig) -> None:
    with pytest.raises(OutOfDeviceMemory) as found:
        rig.device.add_arena(0, 2 * MEMORY)
    assert str(found.value).startswith(f"gpu:0: cudaMalloc ({2 * MEMORY} bytes): cudaErrorMemory")
    rig.device.add_arena(0, BUDGET)


@pytest.mark.parametrize("call", ["setDevice", "malloc", "ipcGetMemHandle", "free"])
def test_what_does_not_work_is_found_when_the_gpu_is_opened(call: str) -> None:
    rig = make_rig("cuda_ipc")
    rig.runtime.faults[call] = 801
    name = f"cuda{call[0].upper()}{call[1:]}"
    with pytest.raises(DeviceUnavailable, match=rf"gpu:0: {name}.*\(801\)") as found:
        rig.device.open()
    assert "cuda_vmm is the preferred way" in found.value.advice
    live = rig.driver.live()
    assert live == ({"allocations": 1} if call == "free" else {})


@pytest.mark.parametrize("call", ["malloc", "ipcGetMemHandle"])
def test_an_arena_that_fails_leaves_nothing(rig: Rig, call: str) -> None:
    rig.runtime.faults[call] = 999
    with pytest.raises(DeviceError, match=r"\(999\)"):
        rig.device.add_arena(0, BUDGET)
    assert rig.device.backed_bytes == 0
    assert rig.driver.used_bytes == 0
    rig.runtime.faults.clear()
    rig.device.add_arena(0, BUDGET)


def test_what_could_not_be_given_back_is_before_more_is_taken(rig: Rig) -> None:
    rig.runtime.faults |= {"ipcGetMemHandle": 999, "free": 999}
    with pytest.raises(DeviceError, match="cudaIpcGetMemHandle"):
        rig.device.add_arena(0, BUDGET)
    assert rig.device.backed_bytes == BUDGET
    rig.runtime.faults.clear()
    rig.device.add_arena(0, BUDGET)
    assert rig.driver.used_bytes == BUDGET


def test_a_part_of_a_block_is_not_shared() -> None:
    rig = make_rig("cuda_ipc")
    rig.runtime.suballocates = True
    with pytest.raises(DeviceUnavailable, match=r"gave a part of a block of .* bytes at 0x"):
        rig.device.open()
    assert rig.driver.live() == {}


def test_cupy_that_is_not_installed_is_named_and_how_to_get_it() -> None:
    driver = FakeDriver(memory_bytes=MEMORY)

    def load() -> Any:
        raise ModuleNotFoundError("No module named 'cupy'")

    device = CudaIpcDevice(0, CHUNK, BUDGET, driver=CudaDriver(0, lambda: driver), load=load)
    with pytest.raises(DeviceUnavailable, match="needs CuPy") as found:
        device.open()
    assert "pip install cupy-cuda13x" in found.value.advice
    assert driver.live() == {}


def test_chunks_that_could_share_a_block_are_refused() -> None:
    rig = make_rig("cuda_ipc")
    device = CudaIpcDevice(
        0, 1 << 20, BUDGET,
        driver=CudaDriver(0, lambda: rig.driver), load=lambda: rig.runtime,
    )  # fmt: skip
    with pytest.raises(DeviceUnavailable, match=r"multiples of 2.* MiB, not 1.* MiB"):
        device.open()


def test_a_broken_context_is_told_apart_here_too(rig: Rig) -> None:
    rig.runtime.faults["malloc"] = 719
    with pytest.raises(DeviceLost):
        rig.device.add_arena(0, BUDGET)
