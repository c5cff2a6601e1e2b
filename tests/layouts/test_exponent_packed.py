"""exponent-packed against a second, slow encoder that is written straight from FORMAT.md."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.layouts.broken_arrays import with_flipped_bits, with_noise
from tierd_layouts import exponent_packed
from tierd_layouts.errors import (
    ArraySetWrong,
    BadMatrix,
    BitmapWrong,
    BitsOutsideShape,
    EscapesWrong,
    GapNotZero,
    HeadsWrong,
    OffsetsWrong,
    TileError,
    ValuesWrong,
    ZeroStored,
)

if TYPE_CHECKING:
    from tierd_layouts.packed_matrix import PackedMatrix

#: numpy arrays; not typed further, because half of the tests pass wrong ones on purpose.
Matrix = Any

SLOW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# --------------------------------------------------------------------------------------------------
# The second encoder


def slow_kept(bits: Matrix, masked: bool) -> list[list[int]]:
    """The kept elements of every tile."""
    rows, cols = bits.shape
    return [
        [
            element
            for row in range(top, min(top + 64, rows))
            for element in bits[row, left : left + 64].tolist()
            if element or not masked
        ]
        for top in range(0, rows, 64)
        for left in range(0, cols, 64)
    ]


def rotated(element: int, item: int) -> int:
    width = item * 8
    return (element << 1 | element >> (width - 1)) & ((1 << width) - 1)


def slow_record(elements: list[int], item: int, planes: int, base: int) -> tuple[int, bytes]:
    """Head and record of one tile for a given window."""
    n = len(elements)
    us = [rotated(element, item) for element in elements]
    tops = [u >> (item * 8 - 8) for u in us]
    inside = [base <= top < base + (1 << planes) for top in tops]
    codes = [top - base if fits else 0 for top, fits in zip(tops, inside, strict=True)]
    record = b""
    for b in range(item - 1):
        record += bytes(u >> 8 * b & 0xFF for u in us) + bytes(-n % 8)
    for p in range(planes):
        plane = sum((code >> p & 1) << i for i, code in enumerate(codes))
        record += plane.to_bytes(-(-n // 64) * 8, "little")
    escapes = [i for i in range(n) if not inside[i]]
    for i in escapes:
        record += i.to_bytes(2, "little") + bytes([tops[i], 0])
    return base | planes << 8 | len(escapes) << 16, record


def slow_best(elements: list[int], item: int) -> tuple[int, bytes]:
    """The smallest record, of equals with the smallest P, of these with the smallest base."""
    if not elements:
        return 0, b""
    windows = [(p, base) for p in range(9) for base in range(257 - (1 << p))]
    if len(elements) > 200:  # every window would take minutes: those with an end at some top byte
        tops = {rotated(element, item) >> (item * 8 - 8) for element in elements}
        ends = {top - (1 << p) + 1 for top in tops for p in range(9)} | tops | {0}
        windows = [(p, base) for p, base in windows if base in ends]
    sizes = {}
    tops_of = [rotated(element, item) >> (item * 8 - 8) for element in elements]
    counts = [tops_of.count(top) for top in range(256)]
    for p, base in windows:
        outside = len(elements) - sum(counts[base : base + (1 << p)])
        sizes[p, base] = p * 8 * -(-len(elements) // 64) + 4 * outside
    best = min(windows, key=lambda window: (sizes[window], window))
    return slow_record(elements, item, *best)


def check_against_the_slow_encoder(matrix: PackedMatrix, bits: Matrix) -> None:
    """Offsets, heads and values are those of the specification, and optimal."""
    heads, values, offsets = [], b"", [0]
    for elements in slow_kept(bits, matrix.masked):
        head, record = slow_best(elements, bits.itemsize)
        heads.append(head)
        values += record + bytes(-len(record) % 16)
        offsets.append(len(values) // 16)
    assert matrix.heads is not None
    assert matrix.heads.tolist() == heads
    assert matrix.offsets.tolist() == offsets
    assert matrix.values.tobytes() == values


def check_round_trip(bits: Matrix, dtype: str, masked: bool) -> PackedMatrix:
    matrix = exponent_packed.encode(bits, dtype, masked=masked)
    assert (matrix.masked, matrix.rows, matrix.cols) == (masked, *bits.shape)
    assert matrix.nnz == (np.count_nonzero(bits) if masked else bits.size)
    exponent_packed.validate(matrix, matrix.nnz)
    decoded = exponent_packed.decode(matrix)
    assert decoded.dtype == bits.dtype
    np.testing.assert_array_equal(decoded, bits)
    return matrix


def bits_of(dtype: str) -> Any:
    return np.uint32 if dtype == "F32" else np.uint16


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Matrix, str]:
    """Any bits: NaN, infinities, subnormal numbers, -0.0; empty, constant and random tiles."""
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    size = st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(126, 131))
    rows, cols = draw(size), draw(size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = np.iinfo(bits_of(dtype)).max
    bits = rng.integers(0, largest, (rows, cols), bits_of(dtype), endpoint=True)
    kind = draw(st.sampled_from(["any", "narrow", "constant", "special"]))
    if kind == "narrow":  # a few exponents, and some of all others
        exponent = np.array(0x3C, bits.dtype) << (bits.itemsize * 8 - 9)
        narrow = bits >> 6 | exponent
        bits = np.where(rng.random(bits.shape) < 0.97, narrow, bits)
    elif kind == "constant":
        bits[:] = draw(st.integers(0, int(largest)))
    elif kind == "special":
        sign = 1 << bits.itemsize * 8 - 1
        infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
        special = [0, sign, infinity, infinity | sign, infinity + 1, largest, 1, sign | 1]
        bits = rng.choice(np.array(special, bits.dtype), bits.shape)
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    bits[rng.random(bits.shape) >= density] = 0
    return bits, dtype


@SLOW
@given(matrices(), st.booleans())
def test_any_bits_come_back_and_are_stored_as_the_specification_says(
    matrix: tuple[Matrix, str], masked: bool
) -> None:
    bits, dtype = matrix
    check_against_the_slow_encoder(check_round_trip(bits, dtype, masked), bits)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1), (1, 200), (200, 1), (64, 65)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_shape_survives(shape: tuple[int, int], dtype: str, masked: bool) -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, np.iinfo(bits_of(dtype)).max, shape, bits_of(dtype))
    bits[rng.random(shape) < 0.3] = 0
    check_round_trip(bits, dtype, masked)


@pytest.mark.parametrize("shape", [(64 * 3, 64 * 400), (65, 64 * 513 + 1)])
def test_matrices_of_several_pieces_survive(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 0xFFFF, shape, np.uint16) * (rng.random(shape) < 0.1).astype(np.uint16)
    check_round_trip(bits, "BF16", masked=True)
    check_round_trip(bits, "BF16", masked=False)


def test_transposed_and_sliced_input_needs_no_copy_by_the_caller() -> None:
    bits = np.random.default_rng(3).integers(0, 0xFFFF, (150, 90), np.uint16)
    for view in (bits.T, bits[::2, ::3], bits[::-1]):
        check_round_trip(view, "F16", masked=True)


def test_read_only_and_unaligned_arrays_decode() -> None:
    bits = np.random.default_rng(4).integers(0, 0xFFFF, (70, 70), np.uint16)
    matrix = exponent_packed.encode(bits, "BF16", masked=True)
    moved = np.frombuffer(b"x" + matrix.values.tobytes(), np.uint8, offset=1)
    np.testing.assert_array_equal(exponent_packed.decode(replace(matrix, values=moved)), bits)


def test_one_exponent_needs_no_planes_and_an_empty_tile_no_head() -> None:
    bits = np.zeros((64, 192), np.uint16)
    bits[:, 64:128] = 0x3F80  # 1.0: exponent 127
    bits[0, 128:] = 0xBF80
    matrix = check_round_trip(bits, "BF16", masked=True)
    assert matrix.heads is not None
    assert matrix.heads.tolist() == [0, 127, 127]
    assert matrix.offsets.tolist() == [0, 0, 256, 260]


def test_a_tile_of_all_exponents_has_eight_planes_and_no_escapes() -> None:
    bits = np.arange(4096, dtype=np.uint16).reshape(64, 64) << 4
    matrix = check_round_trip(bits, "BF16", masked=False)
    assert matrix.heads is not None
    assert matrix.heads.tolist() == [8 << 8]


def test_encoding_and_decoding_need_little_memory_beside_input_and_output() -> None:
    bits = np.random.default_rng(8).integers(0, 0xFFFF, (4096, 2048), np.uint16)  # 16 MiB
    tracemalloc.start()
    matrix = exponent_packed.encode(bits, "BF16", masked=True)
    # The parts of the values are joined at the end: twice the output.
    assert tracemalloc.get_traced_memory()[1] < 2 * matrix.nbytes + (80 << 20)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    exponent_packed.validate(matrix, matrix.nnz)
    assert tracemalloc.get_traced_memory()[1] < before + (80 << 20)
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (np.zeros(5, np.uint16), "BF16"),
        (np.zeros((2, 2), np.uint32), "F16"),
        (np.zeros((2, 2), np.uint16), "F32"),
        (np.zeros((2, 2), np.uint16), "I16"),
    ],
)
def test_what_is_no_matrix_of_its_dtype_is_refused(bits: Matrix, dtype: str) -> None:
    with pytest.raises(BadMatrix, match="needs uint16 for BF16"):
        exponent_packed.encode(bits, dtype, masked=True)


# --------------------------------------------------------------------------------------------------
# What can be wrong


def with_window(bits: Matrix, dtype: str, planes: int, base: int) -> PackedMatrix:
    """A matrix of one tile, masked, in a window that no writer has to choose."""
    (elements,) = slow_kept(bits, masked=True)
    head, record = slow_record(elements, bits.itemsize, planes, base)
    values = np.frombuffer(record + bytes(-len(record) % 16), np.uint8).copy()
    return replace(
        exponent_packed.encode(bits, dtype, masked=True),
        heads=np.array([head], np.uint32),
        offsets=np.array([0, values.size // 16], np.uint32),
        values=values,
    )


@pytest.fixture
def escaped() -> PackedMatrix:
    """13 elements in rows 0 to 12: 2 planes from 126, number 3 and 11 escaped.

    Values: [0, 13) mantissas, [16, 24) and [24, 32) planes, [32, 40) escapes, [40, 48) gap.
    """
    bits = np.zeros((64, 64), np.uint16)
    bits[:13, 0] = np.array([126, 127, 128, 5, 129] * 2 + [127, 200, 128], np.uint16) << 7 | 1
    bits[8, 0] = 127 << 7 | 1
    matrix = with_window(bits, "BF16", 2, 126)
    exponent_packed.validate(matrix, 13)
    np.testing.assert_array_equal(exponent_packed.decode(matrix), bits)
    assert matrix.values.size == 48
    assert matrix.values[32:40].tolist() == [3, 0, 5, 0, 11, 0, 200, 0]
    return matrix


def changed(matrix: PackedMatrix, place: int, value: int) -> PackedMatrix:
    values = matrix.values.copy()
    values[place] = value
    return replace(matrix, values=values)


@pytest.mark.parametrize(("planes", "base"), [(0, 0), (0, 255), (3, 120), (7, 128), (8, 0)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_windows_that_our_writer_would_not_choose_are_read(
    dtype: str, planes: int, base: int
) -> None:
    bits = np.random.default_rng(5).integers(1, 0xFFFF, (64, 64), bits_of(dtype))
    matrix = with_window(bits, dtype, planes, base)
    exponent_packed.validate(matrix, 4096)
    np.testing.assert_array_equal(exponent_packed.decode(matrix), bits)


@pytest.mark.parametrize(
    "head",
    [
        126 | 9 << 8 | 2 << 16,  # planes
        126 | 255 << 8 | 2 << 16,
        253 | 2 << 8 | 2 << 16,  # the window ends at 257
        1 | 8 << 8 | 2 << 16,
        126 | 2 << 8 | 14 << 16,  # escapes
        126 | 2 << 8 | 0xFFFF << 16,
    ],
)
def test_heads_that_no_tile_can_have_are_refused(escaped: PackedMatrix, head: int) -> None:
    with pytest.raises(HeadsWrong, match=r"tile 0 of 1: head .* for 13 elements"):
        exponent_packed.decode(replace(escaped, heads=np.array([head], np.uint32)))


def test_a_head_of_an_empty_tile_must_be_0() -> None:
    matrix = exponent_packed.encode(np.zeros((64, 128), np.uint16), "BF16", masked=True)
    for head in (1, 1 << 8, 1 << 16):
        with pytest.raises(HeadsWrong, match="tile 1 of 2"):
            exponent_packed.decode(replace(matrix, heads=np.array([0, head], np.uint32)))


def test_heads_of_another_length_or_dtype_are_refused(escaped: PackedMatrix) -> None:
    assert escaped.heads is not None
    heads: Matrix = escaped.heads
    for wrong in (heads[:0], np.append(heads, 0), heads.astype(np.int32)):
        with pytest.raises(HeadsWrong, match=r"needs uint32\[1\]"):
            exponent_packed.decode(replace(escaped, heads=wrong))
    with pytest.raises(ArraySetWrong, match="has bitmap, offsets, heads, values"):
        exponent_packed.decode(replace(escaped, heads=None))


@pytest.mark.parametrize("head", [126 | 4 << 8 | 2 << 16, 126 | 2 << 8 | 5 << 16, 126 | 1 << 8])
def test_offsets_that_contradict_the_heads_are_refused(escaped: PackedMatrix, head: int) -> None:
    with pytest.raises(OffsetsWrong, match="tile 0 of 1: offsets hold 3 units"):
        exponent_packed.decode(replace(escaped, heads=np.array([head], np.uint32)))


@pytest.mark.parametrize("offsets", [[1, 4], [0, 2], [0, 4], [0, 2**32 - 1]])
def test_wrong_offsets_are_refused(escaped: PackedMatrix, offsets: list[int]) -> None:
    with pytest.raises(OffsetsWrong):
        exponent_packed.decode(replace(escaped, offsets=np.array(offsets, np.uint32)))


def test_values_of_another_length_dtype_or_stride_are_refused(escaped: PackedMatrix) -> None:
    values = escaped.values
    for wrong in (
        values[:-16],
        values[:-1],
        np.append(values, np.zeros(16, np.uint8)),
        values.view(np.uint16),
        values.view(np.int8),
        values[None],
        np.repeat(values, 2)[::2],
    ):
        with pytest.raises(ValuesWrong):
            exponent_packed.decode(replace(escaped, values=wrong))


def test_bitmaps_are_checked_before_anything_is_decoded(escaped: PackedMatrix) -> None:
    assert escaped.bitmap is not None
    with pytest.raises(BitmapWrong, match=r"needs uint64\[64\]"):
        exponent_packed.decode(replace(escaped, bitmap=escaped.bitmap[:-1]))
    with pytest.raises(BitsOutsideShape, match="rows at and after 12"):
        exponent_packed.decode(replace(escaped, rows=12))
    with pytest.raises(BitmapWrong, match="13 elements are kept, nnz is 12"):
        exponent_packed.validate(escaped, 12)


def test_a_dense_form_whose_nnz_is_not_its_size_is_refused() -> None:
    matrix = exponent_packed.encode(np.ones((3, 5), np.uint16), "BF16", masked=False)
    with pytest.raises(BitmapWrong, match="15 elements are kept, nnz is 14"):
        exponent_packed.validate(matrix, 14)


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (32, 13, "escape of element 13, the tile keeps 13"),
        (33, 255, "escape of element 65283, the tile keeps 13"),
    ],
)
def test_escapes_of_no_element_are_refused_by_decode_too(
    escaped: PackedMatrix, place: int, value: int, text: str
) -> None:
    for check in (exponent_packed.decode, lambda matrix: exponent_packed.validate(matrix, 13)):
        with pytest.raises(EscapesWrong, match=f"tile 0: {text}"):
            check(changed(escaped, place, value))


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (32, 11, r"element 11 \(0x00c8000b\) is not after the one before"),
        (32, 12, "element 11 .* is not after the one before"),
        (34, 126, "element 3 .* has a top byte inside the window"),
        (38, 129, "element 11 .* has a top byte inside the window"),
        (35, 1, "element 3 .* has a last byte that is not 0"),
        (16, 0b01111111, "element 3 .* has a code that is not 0"),
        (17, 0b00001111, "element 11 .* has a code that is not 0"),
    ],
)
def test_escapes_against_the_rules_are_refused(
    escaped: PackedMatrix, place: int, value: int, text: str
) -> None:
    with pytest.raises(EscapesWrong, match=text):
        exponent_packed.validate(changed(escaped, place, value), 13)


def test_the_first_escape_of_a_tile_may_be_below_the_last_of_the_tile_before() -> None:
    bits = np.full((64, 128), 0x3F80, np.uint16)
    bits[63, 63] = bits[0, 64] = 0x4780
    check_round_trip(bits, "BF16", masked=True)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (13, "a plane goes on"),  # after the mantissas
        (15, "a plane goes on"),
        (18, "a plane goes on"),  # after the first bit plane
        (31, "a plane goes on"),
        (40, "bytes after the record"),
        (47, "bytes after the record"),
    ],
)
def test_gaps_that_are_not_zero_are_refused(escaped: PackedMatrix, place: int, text: str) -> None:
    with pytest.raises(GapNotZero, match=f"tile 0: {text}"):
        exponent_packed.validate(changed(escaped, place, 0x80), 13)


def test_a_gap_is_looked_for_in_the_right_tile() -> None:
    bits = np.zeros((64, 192), np.uint16)
    bits[0, [0, 128]] = 1  # 8 bytes of 16: one mantissa, filled up
    matrix = exponent_packed.encode(bits, "BF16", masked=True)
    for place, tile in ((8, 0), (15, 0), (24, 2), (31, 2)):
        with pytest.raises(GapNotZero, match=f"tile {tile}: bytes after"):
            exponent_packed.validate(changed(matrix, place, 1), 2)


def test_a_stored_zero_is_refused_where_there_is_a_bitmap() -> None:
    bits = np.full((1, 3), 0x0001, np.uint16)
    for masked in (True, False):
        matrix = changed(exponent_packed.encode(bits, "BF16", masked=masked), 1, 0)
        if masked:
            with pytest.raises(ZeroStored, match="tile 0, element 1"):
                exponent_packed.validate(matrix, 3)
        else:
            exponent_packed.validate(matrix, 3)
            assert exponent_packed.decode(matrix).tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_flipped_bits_are_refused_or_are_another_valid_matrix(
    dtype: str, data: st.DataObject
) -> None:
    masked = data.draw(st.booleans())
    rng = np.random.default_rng(6)
    bits = rng.integers(1, 0xFFFF, (70, 66), bits_of(dtype))
    bits[rng.random(bits.shape) < 0.97] = 0x3F80 if masked else 0
    matrix = exponent_packed.encode(bits, dtype, masked=masked)
    broken = with_flipped_bits(matrix, data)
    try:
        exponent_packed.validate(broken, broken.nnz)
    except TileError:
        return
    values = b""
    assert broken.heads is not None
    tiles = slow_kept(exponent_packed.decode(broken), masked)
    for elements, head in zip(tiles, broken.heads.tolist(), strict=True):
        found, record = slow_record(elements, bits.itemsize, head >> 8 & 0xFF, head & 0xFF)
        assert found == head
        values += record + bytes(-len(record) % 16)
    assert broken.values.tobytes() == values


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_arrays_of_any_content_decode_or_are_refused_by_name(data: st.DataObject) -> None:
    matrix = exponent_packed.encode(
        np.random.default_rng(7).integers(0, 0xFFFF, (70, 66), np.uint16), "BF16", masked=True
    )
    broken = with_noise(matrix, ["heads", "values", "offsets"], data)
    try:
        exponent_packed.decode(broken)
    except TileError:
        return
