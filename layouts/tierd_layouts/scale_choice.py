"""Which scale each group of weights gets in the codecs `int8` and `int4`.

All arithmetic is float32 with one rounding (to nearest, ties to even) for each operation, never
fused and without flushing to zero, so that any encoder can give the same bytes:

    limit = 127 or 7
    amax  = max |w| of the group; 0: scale = +0 and all q = 0
    up(t) = the least bf16 >= t, at least the smallest positive one; if up(t) * limit is above the
            largest finite number of the matrix's dtype, the next smaller bf16 instead
    q(s)  = max(-limit, min(limit, rint(w / s)))

    int8: scale = up(amax / 127)
    int4: a = amax / 7; candidates s[k] = up(a * ((64 - 3 k) / 64)), k = 0..7; the one with the
          least e[k], of equals the one with the smallest k:
              d    = w / s[k] - q(s[k])
              lane[l] = d[l]^2 + d[16 + l]^2 + d[32 + l]^2 + ...   l = 0..15, added in this order
                      (elements after the last column count as w = 0)
              lane[l] += lane[l + 8], l < 8; then + 4, + 2, + 1: the sum is lane[0]
              r    = s[k] / s[0];  e[k] = lane[0] * (r * r)

Why: rounding a scale up keeps |w / s| <= limit, but for the candidates of int4, which trade the few
largest weights of a group (clipped) for smaller steps of all others.
Source: FORMAT.md, section "int8 and int4".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tierd_layouts.errors import BadMatrix
from tierd_layouts.float_bits import LARGEST, widened
from tierd_layouts.tile_grid import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_layouts.float_bits import F32Array
    from tierd_layouts.tile_grid import BitsArray, TileGrid, U16Array

CANDIDATES = 8  #: scales that int4 tries for each group
_LANES = 16
_BAND_ELEMENTS = 1 << 20  # 4 MiB of float32


def choose_scales(bits: BitsArray, dtype: str, codec: str, group: int, grid: TileGrid) -> U16Array:
    """Returns bf16 bits, uint16[tile_rows * groups * 64]; rows outside the shape have 0.

    Raises BadMatrix for a weight that is not finite.
    """
    if not grid.tiles:
        return np.zeros(0, np.uint16)
    group = min(group, grid.tile_cols * TILE)  # the columns beyond would all be zeros
    groups = -(-grid.cols // group)
    scales = np.zeros((grid.tile_rows, groups, TILE), np.uint16)
    choose = _least_error_scales if codec == "int4" else _amax_scales
    for rows, row_slice, columns, group_slice in _bands(grid, group):
        part = bits[row_slice, columns]
        whole = np.zeros(
            (len(rows) * TILE, (group_slice.stop - group_slice.start) * group), part.dtype
        )
        whole[: part.shape[0], : part.shape[1]] = part
        with np.errstate(invalid="ignore"):  # a signalling NaN is refused like any other
            band = np.abs(widened(whole, dtype)).reshape(len(whole), -1, group)
            amax = band.max(axis=2)
        if not np.isfinite(amax).all():
            raise BadMatrix(f"a weight is not finite, codec {codec} cannot hold it")
        chosen = choose(band, amax, dtype).reshape(len(rows), TILE, -1)
        scales[rows.start : rows.stop, group_slice] = chosen.transpose(0, 2, 1)
    return scales.reshape(-1)


# --------------------------------------------------------------------------------------------------


def _bands(grid: TileGrid, group: int) -> Iterator[tuple[range, slice, slice, slice]]:
    """Yields tile rows, rows, columns, groups: rectangles of whole groups, about 1 Mi elements."""
    groups = -(-grid.cols // group)
    wide = max(1, min(groups, _BAND_ELEMENTS // (TILE * group)))
    tall = max(1, _BAND_ELEMENTS // (TILE * group * wide))
    for top in range(0, grid.tile_rows, tall):
        rows = range(top, min(top + tall, grid.tile_rows))
        for left in range(0, groups, wide):
            right = min(left + wide, groups)
            yield (
                rows,
                slice(rows.start * TILE, min(rows.stop * TILE, grid.rows)),
                slice(left * group, min(right * group, grid.cols)),
                slice(left, right),
            )


def _amax_scales(band: F32Array, amax: F32Array, dtype: str) -> U16Array:
    return _scale_up(amax / np.float32(127), amax, 127, dtype)


def _least_error_scales(band: F32Array, amax: F32Array, dtype: str) -> U16Array:
    """band: |w|, [rows, groups, group]; the sign does not change the error."""
    step = amax / np.float32(7)
    best = _scale_up(step, amax, 7, dtype)
    widest = np.where(best == 0, np.float32(1), widened(best, "BF16"))
    least = _error(band, widest, widest)
    for candidate in range(1, CANDIDATES):
        factor = np.float32((64 - 3 * candidate) / 64)
        bits = _scale_up(step * factor, amax, 7, dtype)
        error = _error(band, np.where(bits == 0, np.float32(1), widened(bits, "BF16")), widest)
        better = error < least
        best = np.where(better, bits, best)
        least = np.where(better, error, least)
    return best


def _scale_up(target: F32Array, amax: F32Array, limit: int, dtype: str) -> U16Array:
    bits = np.maximum(target.view(np.uint32) + 0xFFFF >> 16, 1).astype(np.uint16)
    with np.errstate(over="ignore"):  # infinity is above the largest, too
        too_large = widened(bits, "BF16") * np.float32(limit) > LARGEST[dtype]
    bits -= too_large
    return np.where(amax == 0, np.uint16(0), bits)


def _error(band: F32Array, scale: F32Array, widest: F32Array) -> F32Array:
    quotients = band / scale[:, :, None]
    distances = quotients - np.minimum(np.rint(quotients), np.float32(7))
    distances *= distances
    steps = distances.reshape(*scale.shape, -1, _LANES)
    lanes = steps[:, :, 0].copy()
    for step in range(1, steps.shape[2]):
        lanes += steps[:, :, step]
    width = _LANES
    while width > 1:
        width //= 2
        lanes = lanes[:, :, :width] + lanes[:, :, width : 2 * width]
    ratio = scale / widest
    error: F32Array = lanes[:, :, 0] * (ratio * ratio)
    return error
