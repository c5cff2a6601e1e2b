"""Memory of each device in another process, as a client gets it: by a descriptor or a handle that
travels over a socket. The CUDA ones over the fake driver, in both processes."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK, make_rig

if TYPE_CHECKING:
    from tierd.gpu.device import Kind

SITE = Path(__file__).parents[2] / "fake_cuda" / "site"

RECEIVE = """
    import array, ctypes, mmap, os, socket, sys
    sock = socket.socket(fileno=int(sys.argv[1]))
    handle, ancillary, _, _ = sock.recvmsg(64, socket.CMSG_SPACE(4))
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data)
"""
MAP = {
    "memfd": """
    place = mmap.mmap(fds[0], 2 << 20, prot=mmap.PROT_READ)
    import numpy
    address = numpy.frombuffer(place, dtype=numpy.uint8).ctypes.data
    """,
    "cuda_vmm": """
    from cuda.bindings import driver as d
    def check(result):
        assert int(result[0]) == 0, result[0]
        return result[1] if len(result) == 2 else None
    check(d.cuInit(0))
    check(d.cuCtxSetCurrent(check(d.cuDevicePrimaryCtxRetain(check(d.cuDeviceGet(0))))))
    address = int(check(d.cuMemAddressReserve(2 << 20, 0, 0, 0)))
    kind = d.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    memory = check(d.cuMemImportFromShareableHandle(fds[0], kind))
    os.close(fds[0])
    check(d.cuMemMap(address, 2 << 20, 0, memory, 0))
    access = d.CUmemAccessDesc()
    access.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = 0
    access.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
    check(d.cuMemSetAccess(address, 2 << 20, [access], 1))
    check(d.cuMemRelease(memory))
    """,
    "cuda_ipc": """
    from cupy.cuda import runtime
    address = runtime.ipcOpenMemHandle(handle) + (2 << 20)
    """,
}
READ = """
    sock.sendall(ctypes.string_at(address, 16))
    sock.recv(1)
    sock.sendall(ctypes.string_at(address, 16))
    sock.recv(1)
    ctypes.memset(address, 0, 1)
"""


@pytest.mark.parametrize("kind", ["memfd", "cuda_vmm", "cuda_ipc"])
def test_another_process_reads_a_chunk_and_writes_it_only_through_an_ipc_handle(kind: Kind) -> None:
    rig = make_rig(kind)
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    rig.device.back(0, 1, 1)
    rig.device.copy(0, CHUNK, memoryview(b"sixteen bytes 1.")).wait()
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    program = textwrap.dedent(RECEIVE) + textwrap.dedent(MAP[kind]) + textwrap.dedent(READ)
    reader = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=os.environ | {"PYTHONPATH": str(SITE)},
    )
    theirs.close()
    export = rig.device.export(0, 1)
    if export.fd is None:
        assert export.handle is not None
        ours.sendmsg([export.handle])
    else:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [export.fd]))
        ours.sendmsg([b"x"], [rights])
        os.close(export.fd)
    assert ours.recv(16) == b"sixteen bytes 1."
    rig.device.copy(0, CHUNK, memoryview(b"sixteen bytes 2.")).wait()
    ours.sendall(b"x")
    assert ours.recv(16) == b"sixteen bytes 2."
    if kind != "cuda_ipc":  # freed here, it lives on there
        rig.device.free(0, 1, 1)
        assert rig.device.backed_bytes == 0
    ours.sendall(b"x")
    assert reader.wait(20) == (0 if kind == "cuda_ipc" else -signal.SIGSEGV)
    ours.close()
    rig.device.close()
    assert rig.driver.live() == {}
