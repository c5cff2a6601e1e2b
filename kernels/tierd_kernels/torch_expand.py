"""Expansion by torch operations only: the same on the CPU and on a GPU, simple rather than fast.

Nothing waits for the device. Every place that is read follows from the shape and from what was
checked there, and is held inside its array besides; a tile whose contents are wrong becomes zeros,
and a *fault* names it. Source: FORMAT.md, section "Tile layout"; `reference.py` says the same in
numpy.

A tile's record is unpacked in the order of its elements, one column for each of 4096 and one that
stays zero; then every place of the tile takes its element, or the zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from tierd_kernels.errors import KernelError
from tierd_kernels.faults import BITS, NO_FAULT, REASONS, fault_text, new_faults
from tierd_kernels.geometry import TILE, tile_range
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix, check_matrix, items
from tierd_kernels.torch_records import PLACES, SIGNED, stored_elements, unpacked_bits

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOM_BYTES: Final = 32 << 20
"""Of temporaries of a call, unless it says otherwise."""
TILE_BYTES: Final = 36 * TILE * TILE
"""Most temporaries for one tile, of any codec and dtype: counted by test_torch_expand.py."""


def expand(
    matrix: TorchMatrix,
    out: torch.Tensor,
    *,
    tile_rows: tuple[int, int] | None = None,
    faults: torch.Tensor | None = None,
    room_bytes: int = ROOM_BYTES,
) -> None:
    """Write a packed matrix to `out`, bit for bit what `tierd_kernels.expand` writes.

    out: the matrix's dtype, [rows, cols], contiguous, on the matrix's device, overwritten.
    tile_rows: (first, end), the part of the matrix that `out` holds; all of it by default.
    faults: see `faults.new_faults`; tiles that are wrong are zeros, and the call does not wait for
    the device. Without it the call waits and raises KernelError for the first of them.
    room_bytes: of temporaries at most, yet at least TILE_BYTES.
    Raises KernelError for arrays that do not fit.
    """
    check_matrix(matrix)
    first, end = tile_range((matrix.rows, matrix.cols), out.shape, tile_rows)
    check_out(matrix, out)
    bits = out.detach().view(SIGNED[out.itemsize])
    cell = new_faults(matrix.device) if faults is None else faults
    with torch.no_grad():
        for block in _blocks(matrix, first, end, room_bytes // TILE_BYTES):
            _expand_block(matrix, block, bits, cell)
    if faults is None and (fault := int(cell)) != NO_FAULT:
        raise KernelError(fault_text(fault))


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive tiles [first, end): whole tile rows, or a part of one.

    tall, wide: of the block, in tiles. rows, cols: of the output, inside its shape.
    """

    first: int
    end: int
    tall: int
    wide: int
    rows: slice
    cols: slice

    @property
    def whole(self) -> bool:
        """Whether all of its tiles' elements are in the matrix."""
        return self.height == self.tall * TILE and self.width == self.wide * TILE

    @property
    def height(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def width(self) -> int:
        return int(self.cols.stop - self.cols.start)


def _blocks(matrix: TorchMatrix, first: int, end: int, tiles: int) -> Iterator[_Block]:
    """Tile rows [first, end), at most `tiles` tiles at a time, one if it has to be."""
    tile_cols = matrix.grid.tile_cols
    if not tile_cols:
        return
    tall, wide = max(1, tiles // tile_cols), min(tile_cols, max(1, tiles))
    for top in range(first, end, tall):
        bottom = min(top + tall, end)
        for left in range(0, tile_cols, wide):
            right = min(left + wide, tile_cols)
            begin = top * tile_cols + left
            yield _Block(
                begin,
                begin + (bottom - top) * (right - left),
                bottom - top,
                right - left,
                slice((top - first) * TILE, min(bottom * TILE, matrix.rows) - first * TILE),
                slice(left * TILE, min(right * TILE, matrix.cols)),
            )


def _expand_block(
    matrix: TorchMatrix, block: _Block, bits: torch.Tensor, faults: torch.Tensor
) -> None:
    kept, outside = _kept(matrix, block)
    counts = kept.sum(1)
    stored, wrong = stored_elements(matrix, block.first, block.end, counts)
    wrong = torch.where(outside, BITS, wrong)
    bad = wrong < len(REASONS)
    stored.masked_fill_(bad[:, None], 0)
    number = torch.arange(block.first, block.end, device=matrix.device) * len(REASONS)
    found = torch.where(bad, number + wrong, NO_FAULT).amin(0, keepdim=True)
    torch.minimum(faults, found, out=faults)
    if matrix.bitmap is None and block.whole:
        tiles = stored[:, :PLACES]
    else:
        element = kept.cumsum(1, dtype=torch.int64).sub_(1).masked_fill_(kept == 0, PLACES)
        tiles = stored.gather(1, element)
        del element
    del kept, stored
    if matrix.scales is not None:
        tiles = _weights(matrix, block, tiles)
    squares = tiles.view(block.tall, block.wide, TILE, TILE).transpose(1, 2)
    band = squares.reshape(block.tall * TILE, block.wide * TILE)
    bits[block.rows, block.cols] = band[: block.height, : block.width]


def _kept(matrix: TorchMatrix, block: _Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Which elements the tiles keep, uint8 [tiles, 4096]; which tiles keep some outside, [tiles].

    Bit `c` (LSB first) of word `r` of a tile is the element of row `r` and column `c` of the tile.
    """
    device = matrix.device
    inside = None
    if not block.whole:
        rows = torch.arange(block.tall * TILE, device=device) < block.height
        cols = torch.arange(block.wide * TILE, device=device) < block.width
        inside = (rows.view(-1, 1, TILE, 1) & cols.view(1, -1, 1, TILE)).reshape(-1, PLACES)
    tiles = block.end - block.first
    nowhere = torch.zeros(tiles, dtype=torch.bool, device=device)
    if matrix.bitmap is None:
        if inside is None:
            return torch.ones((tiles, PLACES), dtype=torch.uint8, device=device), nowhere
        return inside.view(torch.uint8), nowhere
    bitmap = matrix.bitmap.view(-1, PLACES // 8)[block.first : block.end]
    kept = unpacked_bits(bitmap)
    if inside is None:
        return kept, nowhere
    outside = (kept > inside.view(torch.uint8)).any(1)
    return kept.bitwise_and_(inside.view(torch.uint8)), outside


def _weights(matrix: TorchMatrix, block: _Block, levels: torch.Tensor) -> torch.Tensor:
    """Level times scale, which is exact, rounded once to the matrix's dtype; as bits."""
    assert matrix.scales is not None
    tile = torch.arange(block.first, block.end, device=matrix.device)
    tile_cols, groups = matrix.grid.tile_cols, -(-matrix.cols // matrix.group)
    group = tile // tile_cols * groups + tile % tile_cols // (matrix.group // TILE)
    scales = items(matrix.scales, torch.bfloat16).view(-1, TILE)[group].float()
    weights = levels.view(-1, TILE, TILE) * scales[:, :, None]
    dtype = DTYPES[matrix.dtype]
    return weights.to(dtype).view(SIGNED[dtype.itemsize])


def check_out(matrix: TorchMatrix, out: torch.Tensor) -> None:
    """Raise KernelError where a matrix cannot be written to `out`, whatever its shape is."""
    dtype = DTYPES[matrix.dtype]
    if out.dtype != dtype:
        raise KernelError(f"out has dtype {out.dtype}, {dtype} is needed")
    if out.device != matrix.device:
        raise KernelError(f"out is on {out.device}, the matrix is on {matrix.device}")
    if not out.is_contiguous():
        raise KernelError(f"out has strides {list(out.stride())}, it must be contiguous")
