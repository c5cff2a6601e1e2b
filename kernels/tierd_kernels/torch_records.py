"""The records of tiles, unpacked by torch operations: `torch_expand` puts elements in their places.

Every place that is read is held inside its array, whatever a record says. Source: FORMAT.md,
section "Tile layout".
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from tierd_kernels.faults import ESCAPES, HEAD, OFFSETS, REASONS
from tierd_kernels.geometry import RUN_UNIT, TILE
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix, items

PLACES: Final = TILE * TILE
SIGNED: Final = {2: torch.int16, 4: torch.int32}
"""torch has few operations for unsigned integers. These are only bits."""


def stored_elements(
    matrix: TorchMatrix, first: int, end: int, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The elements of each tile's record, [tiles, 4097], and what is wrong with each tile.

    Elements are bits, or the levels of a lossy codec. The last column is zero.
    """
    offsets = _unsigned(matrix.offsets, first, end + 1) * RUN_UNIT
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
            heads = _heads(matrix, first, end, counts)
            needed = heads.record_bytes
            wrong = torch.where(heads.sane, wrong, HEAD)
    fits = nbytes == (needed + RUN_UNIT - 1) // RUN_UNIT * RUN_UNIT
    fits &= offsets[1:] <= matrix.values.numel()
    if first == 0:
        fits[0] &= begin[0] == 0
    if end == matrix.grid.tiles:
        fits[-1] &= offsets[-1] == matrix.values.numel()
    wrong = torch.where(fits, wrong, wrong.clamp(max=OFFSETS))
    begin = torch.where(wrong < len(REASONS), 0, begin)
    if heads is not None:
        return _unpacked_elements(matrix, begin, heads, wrong)
    stored = _plain_elements(matrix, begin, item_bytes)
    stored[:, PLACES:] = 0
    return stored, wrong


def _plain_elements(matrix: TorchMatrix, begin: torch.Tensor, item_bytes: int) -> torch.Tensor:
    """Elements that are whole bytes or halves of one, [tiles, 4097 or 4098]."""
    step = torch.arange(PLACES + 1, device=matrix.device)
    if matrix.codec == "raw":
        values = items(matrix.values, SIGNED[item_bytes])
        return _take(values, begin[:, None] // item_bytes + step)
    if matrix.codec == "int8":
        return _take(matrix.values, begin[:, None] + step).view(torch.int8)
    pairs = _take(matrix.values, begin[:, None] + step[: PLACES // 2 + 1])
    halves = torch.stack([pairs & 15, pairs >> 4], dim=2).view(len(pairs), -1)
    return halves.bitwise_xor_(8).view(torch.int8).sub_(8)  # two's complement of 4 bits


class _Heads(NamedTuple):
    """What the heads of some tiles say, int64 [tiles]; zeros where it cannot be."""

    counts: torch.Tensor  # of elements
    sane: torch.Tensor
    base: torch.Tensor
    planes: torch.Tensor
    escapes: torch.Tensor
    plane_bytes: torch.Tensor  # of a plane of bytes
    bit_bytes: torch.Tensor  # of a plane of bits
    escapes_at: torch.Tensor  # in the record
    record_bytes: torch.Tensor


def _heads(matrix: TorchMatrix, first: int, end: int, counts: torch.Tensor) -> _Heads:
    assert matrix.heads is not None
    heads = _unsigned(matrix.heads, first, end)
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
    tops = torch.zeros((len(begin), PLACES + 1), dtype=torch.uint8, device=matrix.device)
    codes = tops[:, :PLACES]
    place = (begin + low * heads.plane_bytes)[:, None] + torch.arange(
        PLACES // 8, device=matrix.device
    )
    for plane in range(matrix.most_planes):
        bits = unpacked_bits(_take(matrix.values, place + plane * heads.bit_bytes[:, None]))
        codes += bits.mul_((plane < heads.planes)[:, None]).bitwise_left_shift_(plane)
    codes += heads.base.to(torch.uint8)[:, None]
    if matrix.most_escapes:
        wrong = _escape(matrix, begin, heads, tops, wrong)
    elements = tops.to(wide).bitwise_left_shift_(8 * low)
    del tops
    step = torch.arange(PLACES + 1, device=matrix.device)
    for byte in range(low):
        place = (begin + byte * heads.plane_bytes)[:, None] + step
        elements |= _take(matrix.values, place).to(wide).bitwise_left_shift_(8 * byte)
    signs = (elements & 1).bitwise_left_shift_(8 * low + 7)
    elements = elements.bitwise_right_shift_(1).bitwise_or_(signs).to(SIGNED[low + 1])
    elements[:, PLACES:] = 0
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
    element = high.to(torch.int64).mul_(256).add_(low).clamp_(max=PLACES)
    del low, high
    element.masked_fill_(~there, PLACES)
    # What follows an escape that is there: a larger number, or the end of the elements.
    off = (element >= heads.counts[:, None]) | (pad != 0)
    off[:, 1:] |= element[:, 1:] <= element[:, :-1]
    tops.scatter_(1, element, top)
    return torch.where((off & there).any(1), wrong.clamp(max=ESCAPES), wrong)


def unpacked_bits(octets: torch.Tensor) -> torch.Tensor:
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
