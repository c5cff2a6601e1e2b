"""What keeps a kernel from being faster: the bytes that it moves, its instructions, or neither.

Two floors. Bytes over the rate of who does nothing but move bytes, in the same run; and the issue
slots of its tiles, as they were counted in the compiled code (tests/kernels/gpu/resources.json),
over those of the card. What is far from both waits: for loads, with too few programs at once.
Registers, shared memory and occupancy say why these are few.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from tierd_tools.gpu_launches import WARPS, Launches

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_kernels.torch_matrix import TorchMatrix
    from tierd_tools.gpu_launches import Launched
    from tierd_tools.gpu_matrices import KernelGround

RECORDS: Final = Path("tests/kernels/gpu/resources.json")
AT_THE_FLOOR: Final = 0.8
SLOTS: Final = 4
"""A multiprocessor's schedulers issue one instruction each in a cycle."""


@dataclass(frozen=True, slots=True)
class Binding:
    """most_warps: of a multiprocessor, 0 where no GPU runs the kernels. slots_per_s: of the card.
    slots: of one call, None where they were not counted."""

    kernels: tuple[Launched, ...]
    most_warps: int = 0
    slots_per_s: float = 0.0
    slots: int | None = None

    def text(self, nbytes: int, seconds: float, rate: float, whose: str = "a copy moves") -> str:
        """nbytes: that one call has to move, in so many seconds. rate: bytes per second of who does
        nothing but move bytes."""
        moving = nbytes / seconds / rate
        said = [f"{nbytes / 1e6:.1f} MB in {seconds * 1e6:.1f} us, {moving:.0%} of what {whose}"]
        issuing = 0.0
        if not self.most_warps:
            said.append("no kernel was compiled: an interpreter ran")
        elif self.slots is None:
            said.append("issue slots were not counted for this kernel on this card")
        else:
            issuing = self.slots / self.slots_per_s / seconds
            said.append(
                f"{self.slots / 1e6:.1f} M issue slots, {issuing:.0%} of the card's in that time"
            )
        said += [kernel.text(self.most_warps) for kernel in self.kernels]
        most, by = max((moving, "bytes"), (issuing, "instructions"))
        return f"{by if most >= AT_THE_FLOOR else 'waiting'}: {'; '.join(said)}"


_watch: Launches | None = None


def watch(here: KernelGround) -> Launches | None:
    """Before any kernel is loaded: Triton says once what a kernel takes. None: no GPU."""
    global _watch
    if here.device.type == "cuda" and _watch is None:
        _watch = Launches()
    return _watch


def bound_by(
    here: KernelGround, call: Callable[[], object], matrix: TorchMatrix, how: Any
) -> Binding:
    """Runs the call, and sees which kernels it launches. how: the way or the plan with which it
    goes once through the matrix."""
    launches = watch(here)
    if launches is None:
        call()
        return Binding(())
    major, minor = torch.cuda.get_device_capability(here.device)
    properties: Any = torch.cuda.get_device_properties(here.device)
    hertz = launches.clock_hertz(here.device.index or 0)
    return Binding(
        tuple(launches.of(call)),
        WARPS.get(10 * major + minor, 64),
        SLOTS * properties.multi_processor_count * hertz,
        counted(matrix, how, 10 * major + minor),
    )


def counted(matrix: TorchMatrix, how: Any, architecture: int) -> int | None:
    """Issue slots of the tiles of a matrix, by the records; None where there is none for it."""
    from tierd_kernels.gpu.compiled import Kernel

    masked = matrix.bitmap is not None
    name = Kernel(matrix.codec, masked, matrix.dtype, how, architecture).name
    try:
        records = json.loads(RECORDS.read_text())
    except OSError:
        return None
    slots: int | None = records.get(name, {}).get("issue_slots")
    return None if slots is None else slots * matrix.grid.tiles
