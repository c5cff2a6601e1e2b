"""Triton's expansion is the reference's; wrong contents stay in their tile, and are torch's faults.

Interpreted, a tile takes 30 ms and more; on a GPU each codec, dtype and kind of shape is compiled
for half a second: few shapes, each for a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.torch_expansions import WRONG_ESCAPES, specified, tile_of_escapes
from tierd_kernels import KernelError, PackedMatrix, torch_expand
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults
from tierd_kernels.gpu.expand import WAYS, Way, expand
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix, from_arrays, measured

Matrices = Callable[..., PackedMatrix]
Form = tuple[str, bool]


@pytest.fixture(autouse=True)
def numpy_is_quiet() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of an overflow that is an infinity."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=WAYS, ids=lambda way: f"{way.variant}-{way.warps}")
def way(request: pytest.FixtureRequest, device: torch.device) -> Way:
    chosen: Way = request.param
    if device.type == "cpu" and chosen.warps != 4:
        pytest.skip("the interpreter has no warps")
    return chosen


def dirty(matrix: TorchMatrix, rows: int) -> torch.Tensor:
    """An output that nothing has written to yet."""
    dtype = DTYPES[matrix.dtype]
    return torch.full((rows, matrix.cols), 7.0, dtype=dtype, device=matrix.device)


def bits_of(out: torch.Tensor) -> Any:
    return out.detach().cpu().view(torch.uint16 if out.itemsize == 2 else torch.uint32).numpy()


def expanded(matrix: TorchMatrix, **options: Any) -> Any:
    """The bits that the expansion writes."""
    out = dirty(matrix, matrix.rows)
    expand(matrix, out, **options)
    return bits_of(out)


# ------------------------------------------------------------------------------------------ equal


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_content_gives_what_the_reference_says(
    device: torch.device, random_packed: Matrices, form: Form, dtype: str
) -> None:
    """Empty tiles, full ones, edges on both sides, every number of planes, escapes."""
    matrix = random_packed(5, 65, 130, dtype, form)
    np.testing.assert_array_equal(expanded(from_arrays(matrix, device)), specified(matrix))


def test_every_way_gives_what_the_reference_says(
    device: torch.device, random_packed: Matrices, form: Form, way: Way
) -> None:
    matrix = random_packed(6, 64, 150, "BF16", form, 0.3)
    np.testing.assert_array_equal(expanded(from_arrays(matrix, device), way=way), specified(matrix))


def test_records_far_from_the_end_of_values_give_what_the_reference_says(
    device: torch.device, random_packed: Matrices, form: Form
) -> None:
    """There windows are read without asking where the record ends."""
    matrix = random_packed(6, 64, 704, "BF16", form, 0.9)
    assert (matrix.offsets[-1] - matrix.offsets[4]) * 16 > 8192 + 16
    np.testing.assert_array_equal(expanded(from_arrays(matrix, device)), specified(matrix))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (63, 1), (1, 63), (63, 129)])
def test_every_shape_gives_what_the_reference_says(
    device: torch.device, random_packed: Matrices, form: Form, shape: tuple[int, int]
) -> None:
    matrix = random_packed(7, *shape, "F16", form, 0.9)
    np.testing.assert_array_equal(expanded(from_arrays(matrix, device)), specified(matrix))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [("raw", True), ("exponent-packed", True)])
def test_negative_zeros_and_payloads_of_nans_come_back_bit_for_bit(
    device: torch.device,
    random_bits: Callable[..., Any],
    pack: Matrices,
    form: Form,
    dtype: str,
) -> None:
    bits = random_bits(8, 64, 72, dtype, 0.7)
    there = from_arrays(pack(bits, dtype, form), device)
    np.testing.assert_array_equal(expanded(measured(there)), bits)


@pytest.mark.parametrize("group", [64, 192, 64 * (2**31 - 1), 2**70])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_every_group_of_columns_has_its_own_scales(
    device: torch.device, random_packed: Matrices, codec: str, group: int
) -> None:
    matrix = random_packed(9, 66, 260, "BF16", (codec, False), group=group)
    there = from_arrays(matrix, device)
    out = dirty(there, 2)
    expand(there, out, tile_rows=(1, 2))
    np.testing.assert_array_equal(bits_of(out), specified(matrix)[64:])


def test_a_range_of_tile_rows_is_that_part_of_the_whole(
    device: torch.device, random_packed: Matrices
) -> None:
    matrix = random_packed(10, 200, 70, "BF16", ("exponent-packed", True))
    there, whole = from_arrays(matrix, device), specified(matrix)
    for first, end in ((0, 0), (1, 3), (3, 4), (4, 4)):
        part = whole[first * 64 : end * 64]
        out = dirty(there, len(part))
        expand(there, out, tile_rows=(first, end))
        np.testing.assert_array_equal(bits_of(out), part)


def levels_of(scales: Any, levels: Any, dtype: str) -> PackedMatrix:
    """A full tile of int8."""
    offsets = np.array([0, 256], np.uint32)
    values = levels.view(np.uint8).reshape(-1)
    return PackedMatrix("int8", dtype, 64, 64, None, offsets, values, scales=scales, group=64)


def test_a_level_times_its_scale_is_rounded_once_to_the_nearest_of_two_to_the_even(
    device: torch.device,
) -> None:
    """By hand: 96 * 129/128 and 96 * 131/128 lie halfway between two bf16."""
    levels = np.zeros((64, 64), np.int8)
    levels[:2, :2] = [96, -96]
    scales = np.zeros(64, np.uint16)
    scales[:2] = 0x3F81, 0x3F83
    there = from_arrays(levels_of(scales, levels, "BF16"), device)
    out = dirty(there, 64)
    expand(there, out)
    assert out[:2, :2].tolist() == [[97, -97], [98, -98]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_weights_are_not_flushed(device: torch.device, dtype: str) -> None:
    levels = np.zeros((64, 64), np.int8)
    levels[0] = np.arange(-32, 32)
    matrix = levels_of(np.full(64, 1, np.uint16), levels, dtype)  # 2^-133
    np.testing.assert_array_equal(expanded(from_arrays(matrix, device)), specified(matrix))


def test_it_writes_to_a_parameter_and_records_no_gradient(
    device: torch.device, random_packed: Matrices
) -> None:
    matrix = random_packed(3, 64, 64, "BF16", ("raw", True))
    there = from_arrays(matrix, device)
    out = dirty(there, 64).requires_grad_()
    expand(there, out)
    assert out.is_leaf
    np.testing.assert_array_equal(bits_of(out), specified(matrix))


# -------------------------------------------------------------------------------------- hostile


def agree(matrix: PackedMatrix, device: torch.device, *, measure: bool, **options: Any) -> int:
    """The fault that both expansions find; what they write is equal."""
    there = from_arrays(matrix, device)
    if measure:
        there = measured(there)
    cells, outs = [], []
    for expansion, its in ((expand, options), (torch_expand.expand, {})):
        cell, out = new_faults(device), dirty(there, matrix.rows)
        expansion(there, out, faults=cell, **its)
        cells.append(int(cell))
        outs.append(bits_of(out))
    assert cells[0] == cells[1]
    np.testing.assert_array_equal(*outs)
    return cells[0]


def test_flipped_bits_are_the_faults_that_torch_finds(
    device: torch.device, random_packed: Matrices, form: Form
) -> None:
    """Whose tests show that they are what the reference raises, and stay in their tiles."""
    good = random_packed(11, 64, 66, "BF16", form)
    rng = np.random.default_rng(11)
    found = set()
    # The order of scales that are no numbers is anybody's: validate refuses them.
    names = [name for name in good.arrays() if name != "scales"]
    for turn in range(6):
        changed: dict[str, Any] = {name: array.copy() for name, array in good.arrays().items()}
        octets = changed[names[turn % len(names)]].view(np.uint8)
        for _ in range(1 + turn // 3):
            octets[rng.integers(octets.size)] ^= 1 << rng.integers(8)
        way = WAYS[turn % 2]
        found.add(agree(replace(good, **changed), device, measure=turn % 2 == 0, way=way))
    assert len(found) > 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"heads": {4: 0}}, "tile 4: "),
        ({"heads": {4: 9 << 8}}, "tile 4: its head cannot be"),
        ({"heads": {4: 255 << 8}}, "tile 4: its head cannot be"),
        ({"heads": {4: 250 | 3 << 8}}, "tile 4: its head cannot be"),
        ({"heads": {4: 0xFFFF << 16}}, "tile 4: its head cannot be"),
        ({"offsets": {0: 1}}, "tile 0: offsets do not fit"),
        ({"offsets": {3: 0xFFFFFFFF}}, "tile 2: offsets do not fit"),
        ({"offsets": {6: 0}}, "tile 5: offsets do not fit"),
        ({"bitmap": {5 * 64 + 2: 1}}, "tile 5: bitmap has bits outside"),
        ({"bitmap": {2 * 64: 1 << 2}}, "tile 2: bitmap has bits outside"),
        ({"bitmap": {5 * 64 + 2: 1}, "heads": {5: 9 << 8}, "offsets": {6: 0}}, "tile 5: bitmap"),
    ],
)
def test_the_first_wrong_tile_is_named_with_its_first_reason(
    device: torch.device,
    random_weights: Callable[..., Any],
    pack: Matrices,
    changes: Any,
    text: str,
) -> None:
    """66 rows and 130 columns: 6 tiles, of which 2 to 5 are edges."""
    good = pack(random_weights(1, 66, 130, "BF16"), "BF16", ("exponent-packed", True))
    arrays: dict[str, Any] = {name: array.copy() for name, array in good.arrays().items()}
    for name, elements in changes.items():
        for at, value in elements.items():
            arrays[name][at] = arrays[name][at] | value if name == "bitmap" else value
    fault = agree(replace(good, **arrays), device, measure=True)
    assert fault_text(fault).startswith(text)


def test_without_a_cell_a_wrong_tile_is_an_error_that_names_it(
    device: torch.device, random_packed: Matrices
) -> None:
    good = random_packed(0, 64, 64, "BF16", ("int8", False))
    bad = replace(good, offsets=good.offsets + np.uint32(1))
    with pytest.raises(KernelError, match="tile 0: offsets do not fit its record"):
        expanded(from_arrays(bad, device))


def test_records_behind_the_end_of_values_are_zeros(
    device: torch.device, random_packed: Matrices, form: Form
) -> None:
    good = random_packed(0, 64, 256, "BF16", form, 0.9)
    offsets = good.offsets.copy()
    offsets[2:] += offsets[-1]
    cell, there = new_faults(device), from_arrays(replace(good, offsets=offsets), device)
    out = dirty(there, 64)
    expand(there, out, faults=cell)
    assert fault_text(int(cell)) == "tile 1: offsets do not fit its record"
    assert not out[:, 64:].any()


@pytest.mark.parametrize(("ordinals", "pads"), WRONG_ESCAPES)
def test_escapes_that_do_not_ascend_within_the_elements_are_a_fault(
    device: torch.device, ordinals: list[int], pads: list[int]
) -> None:
    there = from_arrays(tile_of_escapes(ordinals, pads), device)
    with pytest.raises(KernelError, match="tile 0: escapes do not ascend"):
        expanded(measured(there))
    cell, out = new_faults(device), dirty(there, 1)
    expand(there, out, faults=cell)
    assert int(cell) != NO_FAULT
    assert not out.any(), "a wrong tile is zeros"


@pytest.mark.parametrize("ordinals", [[0, 63], list(range(8, 24)), list(range(64))])
def test_escapes_that_ascend_are_none(device: torch.device, ordinals: list[int]) -> None:
    """A few, all of two octets, all."""
    matrix = tile_of_escapes(ordinals, [0] * len(ordinals))
    np.testing.assert_array_equal(expanded(from_arrays(matrix, device)), specified(matrix))


def test_an_escape_out_of_order_is_found_among_hundreds(device: torch.device) -> None:
    """They are compared 128 at a time, the last of each with the first of the next."""
    count = 300
    record = bytes(4096)
    escapes = np.zeros((count, 4), np.uint8)
    escapes[:, 0] = np.arange(count) % 256
    escapes[:, 1] = np.arange(count) // 256
    for wrong in (None, 127, 128, 255, 299):
        these = escapes.copy()
        if wrong is not None:
            these[wrong] = 255, 255, 0, 0
        values = np.frombuffer(record + these.tobytes() + bytes(-count * 4 % 16), np.uint8).copy()
        matrix = PackedMatrix(
            "exponent-packed",
            "BF16",
            64,
            64,
            None,
            np.array([0, values.size // 16], np.uint32),
            values,
            heads=np.array([127 | count << 16], np.uint32),
        )
        fault = agree(matrix, device, measure=False)
        assert (fault == NO_FAULT) == (wrong is None)


def test_more_planes_or_escapes_than_were_measured_are_a_fault_and_not_read(
    device: torch.device, random_packed: Matrices
) -> None:
    found = measured(
        from_arrays(random_packed(2, 64, 200, "BF16", ("exponent-packed", False)), device)
    )
    assert found.most_planes > 0
    assert found.most_escapes > 0
    for less in (replace(found, most_planes=0), replace(found, most_escapes=0)):
        with pytest.raises(KernelError, match="its head cannot be"):
            expanded(less)


def test_a_cell_keeps_the_first_fault_of_several_calls(
    device: torch.device, random_packed: Matrices
) -> None:
    good = random_packed(0, 64, 256, "BF16", ("int8", True), 0.9)
    cell = new_faults(device)
    for wrong in (2, 1, 3):
        bitmap = good.bitmap
        assert bitmap is not None
        bitmap = bitmap.copy()
        bitmap[wrong * 64] ^= np.uint64(0xFFFFFFFF)
        bitmap[wrong * 64] ^= np.uint64(0x7FFFFFFF00000000)
        there = from_arrays(replace(good, bitmap=bitmap), device)
        expand(there, dirty(there, 64), faults=cell)
    assert fault_text(int(cell)).startswith("tile 1: ")


# ------------------------------------------------------------------------------- arrays that fit


def test_what_does_not_fit_is_refused_by_name(
    device: torch.device, random_weights: Callable[..., Any], pack: Matrices
) -> None:
    matrix = pack(random_weights(4, 64, 64, "BF16"), "BF16")
    there = from_arrays(matrix, device)
    out = dirty(there, 64)
    with pytest.raises(KernelError, match=r"out has dtype torch.float16, torch.bfloat16 is needed"):
        expand(there, out.half())
    with pytest.raises(KernelError, match="it must be contiguous"):
        expand(there, out.T)
    with pytest.raises(KernelError, match=r"out has shape \[1, 64\]"):
        expand(there, out[:1])
    with pytest.raises(KernelError, match="none of the ways"):
        expand(there, out, way=Way("window", 3))
    with pytest.raises(KernelError, match="the matrix is on meta, Triton's kernels are not"):
        expand(from_arrays(matrix, "meta"), out)
    for name in ("bitmap", "values"):
        array = there.arrays()[name]
        moved = torch.empty(array.numel() + 2, dtype=torch.uint8, device=device)[2:]
        moved = moved.copy_(array)
        changed: dict[str, Any] = {name: moved}
        with pytest.raises(KernelError, match=f"{name} does not start on a multiple of 16 bytes"):
            expand(replace(there, **changed), out)
