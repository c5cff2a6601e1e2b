"""The kinds of GPU memory: which class shows it, and what of CUDA that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_client.errors import ProtocolBroken

if TYPE_CHECKING:
    import torch

    from tierd_client.gpu.chunk_map import ChunkMemory

MEMFD, VMM, IPC = "memfd", "cuda_vmm", "cuda_ipc"
CUDA_KINDS = (VMM, IPC)


def make_memory(
    kind: str, nbytes: int, chunk_bytes: int, device: torch.device, what: str
) -> ChunkMemory:
    """Addresses for an arena of `nbytes`. Raises DeviceFailed, OSError, ProtocolBroken for a kind
    that nobody knows."""
    if kind == MEMFD:
        from tierd_client.gpu.memfd_memory import MemfdMemory

        return MemfdMemory(nbytes, chunk_bytes, what)
    if kind == VMM:
        from tierd_client.gpu.cuda_driver import CudaDriver
        from tierd_client.gpu.vmm_memory import VmmMemory

        return VmmMemory(nbytes, chunk_bytes, device, CudaDriver.load(device.index), what)
    if kind == IPC:
        from tierd_client.gpu.ipc_memory import IpcMemory, load_runtime

        return IpcMemory(nbytes, device, load_runtime(), what)
    raise ProtocolBroken(f"{what} is of kind {kind!r}: known are {MEMFD}, {VMM} and {IPC}")
