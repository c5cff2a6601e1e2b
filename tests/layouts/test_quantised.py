"""int8 and int4: records, scales and weights as FORMAT.md says, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.layouts.broken_arrays import with_flipped_bits, with_noise
from tierd_layouts import quantised
from tierd_layouts.errors import (
    ArraySetWrong,
    BadGroup,
    BadMatrix,
    BitmapWrong,
    BitsOutsideShape,
    GapNotZero,
    LevelRefused,
    OffsetsWrong,
    ScalesWrong,
    TileError,
    UnknownCodec,
    ValuesWrong,
    ZeroStored,
)
from tierd_layouts.float_bits import widened

if TYPE_CHECKING:
    from tierd_layouts.packed_matrix import PackedMatrix

#: numpy arrays; not typed further, because half of the tests pass wrong ones on purpose.
Matrix = Any

LIMITS = {"int8": 127, "int4": 7}


def weights_bits(rows: int, cols: int, dtype: str, density: float = 1.0, seed: int = 0) -> Matrix:
    rng = np.random.default_rng([rows, cols, seed])
    weights = rng.standard_normal((rows, cols), np.float32)
    weights[rng.random(weights.shape) >= density] = 0
    if dtype == "F16":
        return weights.astype(np.float16).view(np.uint16)
    bits = weights.view(np.uint32)
    return bits if dtype == "F32" else (bits >> 16).astype(np.uint16)


def slow_levels(matrix: PackedMatrix) -> list[list[int]]:
    """The levels of a matrix, [rows][cols], read as FORMAT.md says."""
    grid = [[0] * matrix.cols for _ in range(matrix.rows)]
    tile_cols = -(-matrix.cols // 64)
    for tile in range(len(matrix.offsets) - 1):
        begin, end = int(matrix.offsets[tile]) * 16, int(matrix.offsets[tile + 1]) * 16
        record = matrix.values[begin:end].tobytes()
        i = 0
        for r in range(tile // tile_cols * 64, min(tile // tile_cols * 64 + 64, matrix.rows)):
            left = tile % tile_cols * 64
            for c in range(left, min(left + 64, matrix.cols)):
                word = -1 if matrix.bitmap is None else int(matrix.bitmap[tile * 64 + r % 64])
                if not word >> (c - left) & 1:
                    continue
                if matrix.codec == "int8":
                    level = int.from_bytes(record[i : i + 1], signed=True)
                else:
                    level = ((record[i // 2] >> i % 2 * 4 & 15) ^ 8) - 8
                grid[r][c] = level
                i += 1
        used = i if matrix.codec == "int8" else -(-i // 2)
        assert len(record) == -(-used // 16) * 16
        assert not any(record[used:])
    return grid


def slow_scales(matrix: PackedMatrix) -> list[list[float]]:
    """The scale of every row and group."""
    assert matrix.scales is not None
    groups = -(-matrix.cols // matrix.group)
    scales = widened(matrix.scales, "BF16").tolist()
    return [
        [scales[(row // 64 * groups + group) * 64 + row % 64] for group in range(groups)]
        for row in range(matrix.rows)
    ]


def check(bits: Matrix, dtype: str, codec: str, group: int, masked: bool) -> PackedMatrix:
    """Encodes, and compares with the definition of the best level for each scale."""
    matrix = quantised.encode(bits, dtype, codec=codec, group=group, masked=masked)
    quantised.validate(matrix, matrix.nnz)
    rows, cols = bits.shape
    levels = np.array(slow_levels(matrix), np.float32).reshape(rows, cols)
    scales = np.array(slow_scales(matrix), np.float32).reshape(rows, -(-cols // group))
    spread = np.repeat(scales, group, axis=1)[:, :cols]
    limit = LIMITS[codec]
    best = np.rint(widened(bits, dtype) / np.where(spread == 0, np.float32(1), spread))
    np.testing.assert_array_equal(levels, np.clip(best, -limit, limit))
    if masked:
        assert matrix.nnz == np.count_nonzero(levels)
    else:
        assert matrix.nnz == bits.size
    # Exact: a float64 product of an 8-bit and an 8-bit number is.
    np.testing.assert_array_equal(
        quantised.weights(matrix), levels.astype(np.float64) * spread.astype(np.float64)
    )
    return matrix


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("group", [64, 128, 192, 1 << 40])
def test_every_weight_gets_the_nearest_level_of_its_group(
    group: int, dtype: str, codec: str, masked: bool
) -> None:
    bits = weights_bits(70, 330, dtype, 0.5 if masked else 1.0)
    # Sizes that differ between groups and rows show a scale in the wrong place.
    weights = widened(bits, dtype) * np.linspace(0.01, 1, 330, dtype=np.float32)
    weights *= np.linspace(0.1, 1, 70, dtype=np.float32)[:, None]
    bits = weights.astype(np.float16).view(np.uint16) if dtype == "F16" else weights.view(np.uint32)
    if dtype == "BF16":
        bits = (bits >> 16).astype(np.uint16)
    if group < 1000:
        check(bits, dtype, codec, group, masked)
    else:
        whole = quantised.encode(bits, dtype, codec=codec, group=384, masked=masked)
        matrix = quantised.encode(bits, dtype, codec=codec, group=group, masked=masked)
        quantised.validate(matrix, matrix.nnz)
        np.testing.assert_array_equal(quantised.weights(matrix), quantised.weights(whole))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 7), (7, 0), (0, 64), (1, 1), (1, 200), (200, 1), (64, 64), (65, 129)]
)
def test_every_shape_survives(shape: tuple[int, int], codec: str, masked: bool) -> None:
    check(weights_bits(*shape, "BF16", 0.6), "BF16", codec, 64, masked)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_matrices_of_several_pieces_and_bands_survive(codec: str) -> None:
    for shape, group in (((130, 64 * 520 + 3), 192), ((1500, 700), 128), ((64 * 700, 5), 64)):
        bits = weights_bits(*shape, "BF16", 0.3)
        matrix = quantised.encode(bits, "BF16", codec=codec, group=group, masked=True)
        quantised.validate(matrix, matrix.nnz)
        for rows in (slice(0, 64), slice(shape[0] // 64 * 64, None)):  # each row stands alone
            part = quantised.encode(bits[rows], "BF16", codec=codec, group=group, masked=True)
            np.testing.assert_array_equal(quantised.weights(matrix)[rows], quantised.weights(part))


def test_the_decoded_bits_are_the_weights_rounded_once() -> None:
    for dtype in ("BF16", "F16", "F32"):
        matrix = quantised.encode(
            weights_bits(70, 130, dtype), dtype, codec="int8", group=128, masked=False
        )
        decoded = widened(quantised.decode(matrix), dtype).astype(np.float64)
        exact = quantised.weights(matrix).astype(np.float64)
        step = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 0.0}[dtype]
        assert (np.abs(decoded - exact) <= np.abs(exact) * step).all()
        assert dtype == "F32" or not np.array_equal(decoded, exact)


@pytest.mark.parametrize(
    ("scale", "level", "expected"),
    [
        (0x3F81, 127, 0x4300),  # 1.0078125 * 127 = 127.992: up to 128
        (0x3F81, 65, 0x4283),  # 65.5078125: down to 65.5
        (0x3F82, 66, 0x4286),  # 67.03125
        (0x3FA0, 103, 0x4301),  # 128.75, nearer to 129
        (0x3F90, 116, 0x4302),  # 130.5: a tie, down to the even 130
        (0x3FE0, 74, 0x4302),  # 129.5: a tie, up to the even 130
        (0x3FB2, 96, 0x4306),  # 133.5: a tie, up to 134
        (0x3FB2, -96, 0xC306),
    ],
)
def test_ties_are_rounded_to_even_in_bf16(scale: int, level: int, expected: int) -> None:
    matrix = single(level, scale)
    assert quantised.decode(matrix).tolist() == [[expected]]


def single(level: int, scale: int, dtype: str = "BF16") -> PackedMatrix:
    matrix = quantised.encode(
        np.zeros((1, 1), np.uint16), "BF16", codec="int8", group=64, masked=False
    )
    values, scales = matrix.values.copy(), np.zeros(64, np.uint16)
    values[0], scales[0] = level & 0xFF, scale
    return replace(matrix, values=values, scales=scales, dtype=dtype)


def test_an_f16_that_cannot_hold_a_weight_has_infinity_as_ieee_says() -> None:
    matrix = single(127, 0x4480, "F16")  # 1024 * 127
    assert quantised.decode(matrix).tolist() == [[0x7C00]]
    assert quantised.weights(matrix).tolist() == [[1024 * 127]]


def test_minus_zero_and_weights_below_half_a_step_are_zero() -> None:
    weights = np.array([[-0.0, 127.0, 0.49, -0.49, 0.5, 0.51, -1.5]], np.float32)
    matrix = quantised.encode(weights.view(np.uint32), "F32", codec="int8", group=64, masked=True)
    assert quantised.weights(matrix).tolist() == [[0.0, 127.0, 0.0, 0.0, 0.0, 1.0, -2.0]]
    assert matrix.nnz == 3
    assert quantised.decode(matrix)[0, 0] == 0


def test_masked_and_dense_form_have_the_same_weights() -> None:
    bits = weights_bits(100, 300, "BF16", 0.5)
    for codec in ("int8", "int4"):
        both = [
            quantised.weights(quantised.encode(bits, "BF16", codec=codec, group=128, masked=masked))
            for masked in (True, False)
        ]
        np.testing.assert_array_equal(both[0], both[1])


def test_half_the_weights_in_int8_and_int4_take_the_promised_bytes() -> None:
    bits = weights_bits(512, 1024, "BF16", 0.5)
    ratios = [
        bits.nbytes / quantised.encode(bits, "BF16", codec=codec, group=128, masked=True).nbytes
        for codec in ("int8", "int4")
    ]
    assert ratios[0] >= 3.0
    assert ratios[1] >= 4.9


# --------------------------------------------------------------------------------------------------
# What the encoder refuses


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize(
    ("dtype", "special"),
    [
        ("BF16", 0x7F80),
        ("BF16", 0xFFC0),
        ("BF16", 0x7F81),
        ("F16", 0x7C00),
        ("F16", 0x7C01),
        ("F32", 0x7F800001),
        ("F32", 0xFF800000),
    ],
)
def test_weights_that_are_not_finite_are_refused(dtype: str, special: int, codec: str) -> None:
    bits = weights_bits(65, 65, dtype)
    bits[64, 64] = special
    with pytest.raises(BadMatrix, match=f"not finite, codec {codec}"):
        quantised.encode(bits, dtype, codec=codec, group=64, masked=True)


@pytest.mark.parametrize("group", [0, -64, 1, 63, 100])
def test_groups_that_do_not_fall_on_tiles_are_refused(group: int) -> None:
    bits = weights_bits(3, 3, "BF16")
    with pytest.raises(BadGroup, match=f"group of {group} columns"):
        quantised.encode(bits, "BF16", codec="int8", group=group, masked=True)
    matrix = quantised.encode(bits, "BF16", codec="int8", group=64, masked=True)
    with pytest.raises(BadGroup, match=f"group of {group} columns"):
        quantised.decode(replace(matrix, group=group))


def test_other_codecs_and_matrices_are_refused() -> None:
    with pytest.raises(UnknownCodec, match="'int3', quantised ones are int8, int4"):
        quantised.encode(np.zeros((2, 2), np.uint16), "BF16", codec="int3", group=64, masked=True)
    with pytest.raises(BadMatrix, match="needs uint16 for BF16"):
        quantised.encode(np.zeros((2, 2), np.uint16), "F32", codec="int8", group=64, masked=True)


# --------------------------------------------------------------------------------------------------
# What the reader refuses


@pytest.fixture(params=["int8", "int4"])
def matrix(request: pytest.FixtureRequest) -> PackedMatrix:
    """70 x 70, masked, in 2 x 2 tiles and 1 x 2 groups of 64; levels 1 to 7; the last tile's 21."""
    bits = np.zeros((70, 70), np.uint16)
    bits[::2, ::3] = 0x3F80
    bits[64, 64:70] = [0x3F80, 0xBF80] * 3
    return quantised.encode(bits, "BF16", codec=request.param, group=64, masked=True)


def changed(matrix: PackedMatrix, name: str, place: int, value: int) -> PackedMatrix:
    array = matrix.arrays()[name].copy()
    array[place] = value
    changes: dict[str, Any] = {name: array}
    return replace(matrix, **changes)


def test_scales_of_another_length_or_dtype_are_refused(matrix: PackedMatrix) -> None:
    scales: Matrix = matrix.scales
    for wrong in (scales[:-1], np.append(scales, 0), scales.view(np.int16), scales[None]):
        with pytest.raises(ScalesWrong, match=r"in groups of 64 needs uint16\[256\]"):
            quantised.decode(replace(matrix, scales=wrong))
    with pytest.raises(ArraySetWrong, match="has bitmap, offsets, scales, values"):
        quantised.decode(replace(matrix, scales=None))


@pytest.mark.parametrize("bits", [0x8000, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0x7E13, 0xFFFF])
def test_scales_that_are_negative_not_finite_or_too_large_are_refused(
    matrix: PackedMatrix, bits: int
) -> None:
    with pytest.raises(ScalesWrong, match=f"scale 5 of 256 has the bits {bits:#06x}"):
        quantised.decode(changed(matrix, "scales", 5, bits))


@pytest.mark.parametrize(("codec", "largest"), [("int8", 0x7C01), ("int4", 0x7E12)])
def test_the_largest_scale_has_finite_weights_and_the_next_has_not(
    codec: str, largest: int
) -> None:
    scales = widened(np.array([largest, largest + 1], np.uint16), "BF16").astype(np.float64)
    assert scales[0] * LIMITS[codec] <= np.finfo(np.float32).max < scales[1] * LIMITS[codec]
    bits = np.zeros((1, 1), np.uint16)
    matrix = quantised.encode(bits, "BF16", codec=codec, group=64, masked=False)
    quantised.validate(changed(matrix, "scales", 0, largest), 1)
    with pytest.raises(ScalesWrong):
        quantised.validate(changed(matrix, "scales", 0, largest + 1), 1)


@pytest.mark.parametrize("place", [128 + 6, 128 + 63, 192 + 6])
def test_scales_of_rows_outside_the_shape_are_refused(matrix: PackedMatrix, place: int) -> None:
    with pytest.raises(ScalesWrong, match="a row at or after 70"):
        quantised.decode(changed(matrix, "scales", place, 1))


def test_structure_is_checked_before_anything_is_decoded(matrix: PackedMatrix) -> None:
    assert matrix.bitmap is not None
    with pytest.raises(BitmapWrong, match=r"needs uint64\[256\]"):
        quantised.decode(replace(matrix, bitmap=matrix.bitmap[:-1]))
    with pytest.raises(BitsOutsideShape, match="columns at and after 69"):
        quantised.decode(replace(matrix, cols=69))
    for place, value in ((0, 1), (1, 0), (4, 2**32 - 1)):
        with pytest.raises(OffsetsWrong):
            quantised.decode(changed(matrix, "offsets", place, value))
    for wrong in (matrix.values[:-16], matrix.values.view(np.uint16), matrix.values[:-1]):
        with pytest.raises(ValuesWrong):
            quantised.decode(replace(matrix, values=wrong))
    with pytest.raises(BitmapWrong, match=f"{matrix.nnz} elements are kept, nnz is 3"):
        quantised.validate(matrix, 3)


def test_a_scale_of_zero_may_have_levels_that_then_mean_zero(matrix: PackedMatrix) -> None:
    zeros = replace(matrix, scales=np.zeros(256, np.uint16))
    quantised.validate(zeros, matrix.nnz)
    assert not quantised.weights(zeros).any()


@pytest.mark.parametrize("masked", [True, False])
def test_levels_without_a_mirror_image_are_refused(masked: bool) -> None:
    bits = weights_bits(64, 128, "BF16") | np.uint16(0x3C00)
    for codec, byte, tile, level in (
        ("int8", 0x80, 1, 7),
        ("int4", 0x18, 1, 14),
        ("int4", 0x81, 1, 15),
    ):
        matrix = quantised.encode(bits, "BF16", codec=codec, group=64, masked=masked)
        place = int(matrix.offsets[1]) * 16 + 7
        with pytest.raises(LevelRefused, match=f"tile {tile} of 2: level {level} is below -"):
            quantised.validate(changed(matrix, "values", place, byte), matrix.nnz)


def test_a_stored_zero_is_refused_where_there_is_a_bitmap() -> None:
    bits = np.full((1, 4), 0x3F80, np.uint16)
    for codec, byte, level in (("int8", 0, 1), ("int4", 0x10, 2), ("int4", 0x01, 3)):
        for masked in (True, False):
            matrix = quantised.encode(bits, "BF16", codec=codec, group=64, masked=masked)
            broken = changed(matrix, "values", 1, byte)
            if masked:
                with pytest.raises(ZeroStored, match=f"tile 0 of 1: level {level} is 0 although"):
                    quantised.validate(broken, 4)
            else:
                quantised.validate(broken, 4)


@pytest.mark.parametrize(
    ("codec", "place", "byte", "level"),
    [("int8", 5, 1, 5), ("int8", 15, 255, 15), ("int4", 2, 0x17, 5), ("int4", 15, 0x10, 31)],
)
@pytest.mark.parametrize("masked", [True, False])
def test_gaps_that_are_not_zero_are_refused(
    codec: str, place: int, byte: int, level: int, masked: bool
) -> None:
    bits = np.full((1, 5), 0x3F80, np.uint16)
    matrix = quantised.encode(bits, "BF16", codec=codec, group=64, masked=masked)
    with pytest.raises(GapNotZero, match=f"tile 0 of 1: level {level} after the last"):
        quantised.validate(changed(matrix, "values", place, byte), 5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_flipped_bits_are_refused_or_are_other_levels_and_scales(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(["int8", "int4"]))
    masked = data.draw(st.booleans())
    bits = weights_bits(70, 66, "BF16", 0.05)
    matrix = quantised.encode(bits, "BF16", codec=codec, group=64, masked=masked)
    broken = with_flipped_bits(matrix, data)
    try:
        quantised.validate(broken, broken.nnz)
    except TileError:
        return
    levels = np.array(slow_levels(broken))
    assert np.abs(levels).max() <= LIMITS[codec]
    scales = np.repeat(np.array(slow_scales(broken)), 64, axis=1)[:, :66]
    np.testing.assert_array_equal(quantised.weights(broken), levels * scales)
    if masked:
        assert np.count_nonzero(levels) == broken.nnz


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_arrays_of_any_content_decode_or_are_refused_by_name(data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from(["int8", "int4"]))
    bits = weights_bits(70, 66, "F16", 0.5)
    matrix = quantised.encode(bits, "F16", codec=codec, group=64, masked=True)
    broken = with_noise(matrix, ["scales", "values", "offsets"], data)
    try:
        quantised.decode(broken)
    except TileError:
        return
