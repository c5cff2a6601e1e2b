"""The expansion in torch is the reference's, on every device; wrong contents stay in their tile."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tierd_kernels import KernelError, PackedMatrix, reference, torch_expand
from tierd_kernels.geometry import ELEMENT
from tierd_kernels.torch_expand import NO_FAULT, TILE_BYTES, fault_text, new_faults
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix, from_arrays, measured

Matrices = Callable[..., PackedMatrix]
Form = tuple[str, bool]

LENGTHS = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 129, 320]), st.integers(0, 330))
ROOMS = st.sampled_from([1, 5 * TILE_BYTES, 1 << 30])
NAMES = list(DTYPES)


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
            ],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


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


# ------------------------------------------------------------------------------------------ equal


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=LENGTHS,
    cols=LENGTHS,
    dtype=st.sampled_from(NAMES),
    density=st.sampled_from([0.01, 0.5, 0.9]),
    group=st.sampled_from([64, 128, 256, 2**40]),
    room_bytes=ROOMS,
    measure=st.booleans(),
)
def test_any_content_gives_what_the_reference_says(
    device: torch.device,
    random_packed: Matrices,
    form: Form,
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    density: float,
    group: int,
    room_bytes: int,
    measure: bool,
) -> None:
    matrix = random_packed(seed, rows, cols, dtype, form, density, group=group)
    there = from_arrays(matrix, device)
    there = measured(there) if measure else there
    np.testing.assert_array_equal(expanded(there, room_bytes=room_bytes), specified(matrix))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=LENGTHS,
    cols=LENGTHS,
    dtype=st.sampled_from(NAMES),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_what_was_packed_without_loss_comes_back_bit_for_bit(
    device: torch.device,
    random_bits: Callable[..., Any],
    pack: Matrices,
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    density: float,
) -> None:
    bits = random_bits(seed, rows, cols, dtype, density)
    for form in (("raw", True), ("exponent-packed", True), ("exponent-packed", False)):
        there = from_arrays(pack(bits, dtype, form), device)
        np.testing.assert_array_equal(expanded(measured(there)), bits)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), rows=st.integers(1, 400), dtype=st.sampled_from(NAMES), room_bytes=ROOMS)
def test_a_range_of_tile_rows_is_that_part_of_the_whole(
    device: torch.device,
    random_packed: Matrices,
    form: Form,
    data: st.DataObject,
    rows: int,
    dtype: str,
    room_bytes: int,
) -> None:
    matrix = random_packed(rows, rows, 150, dtype, form)
    first = data.draw(st.integers(0, -(-rows // 64)))
    end = data.draw(st.integers(first, -(-rows // 64)))
    part = specified(matrix)[first * 64 : end * 64]
    out = dirty(matrix, device, len(part))
    there = from_arrays(matrix, device)
    torch_expand.expand(there, out, tile_rows=(first, end), room_bytes=room_bytes)
    np.testing.assert_array_equal(bits_of(out), part)


def test_a_level_times_its_scale_is_rounded_once_to_the_nearest_of_two_to_the_even(
    device: torch.device,
) -> None:
    """By hand: 96 * 129/128 and 96 * 131/128 lie halfway between two bf16."""
    levels = np.zeros((64, 64), np.int8)
    levels[:2, :2] = [96, -96]
    scales = np.zeros(64, np.uint16)
    scales[:2] = 0x3F81, 0x3F83
    offsets = np.array([0, 256], np.uint32)
    values = levels.view(np.uint8).reshape(-1)
    matrix = PackedMatrix("int8", "BF16", 64, 64, None, offsets, values, scales=scales, group=64)
    out = dirty(matrix, device, 64)
    torch_expand.expand(from_arrays(matrix, device), out)
    assert out[:2, :2].tolist() == [[97, -97], [98, -98]]


def test_subnormal_weights_are_not_flushed(device: torch.device) -> None:
    levels = np.zeros((64, 64), np.int8)
    levels[0] = np.arange(-32, 32)
    offsets = np.array([0, 256], np.uint32)
    values = levels.view(np.uint8).reshape(-1)
    scales = np.full(64, 1, np.uint16)  # 2^-133
    for dtype in NAMES:
        matrix = PackedMatrix("int8", dtype, 64, 64, None, offsets, values, scales=scales, group=64)
        np.testing.assert_array_equal(
            expanded(from_arrays(matrix, device)), specified(matrix), err_msg=dtype
        )


def test_it_writes_to_a_parameter_and_records_no_gradient(
    device: torch.device, random_packed: Matrices
) -> None:
    matrix = random_packed(3, 70, 70, "BF16", ("exponent-packed", True))
    out = dirty(matrix, device, 70).requires_grad_()
    torch_expand.expand(from_arrays(matrix, device), out)
    assert out.is_leaf
    np.testing.assert_array_equal(bits_of(out.detach()), specified(matrix))


def test_a_cell_and_an_output_outlive_inference_mode(
    device: torch.device, random_packed: Matrices
) -> None:
    matrix = random_packed(3, 70, 70, "BF16", ("raw", True))
    there, out = from_arrays(matrix, device), dirty(matrix, device, 70)
    with torch.inference_mode():
        cell = new_faults(device)
        torch_expand.expand(there, out, faults=cell)
    torch_expand.expand(there, out, faults=cell)
    assert int(cell) == NO_FAULT
    np.testing.assert_array_equal(bits_of(out), specified(matrix))


# -------------------------------------------------------------------------------------- hostile


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


@pytest.mark.parametrize(
    ("ordinals", "pads"),
    [
        ([3, 3], [0, 0]),
        ([5, 4], [0, 0]),
        ([64], [0]),
        ([0xFFFF], [0]),
        ([1, 2, 0], [0, 0, 0]),
        ([7], [1]),
    ],
)
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


def test_more_planes_or_escapes_than_were_measured_are_a_fault_and_not_read(
    device: torch.device, random_packed: Matrices
) -> None:
    matrix = random_packed(2, 130, 200, "BF16", ("exponent-packed", False))
    there = from_arrays(matrix, device)
    found = measured(there)
    assert found.most_planes > 0
    assert found.most_escapes > 0
    for less in (replace(found, most_planes=0), replace(found, most_escapes=0)):
        with pytest.raises(KernelError, match="its head cannot be"):
            expanded(less)


def test_measuring_takes_heads_that_cannot_be(device: torch.device) -> None:
    matrix = tile_of_escapes([1], [0])
    heads = np.array([0xFFFFFFFF], np.uint32)
    found = measured(from_arrays(replace(matrix, heads=heads), device))
    assert (found.most_planes, found.most_escapes) == (8, 4096)
    with pytest.raises(KernelError, match="tile 0: its head cannot be"):
        expanded(found)


# ------------------------------------------------------------------------------- arrays that fit


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: {"codec": "dense"}, "codec 'dense' is not one of raw, exponent-packed"),
        (lambda m: {"dtype": "I8"}, "dtype 'I8' is not one of BF16, F16, F32"),
        (lambda m: {"rows": -1}, r"shape \[-1, 200\] is not in 0..4294967231"),
        (lambda m: {"rows": 2**32 - 65, "cols": 2**32 - 65}, "above the limit of"),
        (lambda m: {"rows": 200}, r"bitmap has 6144 bytes, \[200, 200\] needs 8192"),
        (lambda m: {"heads": None}, "arrays bitmap, offsets, values, codec exponent-packed has"),
        (lambda m: {"scales": m.offsets}, "arrays .*scales.*, codec exponent-packed has"),
        (lambda m: {"offsets": m.offsets[:-4]}, "offsets has 48 bytes, .* needs 52"),
        (lambda m: {"values": m.values[:-1]}, "values has .* multiples of 16"),
        (lambda m: {"values": m.values.view(torch.int8)}, "values is torch.int8"),
        (lambda m: {"values": m.values.view(-1, 2)}, "uint8, one dimension, contiguous"),
        (lambda m: {"values": m.values[::2]}, "uint8, one dimension, contiguous"),
        (lambda m: {"heads": m.heads.to("meta")}, "heads is on meta, values is on "),
        (
            lambda m: {"heads": torch.cat([m.heads, m.heads])[1:49]},
            "heads does not start on a multiple of 4 bytes",
        ),
        (lambda m: {"rows": 0, "cols": 0, "bitmap": m.bitmap[:0]}, "heads has|offsets has"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(
    device: torch.device, random_packed: Matrices, change: Callable[[Any], Any], text: str
) -> None:
    there = from_arrays(random_packed(0, 130, 200, "BF16", ("exponent-packed", True)), device)
    wrong = replace(there, **change(there))
    out = torch.empty(130, 200, dtype=torch.bfloat16, device=device)
    with pytest.raises(KernelError, match=text):
        torch_expand.expand(wrong, out)


def test_a_group_that_is_no_multiple_of_a_tile_is_refused(
    device: torch.device, random_packed: Matrices
) -> None:
    there = from_arrays(random_packed(0, 130, 200, "BF16", ("int8", True)), device)
    with pytest.raises(KernelError, match="group of 63 columns is not a positive multiple of 64"):
        expanded(replace(there, group=63))


def test_values_of_a_matrix_without_tiles_are_refused(device: torch.device) -> None:
    empty = np.zeros(0, np.uint64)
    values = np.zeros(8, np.uint16)
    matrix = PackedMatrix("raw", "BF16", 0, 5, empty, np.zeros(1, np.uint32), values)
    with pytest.raises(KernelError, match=r"values has 16 bytes, \[0, 5\] has no tiles"):
        expanded(from_arrays(matrix, device))


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (lambda: torch.empty(130, 200), "out has dtype torch.float32, torch.bfloat16 is needed"),
        (lambda: torch.empty(131, 200).bfloat16(), r"out has shape \[131, 200\], tile rows 0..3"),
        (lambda: torch.empty(200, 130).bfloat16().t(), r"out has strides \[1, 130\]"),
        (lambda: torch.empty(130, 200, device="meta").bfloat16(), "out is on meta, the matrix"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(
    random_packed: Matrices, out: Callable[[], torch.Tensor], text: str
) -> None:
    there = from_arrays(random_packed(0, 130, 200, "BF16", ("raw", True)))
    with pytest.raises(KernelError, match=text):
        torch_expand.expand(there, out())


# ----------------------------------------------------------------------------------------- bounded


@pytest.mark.parametrize("dtype", NAMES)
def test_with_a_cell_no_value_is_waited_for(
    random_packed: Matrices, form: Form, dtype: str
) -> None:
    """On meta there are none, so that every attempt to look at one raises."""
    matrix = from_arrays(random_packed(1, 130, 200, dtype, form), "meta")
    out = torch.empty(130, 200, dtype=DTYPES[dtype], device="meta")
    torch_expand.expand(matrix, out, faults=new_faults("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        torch_expand.expand(matrix, out)


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made inside it have had at once; others' storages are known."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._tensors: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._made(tensor)
        self.peak = max(self.peak, self._now)
        return found

    def _made(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._now += 0 if self._tensors.get(key) else nbytes
        self._tensors[key] = self._tensors.get(key, 0) + 1
        weakref.finalize(tensor, self._gone, key, nbytes)

    def _gone(self, key: int, nbytes: int) -> None:
        self._tensors[key] -= 1
        self._now -= 0 if self._tensors[key] else nbytes


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("tiles", [1, 8, 30])
def test_temporaries_stay_within_the_room_that_was_given(
    device: torch.device, random_packed: Matrices, form: Form, dtype: str, tiles: int
) -> None:
    matrix = from_arrays(random_packed(1, 64 * 5 - 3, 64 * 6 - 1, dtype, form), device)
    out = dirty(matrix, device, matrix.rows)
    small = 64 << 10  # what belongs to no element: counts, heads, offsets
    with Peak(out, *matrix.arrays().values()) as peak:
        torch_expand.expand(matrix, out, room_bytes=tiles * TILE_BYTES)
    assert peak.peak <= tiles * TILE_BYTES + small
    if tiles == 30:
        assert peak.peak >= 30 * 4096 * 8, "the measurement measures"


def test_importing_the_kernels_imports_no_torch() -> None:
    text = "import sys, tierd_kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
