"""The expansion in torch is the reference's, on every device, within the room that it was given."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.torch_expansions import NAMES, ROOMS, bits_of, dirty, expanded, specified
from tierd_kernels import KernelError, PackedMatrix, torch_expand
from tierd_kernels.faults import NO_FAULT, new_faults
from tierd_kernels.torch_expand import TILE_BYTES
from tierd_kernels.torch_matrix import DTYPES, from_arrays, measured

Matrices = Callable[..., PackedMatrix]
Form = tuple[str, bool]

LENGTHS = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 128, 129, 320]), st.integers(0, 330))


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
