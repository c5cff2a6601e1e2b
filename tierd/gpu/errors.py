"""What can go wrong with a GPU.

GpuError  TierdError                code internal
    DeviceUnavailable  OSError          tier_unavailable: this GPU cannot be used, and why
        DeviceFull         MemoryError      tier_unavailable: others have the memory just now
    DeviceError        OSError          copy_failed: one call was refused; others may go on
        OutOfDeviceMemory  MemoryError      copy_failed
        DeviceLost                          copy_failed: nothing on this GPU will work any more

Every text names the GPU, what was asked of it, and what it answered.
"""

from __future__ import annotations

from tierd.errors import TierdError


class GpuError(TierdError):
    """The base of the others."""


class DeviceUnavailable(GpuError, OSError):
    """A GPU, or a way to use it, does not work here. `advice`: what to do about it."""

    code = "tier_unavailable"

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}: {advice}")
        self.reason = reason
        self.advice = advice


class DeviceFull(DeviceUnavailable, MemoryError):
    """The budget is not free at present. Who has the memory may give it back, as clients of an
    earlier daemon do: opening the GPU may be tried again."""


class DeviceError(GpuError, OSError):
    """The driver refused a call. Names the call, its code, and the sizes asked for."""

    code = "copy_failed"


class OutOfDeviceMemory(DeviceError, MemoryError):
    """The GPU has no memory left for a chunk. Names what was needed and what is free."""


class DeviceLost(DeviceError):
    """The context is broken: every later call fails too, until the daemon starts again."""
