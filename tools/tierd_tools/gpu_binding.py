"""What keeps a kernel from being faster: bytes that it moves, or what it takes of the processor.

Bytes over the time of a copy in the same run is the floor of any kernel that moves them. What is
far from it, is bound by instructions or by how few programs run at once: registers, shared memory
and occupancy say which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from tierd_tools.gpu_launches import WARPS, Launches

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_tools.gpu_launches import Launched
    from tierd_tools.gpu_matrices import KernelGround

AT_THE_FLOOR: Final = 0.85
"""Of the bandwidth of a copy: who is above it has nothing to gain but by fewer bytes."""


@dataclass(frozen=True, slots=True)
class Binding:
    """most_warps: of a multiprocessor; 0 where no GPU runs the kernels."""

    kernels: tuple[Launched, ...]
    most_warps: int

    def text(self, nbytes: int, seconds: float, rate: float, whose: str = "a copy moves") -> str:
        """nbytes: that one call has to move, in so many seconds. rate: bytes per second of who does
        nothing but move bytes."""
        share = nbytes / seconds / rate
        by = "bytes" if share >= AT_THE_FLOOR else "instructions or too few programs at once"
        lines = [
            f"{by}: {nbytes / 1e6:.1f} MB in {seconds * 1e6:.1f} us, {share:.0%} of what {whose}"
        ]
        if not self.most_warps:
            lines.append("no kernel was compiled: an interpreter ran")
        lines += [kernel.text(self.most_warps) for kernel in self.kernels]
        return "; ".join(lines)


_watch: Launches | None = None


def watch(here: KernelGround) -> None:
    """Before any kernel is loaded: Triton says once what a kernel takes."""
    global _watch
    if here.device.type == "cuda" and _watch is None:
        _watch = Launches()


def bound_by(here: KernelGround, call: Callable[[], object]) -> Binding:
    """Runs the call, and sees which kernels it launches."""
    watch(here)
    if _watch is None:
        call()
        return Binding((), 0)
    major, minor = torch.cuda.get_device_capability(here.device)
    return Binding(tuple(_watch.of(call)), WARPS.get(10 * major + minor, 64))
