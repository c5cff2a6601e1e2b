"""A real round trip over one kind of device: a process that owns memory, another that reads it.

python -m tierd_tools.doctor.round_trip KIND NUMBER prints one JSON line. It does what the daemon
does: opens the device, takes two chunks, registers host memory, copies across the border between
the chunks, and exports both to a second process (`second_process`), which reads what was copied.
Both are processes of their own, because CUDA may hang or end whoever calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from tierd.gpu.errors import DeviceUnavailable, GpuError
from tierd.gpu.kinds import make_device
from tierd_tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Literal

    from tierd.gpu.device import Device

    Kind = Literal["cuda_vmm", "cuda_ipc", "memfd"]

CHUNK_BYTES = 2 << 20
CHUNKS = 2
ARENA = 1
#: What is copied, and where to: it ends in the second chunk.
OFFSET, NBYTES = CHUNK_BYTES // 2, CHUNK_BYTES
LONGEST_SECONDS = 90.0
_SECOND = "tierd_tools.doctor.second_process"


def finding(kind: Kind, number: int, *, needed: bool) -> Finding:
    """Runs it in another process."""
    name = kind if kind == "memfd" else f"{kind} on GPU {number}"
    command = [sys.executable, "-m", "tierd_tools.doctor.round_trip", kind, str(number)]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(
            name, "does not work", f"no answer within {LONGEST_SECONDS:g} s",
            "nvidia-smi says whether the GPU answers at all", needed,
        )  # fmt: skip
    seconds = time.monotonic() - begin
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Finding(
            name, "does not work", f"the trial process ended with {done.returncode}: {said}",
            f"run `{' '.join(command[1:])}` with {sys.executable} for the whole text", needed,
        )  # fmt: skip
    said = json.loads(lines[-1])
    text = said["text"] + (f", {seconds:.1f} s in all" if said["works"] else "")
    return Finding(
        name, "works" if said["works"] else "does not work", text, said["advice"], needed
    )


def try_out(kind: Kind, number: int) -> dict[str, Any]:
    """{works, text, advice}."""
    device = make_device(kind, number, CHUNK_BYTES, CHUNKS * CHUNK_BYTES)
    try:
        text = _round_trip(device)
        return {"works": True, "text": text, "advice": ""}
    except DeviceUnavailable as error:
        return {"works": False, "text": error.reason, "advice": error.advice}
    except (GpuError, OSError, ValueError) as error:
        return {"works": False, "text": str(error), "advice": "see the text; nvidia-smi"}
    finally:
        device.close()


def _round_trip(device: Device) -> str:
    info = device.open()
    device.add_arena(ARENA, device.span_bytes(CHUNKS * CHUNK_BYTES))
    device.back(ARENA, 0, CHUNKS)
    with _pattern() as (memory, address):
        begin = time.monotonic()
        device.register(address, NBYTES)
        registered = time.monotonic()
        device.copy(ARENA, OFFSET, memoryview(memory)[:NBYTES]).wait()
        copied = time.monotonic()
        device.unregister(address, NBYTES)
        expected = hashlib.sha256(memory).hexdigest()
    reply = _second_process(device, info.uuid)
    if "error" in reply:
        raise OSError(f"the second process cannot read it: {reply['error']}")
    if reply["digest"] != expected:
        raise OSError("the second process reads other bytes than were copied")
    freed = ""
    if device.elastic:
        device.free(ARENA, 0, CHUNKS)
        freed = f", {device.backed_bytes} bytes kept after giving back"
    return (
        f"{info.name}, driver {info.driver}: {NBYTES >> 20} MiB copied over the border of two "
        f"chunks were read in another process ({reply['write']}); registered in "
        f"{1e3 * (registered - begin):.1f} ms, copied in {1e3 * (copied - registered):.1f} ms"
        f"{freed}"
    )


@contextlib.contextmanager
def _pattern() -> Iterator[tuple[mmap.mmap, int]]:
    """Random bytes in host memory, and their address."""
    with mmap.mmap(-1, NBYTES) as memory:
        memory[:] = os.urandom(NBYTES)
        anchor = ctypes.c_char.from_buffer(memory)
        try:
            yield memory, ctypes.addressof(anchor)
        finally:
            del anchor


def _second_process(device: Device, uuid: str) -> dict[str, Any]:
    """Hands the chunks to another process, and returns what that says."""
    chunks = range(CHUNKS) if device.elastic else range(1)
    exports = [device.export(ARENA, chunk) for chunk in chunks]
    fds = [export.fd for export in exports if export.fd is not None]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        message = {
            "kind": device.kind, "number": device.number, "uuid": uuid,
            "chunk_bytes": exports[0].nbytes, "offset": OFFSET, "nbytes": NBYTES,
            "handles": [export.handle.hex() for export in exports if export.handle is not None],
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", _SECOND, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        try:
            ours.settimeout(LONGEST_SECONDS * 2 / 3)
            socket.send_fds(ours, [json.dumps(message).encode()], fds)
            said = ours.recv(1 << 16)
        finally:
            for fd in fds:
                os.close(fd)
            ours.close()
            _end(process)
    if not said:
        raise OSError(f"the second process ended with {process.returncode} and said nothing")
    reply: dict[str, Any] = json.loads(said)
    return reply


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    kind, number = sys.argv[1], int(sys.argv[2])
    assert kind in ("cuda_vmm", "cuda_ipc", "memfd")
    print(json.dumps(try_out(kind, number)))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
