"""Matrices that lie in the registers of a warp, or in shared memory: mma, ldmatrix, wgmma.

Layouts as the tables of the PTX manual have them. A product is exact in float64, and so is its sum
but for float64's rounding; it is rounded to float32 once. The tensor cores of a card cut off bits
inside, as they like: what is compared with them needs a bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx.arithmetic import from_bfloat16
from tests.kernels.gpu.ptx.errors import UnknownPtx
from tests.kernels.gpu.ptx.warps import LANES

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.shared import SharedMemory

_LANE: Final = np.arange(LANES)
_GROUP: Final = _LANE // 4
_PAIR: Final = _LANE % 4 * 2
_SWIZZLES: Final = {1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""By the descriptor's code: bytes of a row, and which of its pieces of 16 bytes change places."""


def widened(bits: Any, dtype: str) -> Any:
    """uint16 of `dtype` as float64."""
    if dtype == "bf16":
        return from_bfloat16(bits).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


def halves(registers: list[Any]) -> Any:
    """uint16 [warps, registers, lanes, 2] of uint32 [threads] each."""
    words = np.stack(registers).reshape(len(registers), -1, LANES).transpose(1, 0, 2)
    return np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)


def left_rows(registers: list[Any], dtype: str) -> Any:
    """Fragment A of m16k16: float64 [warps, 16, 16]."""
    parts = halves(registers)
    found = np.empty((len(parts), 16, 16))
    for number in range(4):
        for half in range(2):
            row = _GROUP + 8 * (number % 2)
            col = _PAIR + half + 8 * (number // 2)
            found[:, row, col] = widened(parts[:, number, :, half], dtype)
    return found


def right_columns(registers: list[Any], dtype: str) -> Any:
    """Fragment B of k16n8: float64 [warps, 16, 8]."""
    parts = halves(registers)
    found = np.empty((len(parts), 16, 8))
    for number in range(2):
        for half in range(2):
            found[:, _PAIR + half + 8 * number, _GROUP] = widened(parts[:, number, :, half], dtype)
    return found


def sums(registers: list[Any]) -> Any:
    """Fragment C or D of m16n8, one beside another: float32 [warps, 16, 2 * registers]."""
    words = np.stack(registers).reshape(len(registers), -1, LANES)
    found = np.empty((words.shape[1], 16, 2 * len(registers)), np.float32)
    for number, word in enumerate(words):
        row, col = _place_of_sum(number)
        found[:, row, col] = word.view(np.float32)
    return found


def registers_of_sums(matrix: Any) -> list[Any]:
    """The reverse of `sums`: uint32 [threads] each."""
    found = []
    for number in range(matrix.shape[2] // 2):
        row, col = _place_of_sum(number)
        part = matrix[:, row, col]
        found.append(np.ascontiguousarray(part, np.float32).view(np.uint32).reshape(-1))
    return found


def _place_of_sum(number: int) -> tuple[Any, Any]:
    return _GROUP + 8 * (number % 4 // 2), _PAIR + number % 2 + 8 * (number // 4)


def mma(a: list[Any], b: list[Any], c: list[Any], dtype: str) -> list[Any]:
    """mma.m16n8k16: d = a @ b + c; four registers."""
    product = left_rows(a, dtype) @ right_columns(b, dtype)
    return registers_of_sums((product + sums(c)).astype(np.float32))


def load_matrices(
    shared: SharedMemory, threads: Any, address: Any, count: int, *, turned: bool
) -> list[Any]:
    """ldmatrix: `count` registers of 8 x 8 elements of 16 bits; 8 lanes say where rows begin."""
    found = []
    lanes = threads.reshape(-1, LANES)
    rows = address.reshape(-1, LANES)
    for number in range(count):
        part = slice(8 * number, 8 * number + 8)
        words = shared.load(lanes[:, part].reshape(-1), rows[:, part].reshape(-1), 16)
        matrix = words.view(np.uint16).reshape(-1, 8, 8)
        if turned:
            matrix = matrix.transpose(0, 2, 1)
        pairs = np.stack([matrix[:, _GROUP, _PAIR], matrix[:, _GROUP, _PAIR + 1]], axis=2)
        found.append(np.ascontiguousarray(pairs).view(np.uint32).reshape(-1))
    return found


def store_matrices(
    shared: SharedMemory, threads: Any, address: Any, registers: list[Any], *, turned: bool
) -> None:
    """stmatrix: the reverse of `load_matrices`."""
    lanes = threads.reshape(-1, LANES)
    rows = address.reshape(-1, LANES)
    for number, register in enumerate(registers):
        pairs = register.view(np.uint16).reshape(-1, LANES, 2)
        matrix = np.empty((len(pairs), 8, 8), np.uint16)
        matrix[:, _GROUP, _PAIR] = pairs[:, :, 0]
        matrix[:, _GROUP, _PAIR + 1] = pairs[:, :, 1]
        if turned:
            matrix = matrix.transpose(0, 2, 1)
        part = slice(8 * number, 8 * number + 8)
        data = np.ascontiguousarray(matrix).view(np.complex128).reshape(-1)
        shared.store(lanes[:, part].reshape(-1), rows[:, part].reshape(-1), data)


def described(descriptor: int, rows: int, columns: int) -> Any:
    """Addresses of the bytes [rows, 2 * columns] of a matrix of 16 bits whose rows (of A, or
    columns of B) lie along K. Raises UnknownPtx for what the descriptor says otherwise.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    base, swizzle = descriptor >> 49 & 7, descriptor >> 62 & 3
    row = np.arange(rows)[:, None]
    octet = np.arange(2 * columns)[None, :]
    if swizzle == 0:
        return start + row // 8 * stride + row % 8 * 16 + octet // 16 * leading + octet % 16
    width, pieces = _SWIZZLES[swizzle]
    if base:
        raise UnknownPtx(f"a matrix descriptor with base offset {base}")
    address = start + row // 8 * stride + row % 8 * width + octet
    return address ^ (address >> 7 & pieces) << 4


def warpgroup_mma(a: Any, b: Any, c: Any | None) -> Any:
    """wgmma: float64 [64, 16] @ [16, n] + float32 [64, n]; None counts as zeros."""
    product = a @ b
    return (product if c is None else product + c).astype(np.float32)
