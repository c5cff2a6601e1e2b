# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Orders that a matrix's tiles, or the elements of a tile, could have on disk: copies and kernels.

The tile order on disk must stay the one layout unless another is faster on GPUs by more than 15 %.
So the same decoding reads a copy of a matrix whose tiles, or elements, are stored in another order:
the copy is an ordinary pack of the elements moved about, and the kernel puts them back.

- rows: as on disk, tile rows one after the other; in a tile, rows of 64.
- columns: tile columns one after the other.
- squares: 4 x 4 tiles after one another, in each as `rows`.
- blocks: tiles as on disk; in a tile, 8 x 8 blocks of 64, as tensor cores like their operands.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from tierd_kernels.gpu.decode import decode_tile
from tierd_kernels.gpu.product import _bound

ORDERS: Final = ("rows", "columns", "squares", "blocks")
TILE: Final = 64
SQUARE: Final = 4
"""Tiles; a matrix in the order `squares` has multiples of it both ways."""


def stored_copy(dense: torch.Tensor, order: str) -> torch.Tensor:
    """A dense matrix [rows, cols] whose pack has the tiles of `dense` in this order."""
    tall, wide = dense.shape[0] // TILE, dense.shape[1] // TILE
    tiles = dense.view(tall, TILE, wide, TILE).permute(0, 2, 1, 3)
    if order == "blocks":
        eight = tiles.reshape(tall, wide, 8, 8, 8, 8)
        tiles = eight.permute(0, 1, 2, 4, 3, 5).reshape(tall, wide, TILE, TILE)
    elif order != "rows":
        places = torch.empty(tall * wide, dtype=torch.int64)
        for row in range(tall):
            for col in range(wide):
                places[place(row, col, tall, wide, order)] = row * wide + col
        tiles = tiles.reshape(-1, TILE, TILE)[places].view(tall, wide, TILE, TILE)
    return tiles.permute(0, 2, 1, 3).reshape(dense.shape).contiguous()


def place(row: int, col: int, tall: int, wide: int, order: str) -> int:
    """Where the tile is stored."""
    if order == "columns":
        return col * tall + row
    if order == "squares":
        square = row // SQUARE * (wide // SQUARE) + col // SQUARE
        return square * SQUARE * SQUARE + row % SQUARE * SQUARE + col % SQUARE
    return row * wide + col


@triton.jit
def _place(row, col, tall, wide, ORDER: tl.constexpr):
    if ORDER == "columns":
        return col * tall + row
    if ORDER == "squares":
        square = row // 4 * (wide // 4) + col // 4
        return square * 16 + row % 4 * 4 + col % 4
    return row * wide + col


@triton.jit(do_not_specialize=["far_units"])
def expand_tiles(
    bitmap,
    offsets,
    values,
    values_bytes,
    far_units,
    out,
    tall,
    wide,
    VARIANT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Write the matrix as it was before `stored_copy`. Programs: tiles. out: bf16."""
    number = tl.program_id(0)
    row, col = number // wide, number % wide
    tile = _place(row, col, tall, wide, ORDER)
    elements, _ = decode_tile(
        bitmap, offsets, None, values, values_bytes, far_units, tall * wide, 0, tile, 64, 64,
        (tile > 0) & (tile + 1 < tall * wide), "raw", tl.bfloat16, True, 0, VARIANT,
    )  # fmt: skip
    high, low = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    if ORDER == "blocks":
        down, right = high // 8 * 8 + low // 8, high % 8 * 8 + low % 8
    else:
        down, right = high, low
    first = (tl.cast(row, tl.int64) * 64) * wide * 64 + col * 64
    tl.store(out + first + tl.cast(down, tl.int64) * wide * 64 + right, elements)


@triton.jit(do_not_specialize=["far_units"])
def sum_rows(
    bitmap,
    offsets,
    values,
    values_bytes,
    far_units,
    x,
    parts,
    tall,
    wide,
    splits,
    VARIANT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Write the product with one token, a part of the columns: parts[split, row], float32.

    Programs: [tile rows, splits].
    """
    row, split = tl.program_id(0), tl.program_id(1)
    step = tl.arange(0, 64)
    sums = tl.zeros([64], tl.float32)
    for col in range(_bound(split * wide // splits), _bound((split + 1) * wide // splits)):
        tile = _place(row, col, tall, wide, ORDER)
        elements, _ = decode_tile(
            bitmap, offsets, None, values, values_bytes, far_units, tall * wide, 0, tile, 64, 64,
            (tile > 0) & (tile + 1 < tall * wide), "raw", tl.bfloat16, True, 0, VARIANT,
        )  # fmt: skip
        if ORDER == "blocks":
            high, low = step[:, None], step[None, :]
            turned = tl.load(x + col * 64 + high % 8 * 8 + low % 8).to(tl.float32)
            weighted = tl.reshape(elements.to(tl.float32) * turned, [8, 8, 8, 8])
            sums += tl.reshape(tl.sum(tl.sum(weighted, axis=3), axis=1), [64])
        else:
            turned = tl.load(x + col * 64 + step).to(tl.float32)
            sums += tl.sum(elements.to(tl.float32) * turned[None, :], axis=1)
    tl.store(parts + (tl.cast(split, tl.int64) * tall + row) * 64 + step, sums)
