from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK, MEMORY, Rig, descriptors, make_rig
from tests.fake_cuda.names import CUresult
from tierd.gpu.errors import (
    DeviceError,
    DeviceFull,
    DeviceLost,
    DeviceUnavailable,
    GpuError,
    OutOfDeviceMemory,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tierd.gpu.device import Device

UNKNOWN = CUresult.CUDA_ERROR_UNKNOWN


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = make_rig("cuda_vmm")
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    yield rig
    rig.driver.faults.clear()
    rig.device.close()
    assert rig.driver.live() == {}


def export(device: Device, arena: int, chunk: int) -> None:
    fd = device.export(arena, chunk).fd
    assert fd is not None
    os.close(fd)


#: A life of a device, call by call. Each is made again when it fails.
LIFE: list[Callable[[Device], object]] = [
    lambda device: device.add_arena(0, BUDGET),
    lambda device: device.add_arena(1, BUDGET),
    lambda device: device.back(0, 0, 3),
    lambda device: device.copy(0, 100, memoryview(bytes(CHUNK))).wait(),
    lambda device: export(device, 0, 1),
    lambda device: device.back(1, 0, 2),
    lambda device: device.free(0, 1, 2),
    lambda device: device.back(0, 0, 4),
    lambda device: device.memory(),
    lambda device: device.register(1 << 20, 4096),
    lambda device: device.unregister(1 << 20, 4096),
    lambda device: device.free(0, 0, 4),
]


def test_a_life_without_faults_takes_this_many_calls() -> None:
    """So the test below ends after the last one."""
    rig = make_rig("cuda_vmm")
    rig.device.open()
    for step in LIFE:
        step(rig.device)
    rig.device.close()
    assert len(rig.driver.calls) < 200
    assert rig.driver.live() == {}


@pytest.mark.parametrize("at", range(1, 200))
def test_a_driver_that_fails_at_any_call_is_named_and_nothing_leaks(at: int) -> None:
    before = descriptors()
    rig = make_rig("cuda_vmm")
    rig.driver.fail_at = (at, UNKNOWN)
    errors = 0
    try:
        rig.device.open()
    except DeviceUnavailable as error:
        errors += 1
        check_text(error, rig.driver.calls[at - 1])
        if len(rig.driver.calls) > at or not rig.driver.live():
            assert rig.driver.live() == {}
        return
    for step in LIFE:
        backed = rig.device.backed_bytes
        try:
            step(rig.device)
        except DeviceError as error:
            errors += 1
            check_text(error, rig.driver.calls[at - 1])
            assert rig.device.backed_bytes <= backed
            step(rig.device)
    failed_before_close = len(rig.driver.calls) >= at
    rig.device.close()
    assert descriptors() == before or not failed_before_close
    if failed_before_close:
        assert errors == 1 or rig.driver.calls[at - 1] in UNDOING
        assert rig.driver.live() == {}


#: What a failure of is a line in the log: there is nobody to tell.
UNDOING = ("cuCtxSetCurrent", "cuEventDestroy")


def check_text(error: GpuError, call: str) -> None:
    assert call in str(error)
    assert "CUDA_ERROR_UNKNOWN (999)" in str(error)
    assert str(error).startswith("gpu:0: ")


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_backing_is_all_or_nothing(rig: Rig, call: str) -> None:
    rig.device.back(0, 1, 1)
    made = len(rig.driver.calls)
    rig.device.back(0, 2, 1)  # how many calls one chunk takes
    per_chunk = len(rig.driver.calls) - made
    at = len(rig.driver.calls) + per_chunk + 1 + rig.driver.calls[made:].index(call)
    rig.driver.fail_at = (at, UNKNOWN)  # in the second of the new chunks
    with pytest.raises(DeviceError, match=call):
        rig.device.back(0, 0, 8)
    assert rig.device.backed_bytes == 2 * CHUNK
    assert rig.driver.live()["mapped"] == 2
    rig.device.back(0, 0, 8)
    assert rig.device.backed_bytes == 8 * CHUNK


def test_out_of_memory_says_how_much_is_needed_free_and_ours(rig: Rig) -> None:
    rig.device.back(0, 0, 8)
    rig.driver.memory_bytes = 9 * CHUNK
    rig.device.add_arena(1, BUDGET)
    with pytest.raises(OutOfDeviceMemory) as found:
        rig.device.back(1, 0, 2)
    text = str(found.value)
    assert "cuMemCreate (2097152 bytes): CUDA_ERROR_OUT_OF_MEMORY (2)" in text
    assert "chunk 1 of arena 1 needs 2 MiB" in text.replace("2.0", "2")
    assert rig.device.backed_bytes == 8 * CHUNK
    rig.device.free(0, 0, 1)
    rig.device.back(1, 0, 2)


@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemRelease"])
def test_memory_that_the_driver_does_not_take_back_is_counted_and_tried_again(
    rig: Rig, call: str
) -> None:
    rig.device.back(0, 0, 2)
    rig.driver.faults[call] = UNKNOWN
    with pytest.raises(DeviceError, match=call):
        rig.device.free(0, 0, 1)
    assert rig.device.backed_bytes == 2 * CHUNK
    with pytest.raises(ValueError, match="chunk 0 of arena 0 has no memory"):
        rig.device.export(0, 0)
    with pytest.raises(DeviceError, match=call):  # it is in the way
        rig.device.back(0, 0, 1)
    rig.driver.faults.clear()
    rig.device.free(0, 0, 1)
    assert rig.device.backed_bytes == CHUNK
    rig.device.back(0, 0, 1)
    assert rig.device.backed_bytes == 2 * CHUNK


def test_memory_is_really_back_at_the_driver(rig: Rig) -> None:
    rig.device.back(0, 0, 8)
    assert rig.device.memory().free_bytes == MEMORY - BUDGET
    rig.device.free(0, 2, 6)
    assert rig.device.memory().free_bytes == MEMORY - 2 * CHUNK


def test_a_descriptor_is_closed_on_exec(rig: Rig) -> None:
    rig.device.back(0, 0, 1)
    fd = rig.device.export(0, 0).fd
    assert fd is not None
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    "attribute",
    ["VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"],
)
def test_a_gpu_without_these_calls_is_refused_with_the_other_way(attribute: str) -> None:
    rig = make_rig("cuda_vmm")
    which = getattr(rig.driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
    rig.driver.attributes[which] = 0
    with pytest.raises(DeviceUnavailable, match=f"the driver says 0 to {attribute}") as found:
        rig.device.open()
    assert "--gpu-device cuda_ipc" in found.value.advice
    assert rig.driver.live() == {}


def test_a_chunk_that_the_gpu_cannot_give_is_refused_with_both_sizes() -> None:
    rig = make_rig("cuda_vmm")
    rig.driver.granularity = 4 * CHUNK
    with pytest.raises(DeviceUnavailable, match=r"in multiples of 8.* MiB, a chunk has 2.* MiB"):
        rig.device.open()
    assert rig.driver.live() == {}


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemExportToShareableHandle"])
def test_what_a_container_forbids_is_found_when_the_gpu_is_opened(call: str) -> None:
    rig = make_rig("cuda_vmm")
    rig.driver.faults[call] = CUresult.CUDA_ERROR_NOT_PERMITTED
    with pytest.raises(DeviceUnavailable, match=rf"{call}.*CUDA_ERROR_NOT_PERMITTED \(800\)"):
        rig.device.open()
    assert rig.driver.live() == {}


def test_a_gpu_that_is_full_is_refused_with_what_makes_room() -> None:
    """Its driver said before that the budget is free."""
    rig = make_rig("cuda_vmm")
    rig.driver.faults["cuMemCreate"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceFull, match=r"a chunk needs 2.* MiB, 24.* are free") as found:
        rig.device.open()
    assert "lower --gpu 0=SIZE" in found.value.advice


def test_a_broken_context_is_told_apart_and_closing_it_raises_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = make_rig("cuda_vmm")
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    rig.device.back(0, 0, 1)
    rig.driver.faults["cuEventSynchronize"] = CUresult.CUDA_ERROR_LAUNCH_FAILED
    with pytest.raises(DeviceLost, match=r"CUDA_ERROR_LAUNCH_FAILED \(719\)"):
        rig.device.copy(0, 0, memoryview(b"abc")).wait()
    with pytest.raises(DeviceLost):
        rig.device.back(0, 1, 1)
    rig.device.close()
    assert "left to the end of the process" in caplog.text
    with contextlib.suppress(DeviceError):
        rig.device.memory()
