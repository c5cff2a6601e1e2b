"""Packed matrices of random content, beyond what an encoder would choose.

Every number of planes, any base, few or all elements escaped, any level, padding that is not zero:
a kernel has to read them all. Loaded by conftest.py and guard_pages.py.
"""

from typing import Any, Final

import numpy as np

from tierd_layouts.packed_matrix import PackedMatrix

TILE: Final = 64
FORMS: Final = (
    ("raw", True),
    ("exponent-packed", True),
    ("exponent-packed", False),
    ("int8", True),
    ("int8", False),
    ("int4", True),
    ("int4", False),
)
"""(codec, masked)"""
TAME: Final = (64, 192)
"""Top bytes of finite numbers whose products with ordinary ones neither overflow nor vanish."""


def random_packed(
    seed: int,
    rows: int,
    cols: int,
    dtype: str,
    form: tuple[str, bool],
    density: float = 0.5,
    *,
    group: int = 128,
    tops: tuple[int, int] = (0, 256),
    most_planes: int = 8,
) -> PackedMatrix:
    """Return a matrix whose tiles are empty, dense, or filled by `density`.

    tops: the top bytes (of an element rotated left by one) that occur, and the scales' likewise.
    """
    rng = np.random.default_rng(seed)
    codec, masked = form
    tile_rows, tile_cols = -(-rows // TILE), -(-cols // TILE)
    kept = np.zeros((tile_rows * TILE, tile_cols * TILE), np.bool_)
    kept[:rows, :cols] = True
    if masked:
        densities = rng.choice([density, density, density, 0, 1], (tile_rows, tile_cols))
        kept &= rng.random(kept.shape) < densities.repeat(TILE, axis=0).repeat(TILE, axis=1)
    tiles = kept.reshape(tile_rows, TILE, tile_cols, TILE).transpose(0, 2, 1, 3)
    by_tile = tiles.reshape(tile_rows * tile_cols, TILE * TILE)
    bitmap = np.packbits(by_tile, axis=1, bitorder="little").reshape(-1).view(np.uint64)
    item_bytes = 4 if dtype == "F32" else 2
    heads, records, offsets = [], [], [0]
    for count in by_tile.sum(axis=1).tolist():
        head, record = _record(rng, codec, count, item_bytes, tops, most_planes)
        heads.append(head)
        records.append(record + rng.bytes(-len(record) % 16))
        offsets.append(offsets[-1] + len(records[-1]) // 16)
    values: Any = np.frombuffer(b"".join(records), np.uint8).copy()
    if codec == "raw":
        values = values.view(f"u{item_bytes}")
    matrix = PackedMatrix(
        codec, dtype, rows, cols, bitmap if masked else None, np.array(offsets, np.uint32), values
    )
    if codec == "exponent-packed":
        return _with(matrix, heads=np.array(heads, np.uint32))
    if codec == "raw":
        return matrix
    # The top byte of a bf16 that is not negative is below 128.
    most = 1 << 15 if tops == (0, 256) else tops[1] << 7
    scales = rng.integers(tops[0] << 7, most, tile_rows * -(-cols // group) * TILE, np.uint16)
    scales[scales >= 0x7F80] = 0x3F80
    return _with(matrix, scales=scales, group=group)


def _with(matrix: PackedMatrix, **parts: Any) -> PackedMatrix:
    return PackedMatrix(
        matrix.codec,
        matrix.dtype,
        matrix.rows,
        matrix.cols,
        matrix.bitmap,
        matrix.offsets,
        matrix.values,
        **parts,
    )


def _record(
    rng: np.random.Generator,
    codec: str,
    count: int,
    item_bytes: int,
    tops: tuple[int, int],
    most_planes: int,
) -> tuple[int, bytes]:
    """Return a tile's head and record."""
    if codec == "int8":
        return 0, rng.bytes(count)
    if codec == "int4":
        return 0, rng.bytes(-(-count // 2))
    low = rng.integers(0, 256, (item_bytes - 1, count), np.uint8)
    if codec == "raw":
        top = rng.integers(*tops, count)
        turned = sum((plane.astype(int) << 8 * i for i, plane in enumerate(low)), top * 0)
        turned |= top << 8 * item_bytes - 8
        bits = turned >> 1 | (turned & 1) << 8 * item_bytes - 1
        return 0, bits.astype(f"<u{item_bytes}").tobytes()
    if count == 0:
        return 0, b""
    planes = int(rng.integers(0, most_planes + 1))
    window = 1 << planes
    first, end = tops
    base = int(rng.integers(max(0, first + 1 - window), min(end - 1, 256 - window) + 1))
    codes = rng.integers(max(first - base, 0), min(end - base, window), count)
    escaped = np.sort(rng.permutation(count)[: rng.choice([0, 0, 1, count // 3, count])])
    codes[escaped] = 0
    escapes = np.zeros((len(escaped), 4), np.uint8)
    escapes[:, :2] = escaped.astype("<u2").view(np.uint8).reshape(-1, 2)
    escapes[:, 2] = rng.integers(first, end, len(escaped))
    parts = [plane.tobytes() + rng.bytes(-count % 8) for plane in low]
    for plane in range(planes):
        padded = np.concatenate([codes >> plane & 1, rng.integers(0, 2, -count % 64)])
        parts.append(np.packbits(padded.astype(np.uint8), bitorder="little").tobytes())
    head = base | planes << 8 | len(escaped) << 16
    return head, b"".join([*parts, escapes.tobytes()])
