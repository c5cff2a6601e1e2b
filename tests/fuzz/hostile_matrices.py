"""Small packed matrices of every form, and what somebody could do to their arrays."""

import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tierd_layouts import exponent_packed, packed_matrix, quantised
from tierd_layouts.packed_matrix import PackedMatrix

if TYPE_CHECKING:
    from tests.fuzz.choices import Choices

TILE: Final = 64
DTYPES: Final = ("BF16", "F16", "F32")
CODECS: Final = ("raw", "exponent-packed", "int8", "int4", "dense", "zip")
SHAPES: Final = ((1, 1), (64, 64), (65, 3), (70, 130), (3, 200), (130, 65), (0, 64), (64, 0))
CONTENTS: Final = ("weights", "sparse", "special", "records")
_kernels = Path(__file__).parents[1] / "kernels"
_random = runpy.run_path(str(_kernels / "random_matrices.py"))
FORMS: Final[Sequence[tuple[str, bool]]] = _random["FORMS"]


def any_matrix(choices: "Choices") -> PackedMatrix:
    """Return one that is right, its arrays in memory of their own."""
    matrix = _seed(
        choices.pick(FORMS),
        choices.pick(DTYPES),
        choices.pick(SHAPES),
        choices.pick(CONTENTS),
        64 << choices.below(2),
    )
    return own_memory(matrix)


def mutate(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    """Return the matrix after up to six changes, half the time with offsets that fit it again."""
    for _ in range(choices.below(7)):
        matrix = choices.pick(_STEPS)(choices, matrix)
    return repaired(matrix) if choices.flag() else matrix


def own_memory(matrix: PackedMatrix) -> PackedMatrix:
    """Return the matrix with every array in its own allocation: a sanitizer sees their ends."""
    copies: dict[str, Any] = {name: np.array(array) for name, array in matrix.arrays().items()}
    return replace(matrix, **copies)


@cache
def _seed(
    form: tuple[str, bool], dtype: str, shape: tuple[int, int], content: str, group: int
) -> PackedMatrix:
    codec, masked = form
    if content == "records":  # what no encoder would choose; not all of it is valid
        made: PackedMatrix = _random["random_packed"](group, *shape, dtype, form, group=group)
        return made
    bits = _bits(dtype, shape, content)
    if codec == "raw":
        return packed_matrix.encode_raw(bits, dtype)
    if codec == "exponent-packed":
        return exponent_packed.encode(bits, dtype, masked=masked)
    if content == "special":
        bits = np.where(_magnitude(bits, dtype) < _INFINITY[dtype], bits, bits.dtype.type(1))
    return quantised.encode(bits, dtype, codec=codec, group=group, masked=masked)


_INFINITY: Final = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def _magnitude(bits: Any, dtype: str) -> Any:
    return bits & (0x7FFFFFFF if dtype == "F32" else 0x7FFF)


def _bits(dtype: str, shape: tuple[int, int], content: str) -> Any:
    rng = np.random.default_rng([*shape, DTYPES.index(dtype)])
    numbers = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    numbers *= rng.choice(np.array([1, 1e-3, 30], np.float32), shape, p=[0.96, 0.02, 0.02])
    if dtype == "F16":
        bits: Any = numbers.astype(np.float16).view(np.uint16)
    else:
        bits = numbers.view(np.uint32)
        bits = bits if dtype == "F32" else (bits >> 16).astype(np.uint16)
    if content == "special":
        odd = rng.integers(0, np.iinfo(bits.dtype).max, shape, bits.dtype, endpoint=True)
        ends = np.array([1, 1 << bits.itemsize * 8 - 1, np.iinfo(bits.dtype).max], bits.dtype)
        bits = np.where(rng.random(shape) < 0.5, odd, rng.choice(ends, shape))
    if content != "weights":
        bits = bits * (rng.random(shape) < 0.4).astype(bits.dtype)
    return bits


# --------------------------------------------------------------------------------------------------
# Changes: of a bit, of an item, of a record, of a whole array, of what is said about the arrays


def _named(choices: "Choices", matrix: PackedMatrix) -> tuple[str, Any]:
    return choices.pick([*matrix.arrays().items()])


def _flip(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    _, array = _named(choices, matrix)
    if array.size:
        array.view(np.uint8)[choices.below(array.nbytes)] ^= 1 << choices.below(8)
    return matrix


def _set_item(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    _, array = _named(choices, matrix)
    if array.size:
        place = choices.below(array.size)
        old = int(array[choices.below(array.size)]) if choices.flag() else int(array[place])
        new = choices.integer() if choices.flag() else old + choices.below(5) - 2
        array[place] = new % (1 << 8 * array.itemsize)
    return matrix


def _set_head(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    if matrix.heads is not None and matrix.heads.size:
        place = choices.below(matrix.heads.size)
        head = int(matrix.heads[place])
        base, planes, escapes = head & 0xFF, head >> 8 & 0xFF, head >> 16
        step = choices.below(5) - 2
        match choices.below(3):
            case 0:
                base = (base + step) % 256
            case 1:
                planes = (planes + step) % 10
            case _:
                escapes = (escapes + step) % 4098
        changed = base | planes << 8 | escapes << 16
        matrix.heads[place] = changed % (1 << 8 * matrix.heads.itemsize)
    return matrix


def _set_in_record(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    """Near the start or the end of a tile's run: planes, escapes, the gap."""
    if len(matrix.offsets) > 1:
        tile = choices.below(len(matrix.offsets) - 1)
        begin, end = int(matrix.offsets[tile]) * 16, int(matrix.offsets[tile + 1]) * 16
        place = end - 1 - choices.below(48) if choices.flag() else begin + choices.below(1024)
        values = matrix.values.view(np.uint8)
        if 0 <= place < values.size:
            values[place] = choices.below(256)
    return matrix


def _resize(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    name, array = _named(choices, matrix)
    length = max(0, array.size + choices.pick((-64, -16, -8, -1, 1, 8, 16, 64)))
    resized = np.zeros(length, array.dtype)
    resized[: min(length, array.size)] = array[:length]
    return _with(matrix, name, resized)


def _retype(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    name, array = _named(choices, matrix)
    if choices.flag():
        return _with(matrix, name, array.astype(choices.pick((np.uint8, np.uint16, np.uint32))))
    return _with(matrix, name, None) if name in ("bitmap", "heads", "scales") else matrix


def _restate(choices: "Choices", matrix: PackedMatrix) -> PackedMatrix:
    match choices.below(6):
        case 0:
            return replace(matrix, codec=choices.pick(CODECS))
        case 1:
            return replace(matrix, dtype=choices.pick((*DTYPES, "F64")))
        case 2:
            return replace(matrix, group=choices.integer())
        case 3:
            return replace(matrix, rows=choices.integer(), cols=matrix.cols * choices.below(2))
        case 4:
            return replace(matrix, cols=choices.integer())
        case _:
            near = choices.below(5) - 2
            return replace(matrix, rows=matrix.rows + near, cols=matrix.cols - near)


def _with(matrix: PackedMatrix, name: str, array: Any) -> PackedMatrix:
    changes: Any = {name: array}
    return replace(matrix, **changes)


_STEPS: Final[Sequence[Callable[["Choices", PackedMatrix], PackedMatrix]]] = (
    *(_flip, _flip, _set_item, _set_item, _set_head, _set_in_record, _set_in_record),
    *(_resize, _retype, _restate),
)


def repaired(matrix: PackedMatrix) -> PackedMatrix:
    """Return the matrix with the offsets that bitmap and heads demand, each run cut or filled up.

    So what comes after the check of the offsets is reached. A matrix beyond repair stays as it is.
    """
    tile_rows, tile_cols = -(-matrix.rows // TILE), -(-matrix.cols // TILE)
    tiles = tile_rows * tile_cols
    heads = tiles if matrix.heads is None else matrix.heads.size
    if not 0 < tiles == len(matrix.offsets) - 1 == heads:
        return matrix
    if matrix.bitmap is not None:
        if matrix.bitmap.size != tiles * TILE:
            return matrix
        words = matrix.bitmap.reshape(tiles, TILE)
        counts = np.bitwise_count(words).sum(axis=1, dtype=np.int64).tolist()
    else:
        high = [min(TILE, matrix.rows - TILE * i) for i in range(tile_rows)]
        wide = [min(TILE, matrix.cols - TILE * i) for i in range(tile_cols)]
        counts = [h * w for h in high for w in wide]
    values = matrix.values.view(np.uint8)
    runs, offsets = [], [0]
    for tile, count in enumerate(counts):
        head = int(matrix.heads[tile]) if matrix.heads is not None and count else 0
        nbytes = -(-_record_bytes(matrix, count, head) // 16) * 16
        begin, end = int(matrix.offsets[tile]) * 16, int(matrix.offsets[tile + 1]) * 16
        run = values[begin : max(begin, min(end, begin + nbytes))].tobytes()
        runs.append(run.ljust(nbytes, b"\0"))
        offsets.append(offsets[-1] + nbytes // 16)
    joined = np.frombuffer(b"".join(runs), np.uint8).copy()
    return replace(
        matrix,
        offsets=np.array(offsets, np.uint32),
        values=joined.view(matrix.values.dtype),
    )


def _record_bytes(matrix: PackedMatrix, count: int, head: int) -> int:
    item_bytes = 4 if matrix.dtype == "F32" else 2
    match matrix.codec:
        case "int8":
            return count
        case "int4":
            return -(-count // 2)
        case "exponent-packed":
            planes, escapes = min(head >> 8 & 0xFF, 9), min(head >> 16, 5000)
            return (
                (item_bytes - 1) * -(-count // 8) * 8 + planes * -(-count // 64) * 8 + 4 * escapes
            )
    return count * item_bytes
