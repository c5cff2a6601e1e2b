"""What torch_expand makes of a matrix, and what the reference says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from tierd_kernels import PackedMatrix, reference, torch_expand
from tierd_kernels.geometry import ELEMENT
from tierd_kernels.torch_expand import TILE_BYTES
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix

NAMES = list(DTYPES)
ROOMS = st.sampled_from([1, 5 * TILE_BYTES, 1 << 30])  #: bytes for temporaries


def specified(matrix: PackedMatrix) -> Any:
    """What the reference says. Raises KernelError."""
    out: Any = np.empty((matrix.rows, matrix.cols), ELEMENT[matrix.dtype])
    reference.expand(matrix, out, 0, -(-matrix.rows // 64), 1)
    return out


def dirty(matrix: TorchMatrix | PackedMatrix, device: torch.device, rows: int) -> torch.Tensor:
    """An output that nothing has written to yet."""
    return torch.full((rows, matrix.cols), 7.0, dtype=DTYPES[matrix.dtype], device=device)


def expanded(matrix: TorchMatrix, **options: Any) -> Any:
    """The bits that the expansion writes."""
    out = dirty(matrix, matrix.device, matrix.rows)
    torch_expand.expand(matrix, out, **options)
    return bits_of(out)


def bits_of(out: torch.Tensor) -> Any:
    return out.cpu().view(torch.uint16 if out.itemsize == 2 else torch.uint32).numpy()


WRONG_ESCAPES: list[tuple[list[int], list[int]]] = [
    ([3, 3], [0, 0]),
    ([5, 4], [0, 0]),
    ([64], [0]),
    ([0xFFFF], [0]),
    ([1, 2, 0], [0, 0, 0]),
    ([7], [1]),
]
"""Elements and pads of escapes that do not ascend within the 64 elements of the tile below."""


def tile_of_escapes(ordinals: list[int], pads: list[int]) -> PackedMatrix:
    """A tile of 64 elements in exponent 127, with these escapes."""
    escapes = b"".join(
        bytes([number & 255, number >> 8, 9, pad])
        for number, pad in zip(ordinals, pads, strict=True)
    )
    record = bytes(64) + escapes
    record += bytes(-len(record) % 16)
    return PackedMatrix(
        "exponent-packed",
        "BF16",
        1,
        64,
        None,
        np.array([0, len(record) // 16], np.uint32),
        np.frombuffer(record, np.uint8).copy(),
        heads=np.array([127 | len(ordinals) << 16], np.uint32),
    )
