"""Wrong contents are a fault of the expansion in torch, and stay in their tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.torch_expansions import (
    NAMES,
    ROOMS,
    WRONG_ESCAPES,
    bits_of,
    dirty,
    expanded,
    specified,
    tile_of_escapes,
)
from tierd_kernels import KernelError, PackedMatrix, torch_expand
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults
from tierd_kernels.torch_matrix import from_arrays, measured

if TYPE_CHECKING:
    import torch

Matrices = Callable[..., PackedMatrix]
Form = tuple[str, bool]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(NAMES), measure=st.booleans(), room_bytes=ROOMS)
def test_a_flipped_bit_is_a_fault_where_the_reference_raises_and_stays_in_its_tile(
    device: torch.device,
    random_packed: Matrices,
    form: Form,
    data: st.DataObject,
    dtype: str,
    measure: bool,
    room_bytes: int,
) -> None:
    """On the CPU torch itself refuses a place outside an array, by IndexError or RuntimeError."""
    good = random_packed(data.draw(st.integers(0, 99)), 130, 200, dtype, form)
    before = specified(good)
    # The order of scales that are no numbers is anybody's: validate refuses them.
    names = [name for name in good.arrays() if name != "scales"]
    name = data.draw(st.sampled_from(names))
    array = good.arrays()[name].copy()
    octets = array.view(np.uint8)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, octets.size - 1))
        octets[at] ^= 1 << data.draw(st.integers(0, 7))
    changed: dict[str, Any] = {name: array}
    bad = replace(good, **changed)
    there = from_arrays(bad, device)
    if measure:
        there = measured(there)
    cell, out = new_faults(device), dirty(bad, device, 130)
    torch_expand.expand(there, out, faults=cell, room_bytes=room_bytes)
    try:
        wanted = specified(bad)
    except KernelError:
        first = int(cell)
        assert first != NO_FAULT
        with pytest.raises(KernelError, match=fault_text(first)):
            torch_expand.expand(there, dirty(bad, device, 130))
    else:
        assert int(cell) == NO_FAULT
        np.testing.assert_array_equal(bits_of(out), wanted)
        return
    after = bits_of(out)
    for tile_row in range(3):
        for tile_col in range(4):
            place = np.s_[tile_row * 64 : (tile_row + 1) * 64, tile_col * 64 : (tile_col + 1) * 64]
            tile = tile_row * 4 + tile_col
            if name == "offsets":
                reached = {tile, tile + 1}
                untouched = all(good.offsets[i] == bad.offsets[i] for i in reached)
            else:
                untouched = not touched(good, bad, name, tile)
            if untouched:
                np.testing.assert_array_equal(after[place], before[place], err_msg=f"tile {tile}")


def touched(good: PackedMatrix, bad: PackedMatrix, name: str, tile: int) -> bool:
    """Whether the part of an array that belongs to a tile differs."""
    old, new = (matrix.arrays()[name].view(np.uint8) for matrix in (good, bad))
    if name == "values":
        begin, end = (int(good.offsets[i]) * 16 for i in (tile, tile + 1))
    else:
        size = 512 if name == "bitmap" else 4
        begin, end = tile * size, (tile + 1) * size
    return bool((old[begin:end] != new[begin:end]).any())


@pytest.mark.parametrize(("ordinals", "pads"), WRONG_ESCAPES)
def test_escapes_that_do_not_ascend_within_the_elements_are_a_fault(
    device: torch.device, ordinals: list[int], pads: list[int]
) -> None:
    matrix = tile_of_escapes(ordinals, pads)
    with pytest.raises(KernelError, match="tile 0: escapes do not ascend"):
        specified(matrix)
    there = from_arrays(matrix, device)
    for each in (there, measured(there)):
        with pytest.raises(KernelError, match="tile 0: escapes do not ascend"):
            expanded(each)
    cell, out = new_faults(device), dirty(matrix, device, 1)
    torch_expand.expand(there, out, faults=cell)
    assert not out.any(), "a wrong tile is zeros"


def test_escapes_that_ascend_are_none(device: torch.device) -> None:
    matrix = tile_of_escapes([0, 63], [0, 0])
    np.testing.assert_array_equal(expanded(from_arrays(matrix, device)), specified(matrix))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"heads": {5: 0}}, "tile 5: "),
        ({"heads": {5: 9 << 8}}, "tile 5: its head cannot be"),
        ({"heads": {5: 250 | 3 << 8}}, "tile 5: its head cannot be"),
        ({"heads": {5: 0xFFFF << 16}}, "tile 5: its head cannot be"),
        ({"offsets": {0: 1}}, "tile 0: offsets do not fit"),
        ({"offsets": {5: 0xFFFFFFFF}}, "tile 4: offsets do not fit"),
        ({"offsets": {12: 0}}, "tile 11: offsets do not fit"),
        ({"bitmap": {8 * 64 + 2: 1}}, "tile 8: bitmap has bits outside"),
        ({"bitmap": {3 * 64: 1 << 8}}, "tile 3: bitmap has bits outside"),
    ],
)
def test_the_first_wrong_tile_is_named_with_its_reason(
    device: torch.device,
    random_weights: Callable[..., Any],
    pack: Matrices,
    changes: Any,
    text: str,
) -> None:
    """130 rows and 200 columns: 12 tiles, of which 3, 7 and 8 to 11 are edges."""
    good = pack(random_weights(1, 130, 200, "BF16"), "BF16", ("exponent-packed", True))
    arrays: dict[str, Any] = {name: array.copy() for name, array in good.arrays().items()}
    for name, elements in changes.items():
        for at, value in elements.items():
            arrays[name][at] = arrays[name][at] | value if name == "bitmap" else value
    there = from_arrays(replace(good, **arrays), device)
    with pytest.raises(KernelError, match=text):
        expanded(there)


def test_records_behind_the_end_of_values_are_zeros(
    device: torch.device, random_packed: Matrices, form: Form
) -> None:
    good = random_packed(0, 130, 200, "BF16", form, 0.9)
    offsets = good.offsets.copy()
    offsets[5:] += offsets[-1]
    cell, out = new_faults(device), dirty(good, device, 130)
    torch_expand.expand(from_arrays(replace(good, offsets=offsets), device), out, faults=cell)
    assert fault_text(int(cell)) == "tile 4: offsets do not fit its record"
    assert not out[64:128].any()
    assert not out[128:].any()


def test_records_that_do_not_begin_at_0_are_a_fault(
    device: torch.device, random_packed: Matrices
) -> None:
    good = random_packed(0, 130, 200, "BF16", ("int8", False))
    values = np.concatenate([np.zeros(16, np.uint8), good.values])
    moved = replace(good, offsets=good.offsets + np.uint32(1), values=values)
    with pytest.raises(KernelError, match="tile 0: offsets do not fit its record"):
        expanded(from_arrays(moved, device))
