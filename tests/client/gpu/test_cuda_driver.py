from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import pytest

from tests.fake_cuda.names import CUresult
from tierd_client.errors import DeviceFailed
from tierd_client.gpu import cuda_driver
from tierd_client.gpu.cuda_driver import CudaDriver

if TYPE_CHECKING:
    from tests.client.gpu.conftest import Exporter
    from tests.fake_cuda.driver import FakeDriver

CHUNK = 2 << 20


def test_memory_of_another_process_is_read_where_it_was_mapped(
    fake: FakeDriver, exporter: Exporter
) -> None:
    driver = CudaDriver(1, fake)
    address = driver.reserve(4 * CHUNK, CHUNK)
    driver.map_for_reading(exporter.chunk(b"weights", CHUNK), address + CHUNK, CHUNK)
    assert ctypes.string_at(address + CHUNK, 7) == b"weights"
    (mapping,) = fake.mappings.values()
    assert (mapping.readable, mapping.writable) == (True, False)
    assert fake.handles == {}, "the mapping alone holds the memory"
    driver.unmap(address + CHUNK, CHUNK)
    driver.free_addresses(address, 4 * CHUNK)
    driver.close()


def test_the_context_that_was_current_before_a_call_is_so_after_it(
    fake: FakeDriver, exporter: Exporter
) -> None:
    other = CudaDriver(0, fake)
    fake.cuCtxSetCurrent(other._context)
    driver = CudaDriver(1, fake)
    address = driver.reserve(CHUNK, CHUNK)
    assert fake.current.stack == [other._context]
    with pytest.raises(DeviceFailed):
        driver.map_for_reading(0, address, CHUNK)
    assert fake.current.stack == [other._context]
    driver.free_addresses(address, CHUNK)
    driver.close()
    other.close()


@pytest.mark.parametrize(
    "call", ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess", "cuMemRelease"]
)
def test_a_call_that_fails_is_named_with_the_gpu_and_leaves_nothing_mapped(
    fake: FakeDriver, exporter: Exporter, call: str
) -> None:
    driver = CudaDriver(1, fake)
    address = driver.reserve(CHUNK, CHUNK)
    fake.faults[call] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceFailed, match=f"{call} on GPU 1 failed: CUDA_ERROR_OUT_OF_MEMORY"):
        driver.map_for_reading(exporter.chunk(b"weights", CHUNK), address, CHUNK)
    fake.faults.clear()
    fake.handles.clear()  # a release that fails leaves its handle
    driver.free_addresses(address, CHUNK)  # fails while anything is mapped there
    driver.close()


def test_a_gpu_that_is_not_there_is_named(fake: FakeDriver) -> None:
    with pytest.raises(DeviceFailed, match="cuDeviceGet on GPU 7 failed: CUDA_ERROR_INVALID"):
        CudaDriver(7, fake)


def test_without_the_package_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(cuda_driver, "import_module", missing)
    with pytest.raises(DeviceFailed, match=r"cuda-bindings: No module named 'cuda\.bindings"):
        CudaDriver.load(0)


def test_without_libcuda_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bindings:
        def cuInit(self, flags: int) -> None:
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(cuda_driver, "import_module", lambda name: Bindings())
    with pytest.raises(DeviceFailed, match="driver does not load: Failed to dlopen"):
        CudaDriver.load(0)
