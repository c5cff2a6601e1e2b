"""One tile of a packed matrix, decoded by a Triton program: what all kernels for GPUs share.

A lane has an *octet*: 8 columns of one row, a byte of the bitmap. The rank of its first kept
element among those of the tile is found once (popcounts and one scan over the tile's 512 octets);
inside the octet eight steps follow that every compiler unrolls. So the work for each element is a
few instructions, and the eight elements of an octet are in one thread's registers.

Contents are hostile: a tile's record, as its bitmap and head say it must be, is compared with its
offsets and with the size of `values`, which the host knows, before anything follows it. Source:
FORMAT.md, section "Tile layout"; `reference.py` says the same in numpy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tierd_kernels.torch_expand import REASONS

NO_REASON = tl.constexpr(len(REASONS))
"""Of a tile in which nothing is wrong; the others are numbers of REASONS."""
_BITS = tl.constexpr(0)
_HEAD = tl.constexpr(1)
_OFFSETS = tl.constexpr(2)
_ESCAPES = tl.constexpr(3)


@triton.jit
def decode_tile(
    bitmap,
    offsets,
    heads,
    values,
    values_bytes,
    tiles,
    most_escapes,
    tile,
    height,
    width,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    PLANES: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Return (elements [64, 64] of DTYPE, reason): the tile, zero where nothing is kept.

    bitmap, offsets, heads, values: pointers to uint8, the bytes of the arrays (absent: None).
    values_bytes: the size of `values`.   tiles: of the matrix, `tile` is below it.
    height, width: of the part of the tile that lies in the matrix, 1 to 64.
    DTYPE: of the matrix, as tl.bfloat16. Levels of int8 and int4 are exact in it; the caller
    multiplies them by the scales.
    PLANES, most_escapes: as `TorchMatrix.most_planes` and `most_escapes`.
    VARIANT: how values are fetched, one of VARIANTS.
    reason: NO_REASON, or what is wrong with the tile (a number of REASONS); it is zeros then.
    """
    kept, rank, count, outside = _octets(bitmap, tile, height, width, MASKED)
    reason = tl.where(outside, _BITS, NO_REASON)
    begin, nbytes, sane = _record(offsets, tile, tiles, values_bytes)
    ITEM_BYTES: tl.constexpr = DTYPE.primitive_bitwidth // 8
    tl.static_assert(CODEC == "raw")
    needed = count * ITEM_BYTES
    reason = tl.where(
        sane & (nbytes == (needed + 15) // 16 * 16), reason, tl.minimum(reason, _OFFSETS)
    )
    kept = tl.where(reason == NO_REASON, kept, 0)
    item = values.to(tl.pointer_type(DTYPE)) + begin // ITEM_BYTES
    return _gathered(item, kept, rank), reason


@triton.jit
def _octets(bitmap, tile, height, width, MASKED: tl.constexpr):
    """Return the bits of the octets and the rank of each one's first element, [64, 8]; how many
    elements the tile keeps; and whether there are bits outside the matrix, which are left out.
    """
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, 8)[None, :] * 8
    inside = tl.where(row < height, tl.minimum(tl.maximum(width - col, 0), 8), 0)
    allowed = (1 << inside) - 1
    if not MASKED:
        return allowed, row * width + tl.minimum(col, width), height * width, height > 64
    stored = tl.load(bitmap + tile.to(tl.int64) * 512 + row * 8 + col // 8).to(tl.int32)
    kept = stored & allowed
    pairs = kept - (kept >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    ones = nibbles + (nibbles >> 4) & 0xF
    # One sum for two questions: there are at most 4096 elements.
    sums = tl.sum(tl.reshape(tl.where(stored == kept, ones, ones + 8192), [512]), axis=0)
    ranks = tl.reshape(tl.cumsum(tl.reshape(ones, [512]), axis=0), [64, 8])
    return kept, ranks - ones, sums % 8192, sums >= 8192


@triton.jit
def _record(offsets, tile, tiles, values_bytes):
    """Return where the record begins and its bytes, and whether it lies where it must."""
    offset = offsets.to(tl.pointer_type(tl.uint32)) + tile
    begin = tl.load(offset).to(tl.int64) * 16
    end = tl.load(offset + 1).to(tl.int64) * 16
    sane = end <= values_bytes
    sane &= (tile > 0) | (begin == 0)
    sane &= (tile + 1 < tiles) | (end == values_bytes)
    return begin, end - begin, sane


@triton.jit
def _gathered(item, kept, rank):
    """The items at the ranks of the kept elements, zeros elsewhere, [64, 64]."""
    zero = tl.zeros([64, 8], item.dtype.element_ty)
    e0 = tl.load(item + rank, mask=(kept & 1) != 0, other=zero)
    rank += kept & 1
    e1 = tl.load(item + rank, mask=(kept & 2) != 0, other=zero)
    rank += kept >> 1 & 1
    e2 = tl.load(item + rank, mask=(kept & 4) != 0, other=zero)
    rank += kept >> 2 & 1
    e3 = tl.load(item + rank, mask=(kept & 8) != 0, other=zero)
    rank += kept >> 3 & 1
    e4 = tl.load(item + rank, mask=(kept & 16) != 0, other=zero)
    rank += kept >> 4 & 1
    e5 = tl.load(item + rank, mask=(kept & 32) != 0, other=zero)
    rank += kept >> 5 & 1
    e6 = tl.load(item + rank, mask=(kept & 64) != 0, other=zero)
    rank += kept >> 6 & 1
    e7 = tl.load(item + rank, mask=(kept & 128) != 0, other=zero)
    return _joined(e0, e1, e2, e3, e4, e5, e6, e7)


@triton.jit
def _joined(e0, e1, e2, e3, e4, e5, e6, e7):
    """[64, 64] of the elements of all octets: e0 are the first ones, [64, 8]."""
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(even, odd), [64, 64])
