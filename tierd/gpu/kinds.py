"""Which device is which: the one place where a kind that an operator chose becomes an object."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.gpu.cuda_ipc import CudaIpcDevice
from tierd.gpu.cuda_vmm import CudaVmmDevice
from tierd.gpu.memfd_device import MemfdDevice

if TYPE_CHECKING:
    from tierd.gpu.device import Device, Kind
    from tierd.gpu.registration import HostMemory

KINDS: tuple[Kind, ...] = ("cuda_vmm", "cuda_ipc", "memfd")


def make_device(
    kind: Kind,
    number: int,
    chunk_bytes: int,
    budget_bytes: int,
    *,
    copy_bandwidth: int | None = None,
    copy_latency_us: int = 0,
    host: HostMemory | None = None,
    direct: bool = False,
) -> Device:
    """A device that is not open: no GPU library is loaded yet.

    copy_bandwidth (bytes per second), copy_latency_us: of `memfd` alone, else ValueError.
    host: what of the DRAM arenas is registered, one for all GPUs. direct: SSDs are to write into
    its memory.
    """
    if kind == "memfd":
        return MemfdDevice(
            number, chunk_bytes, budget_bytes,
            copy_bandwidth=copy_bandwidth, copy_latency_us=copy_latency_us, host=host,
        )  # fmt: skip
    if copy_bandwidth is not None or copy_latency_us:
        raise ValueError(f"the copies of {kind} are as fast as the GPU makes them")
    if kind == "cuda_vmm":
        return CudaVmmDevice(number, chunk_bytes, budget_bytes, host=host, direct=direct)
    return CudaIpcDevice(number, chunk_bytes, budget_bytes, host=host, direct=direct)
