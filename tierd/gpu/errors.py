"""What can go wrong with a GPU.

GpuError  TierdError                code internal
    DeviceUnavailable  OSError          tier_unavailable: this GPU cannot be used, and why
        DeviceFull         MemoryError      tier_unavailable: others have the memory just now
    DeviceError        OSError          copy_failed: one call was refused; others may go on
        OutOfDeviceMemory  MemoryError      copy_failed
        DeviceLost                          copy_failed: nothing on this GPU will work any more
    SourceFailed       OSError          the code of the read that failed
    CopyStopped        RuntimeError     copy_failed: who wanted it did not wait for the end

Every text names the GPU, what was asked of it, and what it answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.errors import TierdError

if TYPE_CHECKING:
    from tierd.errors import ReadError


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


class SourceFailed(GpuError, OSError):
    """What was to be copied could not be read. Has the code and the text of that failure."""

    def __init__(self, failure: ReadError) -> None:
        super().__init__(failure.text)
        self.failure = failure


class CopyStopped(GpuError, RuntimeError):
    """Nobody wants a copy any more; a part of it may be on the GPU."""

    code = "copy_failed"
