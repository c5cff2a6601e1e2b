"""Wanda pruning on raw bits: what is small, and multiplies features that are small too, goes first.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
2023 (arXiv 2306.11695): score |W_ij| * ||X_j||, compared within each output row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_layouts.float_bits import widened
from tierd_layouts.tile_grid import bits_dtype
from tierd_tools.errors import BadSetting
from tierd_tools.prune import DTYPES
from tierd_tools.sparsity import check_sparsity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[np.unsignedinteger[Any]]

#: elements a band of rows holds at most, above one row: some 30 bytes of temporaries each
_STEP = 1 << 16
_PLUS_ZERO, _NAN = -1, np.iinfo(np.int64).max
_INFINITY = int(np.float64(np.inf).view(np.int64))


def wanda(bits: Bits, dtype: str, norms: NDArray[np.float32], sparsity: float) -> Bits:
    """`bits` with the round(sparsity * cols) elements of each row that score least set to +0.0.

    bits: unsigned integers of the width of `dtype` (BF16, F16, F32), [rows, cols]; never written
    to. norms: float32[cols], the L2 norm of each input feature over a text, finite and >= 0.
    The score of an element is |element| * its feature's norm, exact (in float64). Elements that are
    +0.0 already count first; equal scores by position; infinite elements score highest, whatever
    the norm; NaN is never pruned. Returns `bits` itself when nothing changes. Raises BadSetting.
    """
    check_sparsity(sparsity)
    if dtype not in DTYPES:
        raise BadSetting(f"cannot prune dtype {dtype}: only {', '.join(sorted(DTYPES))}")
    if bits.ndim != 2 or bits.dtype != bits_dtype(dtype):
        raise BadSetting(f"{bits.dtype}{list(bits.shape)} is no matrix of {dtype} bits")
    rows, cols = bits.shape
    if norms.shape != (cols,) or norms.dtype != np.float32:
        raise BadSetting(f"norms are {norms.dtype}{list(norms.shape)}, needed: float32[{cols}]")
    if not (np.isfinite(norms) & (norms >= 0)).all():
        raise BadSetting("norms must be finite and not negative")

    pruned = round(sparsity * cols)
    if not pruned:
        return bits
    weights = norms.astype(np.float64)
    out = np.empty_like(bits)
    band = max(1, _STEP // cols)
    for begin in range(0, rows, band):
        step = bits[begin : begin + band]
        keep = _kept(_keys(step, dtype, weights), pruned)
        np.multiply(step, keep, out=out[begin : begin + band])
    return bits if np.array_equal(out, bits) else out


def _keys(step: Bits, dtype: str, norms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Integers in the order of pruning: -1 for +0.0, then the scores, then NaN.

    The bits of IEEE numbers that are not negative have the order of the numbers.
    """
    with np.errstate(invalid="ignore"):  # a signalling NaN, and infinity * 0
        values = np.abs(widened(step, dtype)).astype(np.float64)
        scores = values * norms
    keys: NDArray[np.int64] = scores.view(np.int64)
    special = ~np.isfinite(values)
    if special.any():
        keys[special] = np.where(np.isnan(values[special]), _NAN, _INFINITY)
    keys[step == 0] = _PLUS_ZERO
    return keys


def _kept(keys: NDArray[np.int64], pruned: int) -> NDArray[np.bool_]:
    """False at the `pruned` smallest keys of each row, equal ones by position; NaN is kept."""
    threshold = np.partition(keys, pruned - 1, axis=1)[:, pruned - 1 : pruned]
    keep: NDArray[np.bool_] = keys >= threshold
    ties = pruned - np.count_nonzero(~keep, axis=1)
    equal = keys == threshold
    several = np.flatnonzero(np.count_nonzero(equal, axis=1) != 1)
    keep[equal] = False
    if several.size:
        rank = np.cumsum(equal[several], axis=1, dtype=np.int32)
        keep[several] |= equal[several] & (rank > ties[several, None])
    keep |= keys == _NAN
    return keep
