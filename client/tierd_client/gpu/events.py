"""Marks in a CUDA stream: what a thread gave its GPU to do is done when the mark has passed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class CudaFence:
    """An event in the current stream of the calling thread. Recording it waits for nothing."""

    __slots__ = ("_event",)

    def __init__(self, device: torch.device) -> None:
        import torch

        make: Any = torch.cuda.Event
        self._event = make()
        self._event.record(torch.cuda.current_stream(device))

    def passed(self) -> bool:
        """Whether the GPU is through with it."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Wait until it is; other threads go on."""
        self._event.synchronize()


class DeviceFence:
    """Behind all that this process gave a GPU, in whichever stream. CUDA has no mark for that, so
    who asks waits for the GPU; until somebody does it costs nothing."""

    __slots__ = ("_device", "_passed")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._passed = False

    def passed(self) -> bool:
        """True, after a wait for the GPU."""
        self.wait()
        return True

    def wait(self) -> None:
        """Wait until the GPU has done all that it was given."""
        import torch

        if not self._passed:
            torch.cuda.synchronize(self._device)
            self._passed = True
