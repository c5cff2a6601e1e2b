"""Packed matrices whose arrays are not what an encoder wrote, as Hypothesis draws them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tierd_layouts.packed_matrix import PackedMatrix


def with_flipped_bits(matrix: PackedMatrix, data: st.DataObject) -> PackedMatrix:
    """One to three bits flipped, in any array."""
    arrays: dict[str, Any] = {name: array.copy() for name, array in matrix.arrays().items()}
    for _ in range(data.draw(st.integers(1, 3))):
        raw = arrays[data.draw(st.sampled_from(sorted(arrays)))].view(np.uint8)
        raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return replace(matrix, **arrays)


def with_noise(matrix: PackedMatrix, names: list[str], data: st.DataObject) -> PackedMatrix:
    """One of the named arrays filled with anything."""
    name = data.draw(st.sampled_from(names))
    array = matrix.arrays()[name]
    seed = data.draw(st.integers(0, 2**32 - 1))
    noise = np.random.default_rng(seed).integers(0, 255, array.nbytes, np.uint8).view(array.dtype)
    changes: dict[str, Any] = {name: noise}
    return replace(matrix, **changes)
