"""x @ W.T from a packed W: tiles decoded beside the tensor cores, columns summed in parts.

Two kernels. A program of the first has one row of tiles, a part of its columns and a block of
tokens; it leaves its sums in float32. The second adds the parts in their order, so that a result
depends on nothing but its row, its token and the number of parts; no atomics, no float is added
twice in another order.

Tensor cores add 64 columns at most before the sum is a float32 like any other: how they round
inside is theirs (they cut off), and over thousands of columns would be seen.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.faults import REASONS
from tierd_kernels.gpu.decode import decode_tile
from tierd_kernels.gpu.numbers import INTERPRETED, rounded, widened
from tierd_kernels.gpu.records import NO_REASON

_NO_COLUMN = tl.constexpr(2**31 - 1)
_REASONS = tl.constexpr(len(REASONS))


@triton.jit
def _bound(number):
    """A loop's bound. Of an array, as the interpreter has, numpy makes no number any more."""
    if INTERPRETED:
        return number.handle.data.item()
    else:
        return number


@triton.jit
def _single(number):
    """As float32, exactly."""
    if number.dtype == tl.bfloat16:
        return widened(number.to(tl.uint16, bitcast=True))
    else:
        return number.to(tl.float32)


@triton.jit(
    do_not_specialize=["far_units", "most_escapes", "rows", "tokens", "group_tiles", "splits"]
)
def multiply_tiles(
    bitmap,
    offsets,
    heads,
    scales,
    values,
    x,
    parts,
    faults,
    values_bytes,
    far_units,
    most_escapes,
    rows,
    cols,
    tokens,
    x_stride,
    group_tiles,
    splits,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Write the sums of split s to parts[s, token, row], float32 [splits, tokens, rows].

    Programs: [tile rows, splits, blocks of TOKENS tokens]. bitmap .. values: see `decode_tile`.
    x: of DTYPE, [tokens, cols], rows `x_stride` elements apart. faults: see `linear`.
    group_tiles: tiles for which a scale of int8 and int4 holds.
    """
    tile_row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    # Triton makes a constant of a single column, which would have no type.
    cols += tl.program_id(0) * 0
    # Rows and columns are below 2^32 - 64; as a division it would ask for the sign.
    tile_rows = ((rows + 63).to(tl.uint32) >> 6).to(tl.int32)
    tile_cols = ((cols + 63).to(tl.uint32) >> 6).to(tl.int32)
    tiles = tile_rows.to(tl.int64) * tile_cols
    first_tile = (tile_row * tile_cols).to(tl.uint32)
    groups = (tile_cols + group_tiles - 1) // group_tiles
    # At most 32 splits and 2^26 tiles in a row: 32 bits, of which a division is short.
    first = ((split * tile_cols).to(tl.uint32) // splits.to(tl.uint32)).to(tl.int32)
    end = (((split + 1) * tile_cols).to(tl.uint32) // splits.to(tl.uint32)).to(tl.int32)
    height = tl.minimum(rows - tile_row * 64, 64).to(tl.int32)

    step = tl.arange(0, 64)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    # Tokens that are not there are the last one again: nobody reads their sums.
    x_place = x + tl.minimum(token, tokens - 1)[None, :].to(tl.int64) * x_stride
    x_place += (first.to(tl.int64) * 64 + step)[:, None]
    if scales is not None:
        group = tile_row * groups + first // group_tiles
        scale_row = scales.to(tl.pointer_type(tl.uint16)) + group * 64 + step
    sums = tl.zeros([64, TOKENS], tl.float32)
    # Of the first wrong tile: its column and what is wrong, in one number.
    fault = tl.full([], _NO_COLUMN, tl.int32)
    # Columns of usual tiles: whole, neither the first nor the last of the matrix.
    row_below = tl.program_id(0) + 1
    usual_first = tl.where(row_below == 1, 1, 0)
    usual_cols = tl.where((row_below < tile_rows) & (cols & 63 == 0), tile_cols, tile_cols - 1)
    usual_cols = tl.where(row_below <= rows >> 6, usual_cols - usual_first, 0)
    usual_cols = tl.maximum(usual_cols, 0).to(tl.uint32)
    group_end = (first // group_tiles + 1) * group_tiles
    for tile_col in tl.range(_bound(first), _bound(end), num_stages=STAGES):
        tile = first_tile + tl.cast(tile_col, tl.uint32)
        # Of what is left. Triton has numbers of 32 bits for arguments below 2^31.
        width = cols - tl.cast(tile_col, cols.dtype) * 64
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
            tl.minimum(width, 64).to(tl.int32),
            (tile_col - usual_first).to(tl.uint32) < usual_cols,
            CODEC,
            DTYPE,
            MASKED,
            PLANES,
            VARIANT,
        )
        if reason != NO_REASON:
            fault = tl.minimum(fault, tl.cast(tile_col, tl.int32) * _REASONS + reason)
        turned = tl.load(x_place, mask=step[:, None] < width, other=0.0)
        x_place += 64
        if INTERPRETED:  # the interpreter of Triton 3.6 would multiply the bits of bfloat16
            elements, turned = _single(elements), _single(turned)
        else:
            # Nothing happens here. Triton 3.6 ends the process where it compiles tl.dot of a
            # tl.reshape for sm_100.
            elements = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [elements], dtype=elements.dtype, is_pure=True, pack=2
            )
        product = tl.dot(elements, turned, input_precision="ieee")
        if CODEC == "int8" or CODEC == "int4":
            if tile_col == group_end:  # cheaper than a division
                scale_row += 64
                group_end += group_tiles
            scale = widened(tl.load(scale_row))
            sums = tl.fma(product, tl.broadcast_to(scale[:, None], [64, TOKENS]), sums)
        else:
            # A plain sum would be made the dot's own accumulator again.
            sums = tl.fma(product, tl.full([64, TOKENS], 1.0, tl.float32), sums)
    if fault != _NO_COLUMN:
        tl.atomic_min(faults, tile_row * tile_cols * _REASONS + fault)
    corner = parts + split.to(tl.int64) * tokens * rows + tile_row * 64
    place = token[None, :].to(tl.int64) * rows + step[:, None]
    inside = (token[None, :] < tokens) & (step[:, None] < height)
    tl.store(corner + place, sums, mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens", "splits"])
def add_parts(
    parts,
    bias,
    out,
    rows,
    tokens,
    splits,
    out_stride,
    ROWS: tl.constexpr,
):
    """Write parts[0] + parts[1] + ... + bias, added in this order in float32, rounded once.

    Programs: [blocks of ROWS rows, tokens]. bias: [rows] or None. out: rows `out_stride` apart.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    inside = row < rows
    sums = tl.zeros([ROWS], tl.float32)
    for split in range(_bound(splits)):
        place = (tl.cast(split, tl.int64) * tokens + token) * rows + row
        sums += tl.load(parts + place, mask=inside, other=0.0)
    if bias is not None:
        sums += _single(tl.load(bias + row, mask=inside, other=0.0))
    tl.store(out + token * out_stride + row, rounded(sums, out.dtype.element_ty), mask=inside)
