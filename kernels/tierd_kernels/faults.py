"""What a kernel on a device finds wrong with tiles: one number, which nobody needs to wait for."""

from __future__ import annotations

from typing import Final

import torch

NO_FAULT: Final = 2**63 - 1

REASONS: Final = (
    "bitmap has bits outside the matrix",
    "its head cannot be",
    "offsets do not fit its record",
    "escapes do not ascend within its elements",
)
BITS, HEAD, OFFSETS, ESCAPES = range(len(REASONS))


def new_faults(device: torch.device | str) -> torch.Tensor:
    """A cell for a kernel: int64 [1], NO_FAULT until a wrong tile is met, then of the first one."""
    with torch.inference_mode(False):
        return torch.full((1,), NO_FAULT, dtype=torch.int64, device=device)


def fault_text(fault: int) -> str:
    """What a cell's value, other than NO_FAULT, says."""
    tile, reason = divmod(fault, len(REASONS))
    return f"tile {tile}: {REASONS[reason]}"
