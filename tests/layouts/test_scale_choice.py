"""The choice of scales against a slow one, operation by operation as FORMAT.md has them."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierd_layouts.float_bits import LARGEST, rounded, widened
from tierd_layouts.scale_choice import choose_scales
from tierd_layouts.tile_grid import TileGrid

F = np.float32
LIMITS = {"int8": 127, "int4": 7}


def bf16(bits: int) -> np.float32:
    return F(np.uint32(bits << 16).view(F))


def up(target: np.float32, limit: int, dtype: str) -> np.float32:
    bits = int(target.view(np.uint32)) >> 16
    if bits == 0 or bf16(bits) < target:
        bits += 1
    if float(bf16(bits)) * limit > float(LARGEST[dtype]):
        bits -= 1
    return bf16(bits)


def slow_scale(group: list[np.float32], codec: str, dtype: str) -> np.float32:
    """One group of weights, a multiple of 16 of them: float32 scalars, one operation at a time."""
    limit = LIMITS[codec]
    amax = max((abs(w) for w in group), default=F(0))
    if amax == 0:
        return F(0)
    a = F(amax / F(limit))
    if codec == "int8":
        return up(a, limit, dtype)
    scales = [up(F(a * F((64 - 3 * k) / 64)), limit, dtype) for k in range(8)]
    errors = []
    for s in scales:
        lanes: list[np.float32] = []
        for j, w in enumerate(group):
            x = F(w / s)
            q = F(min(F(limit), max(F(-limit), F(np.rint(x)))))
            d = F(x - q)
            square = F(d * d)
            if j < 16:
                lanes.append(square)
            else:
                lanes[j % 16] = F(lanes[j % 16] + square)
        for width in (8, 4, 2, 1):
            lanes = [F(lanes[lane] + lanes[lane + width]) for lane in range(width)]
        r = F(s / scales[0])
        errors.append(F(lanes[0] * F(r * r)))
    return scales[errors.index(min(errors))]


def check(bits: Any, dtype: str, codec: str, group: int) -> None:
    rows, cols = bits.shape
    grid = TileGrid(rows, cols)
    groups = -(-cols // group)
    found = choose_scales(bits, dtype, codec, group, grid).reshape(grid.tile_rows, groups, 64)
    weights = np.zeros((rows, groups * group), F)
    weights[:, :cols] = widened(bits, dtype)
    expected = np.zeros(found.shape, np.uint16)
    for row in range(rows):
        for g in range(groups):
            part = list(weights[row, g * group : (g + 1) * group])
            scale = slow_scale(part, codec, dtype)
            expected[row // 64, g, row % 64] = int(scale.view(np.uint32)) >> 16
    np.testing.assert_array_equal(found, expected)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_the_scales_are_those_of_the_document(data: st.DataObject) -> None:
    """Of any size: subnormal weights, weights near the largest, and equal ones, too."""
    dtype = data.draw(st.sampled_from(["BF16", "F16", "F32"]))
    codec = data.draw(st.sampled_from(["int8", "int4"]))
    rows, cols = data.draw(st.sampled_from([(1, 64), (3, 70), (2, 130), (66, 5), (1, 1)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kind = data.draw(st.sampled_from(["normal", "any bits", "equal"]))
    item = np.uint32 if dtype == "F32" else np.uint16
    if kind == "any bits":
        infinity = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}[dtype]
        bits = rng.integers(0, infinity, (rows, cols), item)
        bits |= rng.integers(0, 2, bits.shape, item) << item(bits.itemsize * 8 - 1)
        keep = data.draw(st.sampled_from([1.0, 0.1]))
        bits[rng.random(bits.shape) >= keep] = 0
    else:
        exponent = data.draw(st.sampled_from([-149, -140, -126, -20, -6, 0, 10, 100, 127]))
        weights = rng.standard_normal((rows, cols)) if kind == "normal" else np.ones((rows, cols))
        with np.errstate(over="ignore", under="ignore"):
            weights = np.clip(weights * 2.0**exponent, -LARGEST[dtype], LARGEST[dtype])
            bits = rounded(weights.astype(F), dtype)
    check(bits, dtype, codec, 64 * data.draw(st.sampled_from([1, 2])))


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_the_largest_weights_stay_finite(dtype: str, codec: str) -> None:
    """Rounding the scale up must not make a weight larger than the dtype's largest."""
    largest = int(LARGEST[dtype].view(np.uint32))
    item = np.uint32 if dtype == "F32" else np.uint16
    bits = np.full((1, 64), {"BF16": 0x7F7F, "F16": 0x7BFF, "F32": largest}[dtype], item)
    check(bits, dtype, codec, 64)
    (scale,) = choose_scales(bits, dtype, codec, 64, TileGrid(1, 64))[:1]
    assert float(bf16(int(scale))) * LIMITS[codec] <= float(LARGEST[dtype])


def test_a_group_of_zeros_has_scale_0_and_rows_outside_the_shape_too() -> None:
    bits = np.zeros((3, 128), np.uint16)
    bits[1, 64] = 0x3F80
    for codec in LIMITS:
        scales = choose_scales(bits, "BF16", codec, 64, TileGrid(3, 128)).reshape(2, 64)
        assert np.argwhere(scales).tolist() == [[1, 1]]


def test_int4_clips_the_largest_weights_where_that_is_better_for_the_group() -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((64, 4096)).astype(F)
    scales = choose_scales(weights.view(np.uint32), "F32", "int4", 128, TileGrid(64, 4096))
    amax = np.abs(weights).reshape(64, 32, 128).max(axis=2)
    ratios = widened(scales.reshape(32, 64).T, "BF16") / (amax / 7)
    assert 0.67 < ratios.min() < 0.8
    assert ratios.mean() < 0.95

    def error(scale: Any) -> float:
        groups = weights.reshape(64, 32, 128)
        levels = np.clip(np.rint(groups / scale[:, :, None]), -7, 7)
        return float(np.square(groups - levels * scale[:, :, None]).mean())

    assert error(widened(scales.reshape(32, 64).T, "BF16")) < 0.95 * error(amax / 7)


def test_choosing_needs_little_memory_beside_input_and_output() -> None:
    bits = np.random.default_rng(2).integers(0, 0x7F00, (4096, 2048), np.uint16)  # 16 MiB
    tracemalloc.start()
    choose_scales(bits, "BF16", "int4", 128, TileGrid(4096, 2048))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20, f"{peak} bytes at the peak"
