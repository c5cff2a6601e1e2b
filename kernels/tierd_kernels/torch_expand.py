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
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from tierd_kernels.errors import KernelError
from tierd_kernels.geometry import RUN_UNIT, TILE, tile_range
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix, check_matrix, items

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOM_BYTES: Final = 32 << 20
"""Of temporaries of a call, unless it says otherwise."""
TILE_BYTES: Final = 36 * TILE * TILE
"""Most temporaries for one tile, of any codec and dtype: counted by test_torch_expand.py."""
NO_FAULT: Final = 2**63 - 1

_PLACES: Final = TILE * TILE
REASONS: Final = (
    "bitmap has bits outside the matrix",
    "its head cannot be",
    "offsets do not fit its record",
    "escapes do not ascend within its elements",
)
_BITS, _HEAD, _OFFSETS, _ESCAPES = range(len(REASONS))
_SIGNED: Final = {2: torch.int16, 4: torch.int32}
"""torch has few operations for unsigned integers. These are only bits."""


def new_faults(device: torch.device | str) -> torch.Tensor:
    """A cell for `expand`: int64 [1], NO_FAULT until a wrong tile is met, then of the first one."""
    with torch.inference_mode(False):
        return torch.full((1,), NO_FAULT, dtype=torch.int64, device=device)


def fault_text(fault: int) -> str:
    """What a cell's value, other than NO_FAULT, says."""
    tile, reason = divmod(fault, len(REASONS))
    return f"tile {tile}: {REASONS[reason]}"


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
    faults: see `new_faults`; tiles that are wrong are zeros, and the call does not wait for the
    device. Without it the call waits and raises KernelError for the first of them.
    room_bytes: of temporaries at most, yet at least TILE_BYTES.
    Raises KernelError for arrays that do not fit.
    """
    check_matrix(matrix)
    first, end = tile_range((matrix.rows, matrix.cols), out.shape, tile_rows)
    check_out(matrix, out)
    bits = out.detach().view(_SIGNED[out.itemsize])
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
    stored, wrong = _stored(matrix, block, counts)
    wrong = torch.where(outside, _BITS, wrong)
    bad = wrong < len(REASONS)
    stored.masked_fill_(bad[:, None], 0)
    number = torch.arange(block.first, block.end, device=matrix.device) * len(REASONS)
    found = torch.where(bad, number + wrong, NO_FAULT).amin(0, keepdim=True)
    torch.minimum(faults, found, out=faults)
    if matrix.bitmap is None and block.whole:
        tiles = stored[:, :_PLACES]
    else:
        element = kept.cumsum(1, dtype=torch.int64).sub_(1).masked_fill_(kept == 0, _PLACES)
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
        inside = (rows.view(-1, 1, TILE, 1) & cols.view(1, -1, 1, TILE)).reshape(-1, _PLACES)
    tiles = block.end - block.first
    nowhere = torch.zeros(tiles, dtype=torch.bool, device=device)
    if matrix.bitmap is None:
        if inside is None:
            return torch.ones((tiles, _PLACES), dtype=torch.uint8, device=device), nowhere
        return inside.view(torch.uint8), nowhere
    bitmap = matrix.bitmap.view(-1, _PLACES // 8)[block.first : block.end]
    kept = _unpacked_bits(bitmap)
    if inside is None:
        return kept, nowhere
    outside = (kept > inside.view(torch.uint8)).any(1)
    return kept.bitwise_and_(inside.view(torch.uint8)), outside


def _stored(
    matrix: TorchMatrix, block: _Block, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements of each tile's record, [tiles, 4097], and what is wrong with each tile.

    Elements are bits, or the levels of a lossy codec. The last column is zero.
    """
    offsets = _unsigned(matrix.offsets, block.first, block.end + 1) * RUN_UNIT
    begin, nbytes = offsets[:-1], offsets.diff()
    wrong = torch.full_like(counts, len(REASONS))
    item_bytes = DTYPES[matrix.dtype].itemsize
    heads = None
    match matrix.codec:
        case "raw":
            needed = counts * item_bytes
        case "int8":
            needed = counts
        case "int4":
            needed = (counts + 1) // 2
        case _:
            heads = _heads(matrix, block, counts)
            needed = heads.record_bytes
            wrong = torch.where(heads.sane, wrong, _HEAD)
    fits = nbytes == (needed + RUN_UNIT - 1) // RUN_UNIT * RUN_UNIT
    fits &= offsets[1:] <= matrix.values.numel()
    if block.first == 0:
        fits[0] &= begin[0] == 0
    if block.end == matrix.grid.tiles:
        fits[-1] &= offsets[-1] == matrix.values.numel()
    wrong = torch.where(fits, wrong, wrong.clamp(max=_OFFSETS))
    begin = torch.where(wrong < len(REASONS), 0, begin)
    if heads is not None:
        return _unpacked_elements(matrix, begin, heads, wrong)
    stored = _plain_elements(matrix, begin, item_bytes)
    stored[:, _PLACES:] = 0
    return stored, wrong


def _plain_elements(matrix: TorchMatrix, begin: torch.Tensor, item_bytes: int) -> torch.Tensor:
    """Elements that are whole bytes or halves of one, [tiles, 4097 or 4098]."""
    step = torch.arange(_PLACES + 1, device=matrix.device)
    if matrix.codec == "raw":
        values = items(matrix.values, _SIGNED[item_bytes])
        return _take(values, begin[:, None] // item_bytes + step)
    if matrix.codec == "int8":
        return _take(matrix.values, begin[:, None] + step).view(torch.int8)
    pairs = _take(matrix.values, begin[:, None] + step[: _PLACES // 2 + 1])
    halves = torch.stack([pairs & 15, pairs >> 4], dim=2).view(len(pairs), -1)
    return halves.bitwise_xor_(8).view(torch.int8).sub_(8)  # two's complement of 4 bits


class _Heads(NamedTuple):
    """What the heads of a block's tiles say, int64 [tiles]; zeros where it cannot be."""

    counts: torch.Tensor  # of elements
    sane: torch.Tensor
    base: torch.Tensor
    planes: torch.Tensor
    escapes: torch.Tensor
    plane_bytes: torch.Tensor  # of a plane of bytes
    bit_bytes: torch.Tensor  # of a plane of bits
    escapes_at: torch.Tensor  # in the record
    record_bytes: torch.Tensor


def _heads(matrix: TorchMatrix, block: _Block, counts: torch.Tensor) -> _Heads:
    assert matrix.heads is not None
    heads = _unsigned(matrix.heads, block.first, block.end)
    base, planes, escapes = heads & 0xFF, heads >> 8 & 0xFF, heads >> 16
    sane = (planes <= matrix.most_planes) & (escapes <= matrix.most_escapes)
    sane &= (base + (1 << planes.clamp(max=8)) <= 256) & (escapes <= counts)
    sane &= (counts > 0) | (heads == 0)
    base, planes, escapes = base * sane, planes * sane, escapes * sane
    plane_bytes, bit_bytes = (counts + 7) // 8 * 8, (counts + 63) // 64 * 8
    low = DTYPES[matrix.dtype].itemsize - 1
    escapes_at = low * plane_bytes + planes * bit_bytes
    record_bytes = escapes_at + 4 * escapes
    return _Heads(
        counts, sane, base, planes, escapes, plane_bytes, bit_bytes, escapes_at, record_bytes
    )


def _unpacked_elements(
    matrix: TorchMatrix, begin: torch.Tensor, heads: _Heads, wrong: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements of exponent-packed records, [tiles, 4097], and what is wrong with the tiles.

    Elements are rotated left by one bit: the top byte is an exponent. It is `base` plus a code in
    bit planes; the escapes say it for elements that it does not fit. The other bytes are planes.
    """
    low = DTYPES[matrix.dtype].itemsize - 1
    wide = torch.int32 if low == 1 else torch.int64
    tops = torch.zeros((len(begin), _PLACES + 1), dtype=torch.uint8, device=matrix.device)
    codes = tops[:, :_PLACES]
    place = (begin + low * heads.plane_bytes)[:, None] + torch.arange(
        _PLACES // 8, device=matrix.device
    )
    for plane in range(matrix.most_planes):
        bits = _unpacked_bits(_take(matrix.values, place + plane * heads.bit_bytes[:, None]))
        codes += bits.mul_((plane < heads.planes)[:, None]).bitwise_left_shift_(plane)
    codes += heads.base.to(torch.uint8)[:, None]
    if matrix.most_escapes:
        wrong = _escape(matrix, begin, heads, tops, wrong)
    elements = tops.to(wide).bitwise_left_shift_(8 * low)
    del tops
    step = torch.arange(_PLACES + 1, device=matrix.device)
    for byte in range(low):
        place = (begin + byte * heads.plane_bytes)[:, None] + step
        elements |= _take(matrix.values, place).to(wide).bitwise_left_shift_(8 * byte)
    signs = (elements & 1).bitwise_left_shift_(8 * low + 7)
    elements = elements.bitwise_right_shift_(1).bitwise_or_(signs).to(_SIGNED[low + 1])
    elements[:, _PLACES:] = 0
    return elements, wrong


def _escape(
    matrix: TorchMatrix,
    begin: torch.Tensor,
    heads: _Heads,
    tops: torch.Tensor,
    wrong: torch.Tensor,
) -> torch.Tensor:
    """Set the top bytes that the escapes say; returns what is wrong with the tiles.

    The last column of `tops` takes what is set for no element.
    """
    index = torch.arange(matrix.most_escapes, device=matrix.device)
    there = index < heads.escapes[:, None]
    place = (begin + heads.escapes_at)[:, None] + 4 * index
    low, high, top, pad = (_take(matrix.values, place + byte) for byte in range(4))
    del place
    element = high.to(torch.int64).mul_(256).add_(low).clamp_(max=_PLACES)
    del low, high
    element.masked_fill_(~there, _PLACES)
    # What follows an escape that is there: a larger number, or the end of the elements.
    off = (element >= heads.counts[:, None]) | (pad != 0)
    off[:, 1:] |= element[:, 1:] <= element[:, :-1]
    tops.scatter_(1, element, top)
    return torch.where((off & there).any(1), wrong.clamp(max=_ESCAPES), wrong)


def _weights(matrix: TorchMatrix, block: _Block, levels: torch.Tensor) -> torch.Tensor:
    """Level times scale, which is exact, rounded once to the matrix's dtype; as bits."""
    assert matrix.scales is not None
    tile = torch.arange(block.first, block.end, device=matrix.device)
    tile_cols, groups = matrix.grid.tile_cols, -(-matrix.cols // matrix.group)
    group = tile // tile_cols * groups + tile % tile_cols // (matrix.group // TILE)
    scales = items(matrix.scales, torch.bfloat16).view(-1, TILE)[group].float()
    weights = levels.view(-1, TILE, TILE) * scales[:, :, None]
    dtype = DTYPES[matrix.dtype]
    return weights.to(dtype).view(_SIGNED[dtype.itemsize])


def _unpacked_bits(octets: torch.Tensor) -> torch.Tensor:
    """The bits of uint8 [tiles, bytes], lowest first: uint8 [tiles, 8 * bytes] of 0 and 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=octets.device)
    bits = (octets[:, :, None] >> shifts).bitwise_and_(1)
    return bits.view(len(octets), -1)


def _take(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The values at `places`, a temporary of int64; at one outside the array, its first or last."""
    if not values.numel():
        return values.new_zeros(places.shape)
    return values.take(places.clamp_(0, values.numel() - 1))


def _unsigned(array: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Entries [first, end) of an array of uint32, as int64."""
    return items(array, torch.int32)[first:end].to(torch.int64) & 0xFFFFFFFF


def check_out(matrix: TorchMatrix, out: torch.Tensor) -> None:
    """Raise KernelError where a matrix cannot be written to `out`, whatever its shape is."""
    dtype = DTYPES[matrix.dtype]
    if out.dtype != dtype:
        raise KernelError(f"out has dtype {out.dtype}, {dtype} is needed")
    if out.device != matrix.device:
        raise KernelError(f"out is on {out.device}, the matrix is on {matrix.device}")
    if not out.is_contiguous():
        raise KernelError(f"out has strides {list(out.stride())}, it must be contiguous")
