"""The real cuda-bindings over a stub of libcuda: what arrives in C is what was meant.

Needs cuda-bindings and no GPU: its wheel and that of cuda-pathfinder, unpacked on PYTHONPATH, are
enough. 13.0.3 and 13.5.0 were tried.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

PROGRAM = """
import os, threading, time
from tierd.gpu.cuda_vmm import CudaVmmDevice
from tierd.gpu.errors import GpuError

CHUNK = 2 << 20
ticks = 0

def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.002)

def beside(name, call):
    '''Whether another thread runs during the call: so it does not hold the GIL.'''
    before = ticks
    result = call()
    print(name, "others ran" if ticks - before > 5 else "nobody else ran")
    return result

threading.Thread(target=tick, daemon=True).start()
device = CudaVmmDevice(1, CHUNK, 8 * CHUNK)
print(device.open())
print(device.memory())
device.add_arena(0, 16 * CHUNK)
device.back(0, 1, 1)
pending = beside("copy", lambda: device.copy(0, CHUNK + 5, memoryview(b"hello")))
beside("wait", pending.wait)
fd = device.export(0, 1).fd
print("read", os.pread(fd, 5, 5))
os.close(fd)
print("fetched", bytes(device.fetch(device.parts(0, CHUNK + 5, 5)[0][0], 5)))
beside("register", lambda: device.register(1 << 30, 8192))
device.unregister(1 << 30, 8192)
for nbytes in (12288, 16384):
    try:
        device.register(1 << 30, nbytes)
    except GpuError as error:
        print(error)
try:
    CudaVmmDevice(1, 64 * CHUNK, 64 * CHUNK).open()
except GpuError as error:
    print(error)
device.close()
print("direct", flush=True)
device = CudaVmmDevice(1, CHUNK, 8 * CHUNK, direct=True)
device.open()
device.enter()
device.close()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the program above says, and the stub."""
    pytest.importorskip("cuda.bindings.driver")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    place = tmp_path_factory.mktemp("stub")
    source = Path(__file__).with_name("stub_libcuda.c")
    library = str(place / "libcuda.so.1")
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"LD_LIBRARY_PATH": str(place)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_structs_and_flags_arrive_as_the_driver_reads_them(said: str) -> None:
    for line in (
        "cuDevicePrimaryCtxRetain 1",
        "cuDeviceGetAttribute 102 of 1",
        "cuDeviceGetAttribute 103 of 1",
        "granularity: type 1 handles 1 location 1 1 option 0",
        "cuMemAddressReserve 33554432 0 0 0",
        "cuMemCreate 2097152: type 1 handles 1 location 1 1 flags 0",
        "cuMemMap 2097152 0 0",
        "cuMemSetAccess 2097152: location 1 1 flags 3 count 1",
        "cuMemExportToShareableHandle kind 1 flags 0",
        "cuStreamCreate 1",
        "cuMemcpyHtoDAsync 5 on 0x5",
        "cuEventCreate 3",
        "cuEventRecord 0x6 0x5",
        "cuEventSynchronize 0x6",
        "cuMemHostRegister 0x40000000 8192 1",
        "cuMemHostUnregister 0x40000000",
    ):
        assert f"{line}\n" in said


def test_memory_that_ssds_write_into_is_asked_for_as_such(said: str) -> None:
    before, after = said.split("direct\n")
    assert "for RDMA" not in before
    assert "for RDMA\n" in after
    assert "cuDeviceGetAttribute 110 of 1\n" in after


def test_what_the_driver_gives_is_understood(said: str) -> None:
    assert "name='Stub GPU'" in said
    assert f"uuid='GPU-{UUID(bytes=bytes(range(0, 32, 2)))}'" in said
    assert "driver='CUDA 13.0'" in said
    assert f"DeviceMemory(total_bytes={2 << 30}, free_bytes={1 << 30})" in said
    assert "read b'hello'" in said
    assert "fetched bytearray(b'hello')" in said or "fetched b'hello'" in said


@pytest.mark.parametrize("call", ["copy", "wait", "register"])
def test_others_run_while_the_driver_works(said: str, call: str) -> None:
    assert f"{call} others ran" in said


def test_codes_become_errors_and_one_that_nobody_knows_too(said: str) -> None:
    assert "cuMemHostRegister (12288 bytes at 0x40000000): " in said
    assert "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED (712)" in said
    assert "cuMemHostRegister (16384 bytes at 0x40000000): unknown code (" in said
    assert "CUDA_ERROR_OUT_OF_MEMORY (2): a chunk needs 128.0 MiB" in said


def test_everything_is_given_back(said: str) -> None:
    for taken, given in (
        ("cuMemCreate 2", "cuMemRelease"), ("cuMemMap", "cuMemUnmap"),
        ("cuMemAddressReserve", "cuMemAddressFree"), ("cuEventCreate", "cuEventDestroy"),
        ("cuStreamCreate", "cuStreamDestroy"),
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"),
    ):  # fmt: skip
        assert said.count(f"\n{taken}") == said.count(f"\n{given}") > 0, taken
