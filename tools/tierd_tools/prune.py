"""Magnitude pruning on raw bits: exact, without a sort, on arrays of any size.

The bits of an IEEE number without its sign bit order like its absolute value, so the k smallest
are found by counting bit patterns, 16 bits at a time: one pass over the data for BF16 and F16, two
for F32. Nothing is converted to a float and nothing depends on rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts.float_bits import INFINITY
from tierd_layouts.tile_grid import bits_dtype
from tierd_tools.errors import BadSetting
from tierd_tools.sparsity import check_sparsity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Bits = NDArray[np.unsignedinteger[Any]]

DTYPES = frozenset(INFINITY)

#: how much less than wanted counts as pruned already
_TOLERANCE = 0.01
#: elements a step: many times the bins of a digit, and small enough for the caches
_STEP = 1 << 18


def magnitude(bits: Bits, dtype: str, sparsity: float) -> Bits:
    """`bits` with its round(sparsity * size) elements of smallest absolute value set to +0.0.

    bits: unsigned integers of the width of `dtype`, any shape; never written to.
    Elements that are +0.0 already count first, then -0.0, then by absolute value; equal ones by
    position in row-major order. NaN is never pruned. Returns `bits` itself when nothing changes.
    Raises BadSetting for a dtype that is not BF16, F16 or F32, or a sparsity outside [0, 1).
    """
    check_sparsity(sparsity)
    if dtype not in DTYPES:
        raise BadSetting(f"cannot prune dtype {dtype}: only {', '.join(sorted(DTYPES))}")
    kind = bits_dtype(dtype)
    if bits.dtype != kind:
        raise BadSetting(f"{dtype} bits must be {kind}, not {bits.dtype}")

    flat = bits.reshape(-1)
    zeros = flat.size - int(np.count_nonzero(flat))
    wanted = round(sparsity * flat.size) - zeros
    if wanted <= 0:
        return bits
    threshold, ties = _threshold(flat, INFINITY[dtype], zeros, wanted)
    return _cut(flat, threshold, ties).reshape(bits.shape)


def is_pruned(bits: Bits, sparsity: float) -> bool:
    """Whether a matrix is so sparse that whoever wants `sparsity` should leave it as it is.

    It has at least that share of +0.0, less 0.01 (other tools round for each row), or it is 2:4
    sparse: half zeros, and no more than two of four neighbours in a row are kept.
    -0.0 does not count, because it is stored: pruning, which takes zeros first, makes it +0.0.
    """
    size = bits.size
    zeros = size - int(np.count_nonzero(bits))
    if size and zeros >= (sparsity - min(_TOLERANCE, sparsity / 2)) * size:
        return True
    # Far above half, no more than two of four are kept by chance.
    return 0.5 * size <= zeros < 0.55 * size and _is_2_of_4(bits)


def _is_2_of_4(bits: Bits) -> bool:
    if bits.ndim != 2 or bits.shape[1] % 4:
        return False
    groups = bits.reshape(-1, 4)
    return all(
        bool((np.count_nonzero(groups[begin : begin + _STEP], axis=1) <= 2).all())
        for begin in range(0, len(groups), _STEP)
    )


def _threshold(flat: Bits, infinity: int, zeros: int, wanted: int) -> tuple[int, int]:
    """(t, ties): prune what is smaller than t, and the first `ties` elements that equal t.

    The digits of t, base 65536, are found from the highest down; `zeros` elements are +0.0 and
    need no pruning. Asked for more numbers than there are, t is infinity: all but the NaN.
    """
    width = flat.dtype.itemsize * 8
    t = 0  # the digits found so far
    ties = wanted  # what is still to be pruned among the elements that begin with them
    for shift in range(width - 16, -1, -16):
        counts = np.zeros(1 << 16, np.int64)
        for step in _magnitudes(flat):
            if shift + 16 < width:
                step = step[step >> (shift + 16) == t >> (shift + 16)]
            digits = step if width == 16 else (step >> shift) & 0xFFFF
            counts += np.bincount(digits, minlength=1 << 16)
        if t == 0:
            counts[0] -= zeros
        if t >> (shift + 16) == infinity >> (shift + 16):
            counts = counts[: (infinity >> shift & 0xFFFF) + 1]  # what lies above is NaN
        sums = np.cumsum(counts)
        digit = min(int(np.searchsorted(sums, ties)), sums.size - 1)
        ties -= int(sums[digit] - counts[digit])
        t |= digit << shift
    return t, min(ties, int(counts[digit]))


def _magnitudes(flat: Bits) -> Iterator[Bits]:
    mask = flat.dtype.type((1 << (flat.dtype.itemsize * 8 - 1)) - 1)
    for begin in range(0, flat.size, _STEP):
        yield flat[begin : begin + _STEP] & mask


def _cut(flat: Bits, threshold: int, ties: int) -> Bits:
    """A copy of `flat` without what `_threshold` named."""
    out = np.empty_like(flat)
    begin = 0
    for step in _magnitudes(flat):
        source = flat[begin : begin + step.size]
        keep = step >= threshold
        if ties:
            equal = np.flatnonzero(step == threshold)
            if threshold == 0:
                equal = equal[source[equal] != 0]  # +0.0 is not pruned again: -0.0 is
            keep[equal[:ties]] = False
            ties -= min(ties, equal.size)
        np.multiply(source, keep, out=out[begin : begin + step.size])
        begin += step.size
    return out
