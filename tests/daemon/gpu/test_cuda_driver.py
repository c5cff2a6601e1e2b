from __future__ import annotations

import enum
import os
import threading
from typing import Any

import pytest

import tests.fake_cuda.names as fake_names
from tests.fake_cuda.driver import FakeDriver
from tests.fake_cuda.names import CUresult
from tierd.gpu.cuda_driver import CudaDriver, refusal
from tierd.gpu.errors import DeviceError, DeviceLost, DeviceUnavailable, OutOfDeviceMemory

CHUNK = 2 << 20


@pytest.fixture
def fake() -> FakeDriver:
    return FakeDriver(gpus=2)


@pytest.fixture
def driver(fake: FakeDriver) -> CudaDriver:
    driver = CudaDriver(1, lambda: fake)
    driver.open()
    return driver


def test_a_gpu_is_known_by_its_uuid_as_clients_find_it(fake: FakeDriver) -> None:
    info = CudaDriver(1, lambda: fake).open()
    assert info.uuid == "GPU-01010101-0101-0101-0101-010101010101"
    assert info.name == "Fake GPU"
    assert info.driver == "CUDA 13.0"
    assert (info.total_bytes, info.free_bytes) == (1 << 30, 1 << 30)


def test_numbers_of_gpus_are_those_of_nvidia_smi_unless_somebody_chose(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    CudaDriver(0, lambda: fake).open()
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    CudaDriver(0, lambda: fake).open()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_bindings_that_are_not_installed_are_named_and_how_to_get_them() -> None:
    def load() -> Any:
        raise ModuleNotFoundError("No module named 'cuda'")

    with pytest.raises(DeviceUnavailable) as found:
        CudaDriver(0, load).open()
    assert found.value.reason == (
        "gpu:0: cuda-bindings cannot be imported (No module named 'cuda')"
    )
    assert "pip install cuda-bindings" in found.value.advice


@pytest.mark.parametrize("error", [RuntimeError("Failed to dlopen libcuda.so.1")])
def test_a_driver_that_is_not_there_is_named(fake: FakeDriver, error: Exception) -> None:
    """cuda-bindings load libcuda at the first call, and raise."""

    def refuse(*_: object) -> object:
        raise error

    fake.cuInit = refuse  # type: ignore[assignment, method-assign]
    with pytest.raises(DeviceUnavailable) as found:
        CudaDriver(0, lambda: fake).open()
    assert found.value.reason == "gpu:0: cuInit: Failed to dlopen libcuda.so.1"
    assert "install the NVIDIA driver" in found.value.advice


def test_a_machine_without_a_gpu_is_refused_with_the_code() -> None:
    with pytest.raises(DeviceUnavailable, match=r"cuInit: CUDA_ERROR_NO_DEVICE \(100\)"):
        CudaDriver(0, lambda: FakeDriver(gpus=0)).open()


def test_a_gpu_that_does_not_exist_is_refused_with_how_many_do(fake: FakeDriver) -> None:
    with pytest.raises(DeviceUnavailable, match="gpu:2 does not exist: the driver shows 2 GPUs"):
        CudaDriver(2, lambda: fake).open()
    assert fake.live() == {}


def test_every_thread_has_the_context_for_its_calls(driver: CudaDriver) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            driver.memory()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_a_refusal_names_the_gpu_the_call_the_sizes_and_the_code(driver: CudaDriver) -> None:
    with pytest.raises(DeviceError) as found:
        driver.create(CHUNK + 1)
    assert str(found.value) == ("gpu:1: cuMemCreate (2097153 bytes): CUDA_ERROR_INVALID_VALUE (1)")
    with pytest.raises(DeviceError, match=r"cuMemUnmap \(2097152 bytes at 0x1000\)"):
        driver.unmap(0x1000, CHUNK)


def test_memory_is_given_back_once(driver: CudaDriver, fake: FakeDriver) -> None:
    handle = driver.create(CHUNK)
    driver.release(handle)
    with pytest.raises(DeviceError, match=r"cuMemRelease: CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver.release(handle)
    assert fake.used_bytes == 0


def test_a_mapping_outlives_its_handle_and_addresses_outlive_no_mapping(
    driver: CudaDriver, fake: FakeDriver
) -> None:
    base = driver.reserve(2 * CHUNK)
    handle = driver.create(CHUNK)
    driver.map(base, CHUNK, handle)
    driver.allow(base, CHUNK)
    driver.release(handle)
    assert fake.used_bytes == CHUNK
    with pytest.raises(DeviceError, match="cuMemAddressFree"):
        driver.unreserve(base, 2 * CHUNK)
    driver.unmap(base, CHUNK)
    driver.unreserve(base, 2 * CHUNK)
    driver.close()
    assert fake.live() == {}


def test_after_close_a_call_is_an_error_and_not_a_crash(driver: CudaDriver) -> None:
    driver.close()
    driver.close()
    with pytest.raises(DeviceError, match="gpu:1: cuMemGetInfo on a GPU that is not open"):
        driver.memory()


@pytest.mark.parametrize("error", [ValueError("12345 is not a valid CUresult"), KeyError(12345)])
def test_a_code_that_the_bindings_do_not_know_is_an_error_too(
    driver: CudaDriver, fake: FakeDriver, error: Exception
) -> None:
    """As cuda-bindings 13.5 and 13.0 raise it."""

    def unheard(*_: object) -> object:
        raise error

    fake.cuMemGetInfo = unheard  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match=r"gpu:1: cuMemGetInfo: unknown code \(12345"):
        driver.memory()


def test_an_event_that_cannot_be_recorded_is_given_back(
    driver: CudaDriver, fake: FakeDriver
) -> None:
    stream = driver.new_stream()
    fake.faults["cuEventRecord"] = CUresult.CUDA_ERROR_UNKNOWN
    with pytest.raises(DeviceError, match="cuEventRecord"):
        driver.mark(stream)
    assert fake.events == {}
    driver.drop_stream(stream)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (1, DeviceError), (2, OutOfDeviceMemory), (214, DeviceLost), (700, DeviceLost),
        (712, DeviceError), (719, DeviceLost), (800, DeviceError), (999, DeviceError),
    ],
)  # fmt: skip
def test_codes_are_told_apart_by_what_can_be_done_about_them(
    code: int, kind: type[DeviceError]
) -> None:
    assert type(refusal("text", code)) is kind


def test_the_fake_has_the_names_and_numbers_of_the_real_bindings() -> None:
    """Needs cuda-bindings and no GPU; so it is the nodes with one that run it."""
    real = pytest.importorskip("cuda.bindings.driver")
    for kind in vars(fake_names).values():
        if isinstance(kind, type) and issubclass(kind, enum.IntEnum):
            for member in kind:
                assert int(getattr(getattr(real, kind.__name__), member.name)) == member.value
    for name in dir(FakeDriver):
        if name.startswith(("cu", "CU")):
            assert hasattr(real, name), name
    properties = real.CUmemAllocationProp()
    properties.location.id = 3
    access = real.CUmemAccessDesc()
    access.location.id = 5
    assert (properties.location.id, access.location.id) == (3, 5)
    assert real.CU_MEMHOSTREGISTER_PORTABLE == fake_names.CU_MEMHOSTREGISTER_PORTABLE
