"""Expansion on a GPU: a Triton program for each tile, bit for bit what the reference writes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from tierd_kernels.errors import KernelError
from tierd_kernels.faults import NO_FAULT, REASONS, fault_text, new_faults
from tierd_kernels.geometry import tile_range
from tierd_kernels.gpu.arrays import check_arrays, group_tiles
from tierd_kernels.gpu.decode import decode_tile
from tierd_kernels.gpu.numbers import rounded, widened
from tierd_kernels.gpu.records import NO_REASON, far_units
from tierd_kernels.torch_expand import check_out

if TYPE_CHECKING:
    from tierd_kernels.torch_matrix import TorchMatrix

ELEMENTS: Final = {"BF16": tl.bfloat16, "F16": tl.float16, "F32": tl.float32}
_REASONS = tl.constexpr(len(REASONS))


@dataclass(frozen=True, slots=True)
class Way:
    """How a tile is expanded. variant: one of `decode.VARIANTS`. warps: of its program."""

    variant: str
    warps: int


WAYS: Final = (Way("gather", 4), Way("window", 4))
"""All that can be chosen, each of them tested. Which is faster is for a card to say. Not 8 warps: a
tile has 128 half rows, a lane each; twice the lanes would do everything twice."""
DEFAULT_WAY: Final = Way("window", 4)
"""The fewest issue slots (tests/kernels/gpu/resources.json)."""


def ways(codec: str) -> list[Way]:
    """Those of WAYS that differ for a codec: see `decode.VARIANTS`."""
    return [way for way in WAYS if codec == "raw" or way.variant == "window"]


def expand(
    matrix: TorchMatrix,
    out: torch.Tensor,
    *,
    tile_rows: tuple[int, int] | None = None,
    faults: torch.Tensor | None = None,
    way: Way | None = None,
) -> None:
    """Write a packed matrix to `out`, bit for bit what `tierd_kernels.expand` writes.

    out: the matrix's dtype, [rows, cols], contiguous, on the matrix's device, overwritten.
    tile_rows: (first, end), the part of the matrix that `out` holds; all of it by default.
    faults: see `faults.new_faults`; tiles that are wrong are zeros, and the call does not
    wait for the device. Without it the call waits and raises KernelError for the first of them.
    way: one of WAYS, DEFAULT_WAY by default.
    Raises KernelError for arrays that do not fit.
    """
    check_arrays(matrix)
    first, end = tile_range((matrix.rows, matrix.cols), out.shape, tile_rows)
    check_out(matrix, out)
    chosen = way or DEFAULT_WAY
    if chosen not in WAYS:
        raise KernelError(f"{chosen} is none of the ways that are compiled and tested")
    cell = new_faults(matrix.device) if faults is None else faults
    if first < end and matrix.cols:
        # Triton launches on the current device, whichever that of its arguments is.
        with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
            launch(matrix, out.detach(), cell, first, end, chosen)
    if faults is None and (fault := int(cell)) != NO_FAULT:
        raise KernelError(fault_text(fault))


def launch(
    matrix: TorchMatrix, out: torch.Tensor, faults: torch.Tensor, first: int, end: int, way: Way
) -> None:
    """Start `expand_tiles` for tile rows [first, end). Nothing is checked here."""
    tile_cols = matrix.grid.tile_cols
    expand_tiles[((end - first) * tile_cols,)](
        matrix.bitmap,
        matrix.offsets,
        matrix.heads,
        matrix.scales,
        matrix.values,
        out,
        faults,
        matrix.values.numel(),
        far_units(matrix.values.numel()),
        matrix.grid.tiles,
        matrix.most_escapes,
        first,
        matrix.rows,
        matrix.cols,
        tile_cols,
        group_tiles(matrix),
        CODEC=matrix.codec,
        # Levels are multiplied by their scales in float32, and rounded then.
        ELEMENT=ELEMENTS[matrix.dtype] if matrix.scales is None else tl.float32,
        MASKED=matrix.bitmap is not None,
        PLANES=matrix.most_planes if matrix.codec == "exponent-packed" else 0,
        VARIANT=way.variant,
        num_warps=way.warps,
    )


@triton.jit(
    do_not_specialize=[
        "far_units",
        "tiles",
        "most_escapes",
        "first",
        "rows",
        "tile_cols",
        "group_tiles",
    ]
)
def expand_tiles(
    bitmap,
    offsets,
    heads,
    scales,
    values,
    out,
    faults,
    values_bytes,
    far_units,
    tiles,
    most_escapes,
    first,
    rows,
    cols,
    tile_cols,
    group_tiles,
    CODEC: tl.constexpr,
    ELEMENT: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Write a tile to `out`, which begins with tile row `first`. A program for each tile.

    bitmap .. values: pointers to uint8, None for what is absent; see `decode_tile`.
    group_tiles: tiles for which a scale of int8 and int4 holds.   faults: see `expand`.
    """
    row_below = tl.program_id(0) // tile_cols
    tile_col = tl.program_id(0) % tile_cols
    tile_row = first + row_below
    tile = tile_row * tile_cols + tile_col
    height = tl.minimum(rows - tile_row.to(tl.int64) * 64, 64).to(tl.int32)
    width = tl.minimum(cols - tile_col.to(tl.int64) * 64, 64).to(tl.int32)
    elements, reason = decode_tile(
        bitmap,
        offsets,
        heads,
        values,
        values_bytes,
        far_units,
        tiles,
        most_escapes,
        tile,
        height,
        width,
        (height == 64) & (width == 64) & (tile > 0) & (tile + 1 < tiles),
        CODEC,
        ELEMENT,
        MASKED,
        PLANES,
        VARIANT,
    )
    row = tl.arange(0, 64)
    if scales is not None:
        groups = (tile_cols + group_tiles - 1) // group_tiles
        group = tile_row.to(tl.int64) * groups + tile_col // group_tiles
        scale = widened(tl.load(scales.to(tl.pointer_type(tl.uint16)) + group * 64 + row))
        elements = rounded(elements * scale[:, None], out.dtype.element_ty)
    col = tl.arange(0, 64)[None, :]
    row = row[:, None]
    corner = out + row_below.to(tl.int64) * 64 * cols + tile_col.to(tl.int64) * 64
    tl.store(corner + row.to(tl.int64) * cols + col, elements, mask=(row < height) & (col < width))
    if reason != NO_REASON:
        tl.atomic_min(faults, tile.to(tl.int64) * _REASONS + reason)
