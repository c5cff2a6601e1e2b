"""What a fused product is given, what it must be, and how far from that it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tierd_kernels import PackedMatrix, reference
from tierd_kernels.torch_matrix import DTYPES


def numbers(bits: Any, dtype: str, device: torch.device) -> torch.Tensor:
    """A tensor of `dtype` from its bits."""
    return torch.from_numpy(bits.view(np.int16)).view(DTYPES[dtype]).to(device)


def exact(matrix: PackedMatrix, x: torch.Tensor) -> Any:
    return x.double().cpu().numpy() @ reference.weights(matrix).T


def error(ours: torch.Tensor, exactly: Any) -> float:
    """RMS of the error relative to the RMS of the exact product."""
    difference = ours.double().cpu().numpy() - exactly
    return float(np.sqrt(np.mean(difference**2) / np.mean(exactly**2)))


def single(rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """A float32 output that nothing has written to."""
    return torch.full((tokens, rows), torch.nan, device=device)
