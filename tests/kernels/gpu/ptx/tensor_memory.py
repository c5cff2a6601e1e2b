"""Tensor memory of a program (tcgen05, sm_100): 128 lanes of 512 columns of 32 bits, a quarter of
the lanes for each warp, and the products that tensor cores make there while the program goes on.

Known is what Triton makes of a product of 64 rows: matrices of A and D in rows 0-15 of each
quarter. As on a card, what others see of a store or load has to be waited for, and to be followed
by a barrier; the registers of a load are there at once, because Triton itself uses them before it
waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import Race, Undefined, UnknownPtx, WrongAddress
from tests.kernels.gpu.ptx.tensor_cores import described, warpgroup_mma, widened
from tests.kernels.gpu.ptx.warps import LANES

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.shared import SharedMemory

_LANES: Final = 128
_COLUMNS: Final = 512
_HALF: Final = LANES // 2
_ROWS: Final = np.arange(64) // 16 * LANES + np.arange(64) % 16
"""The lane of each row of a matrix of 64."""
_SWIZZLE: Final = {0: 0, 2: 1, 4: 2, 6: 3}
"""Of this generation's descriptors, by that of the one before."""
_ORDERED, _WAITED, _ASYNC = 0, 1, 2
"""What a warp did at a place: before the last barrier; waited for; not waited for."""


class TensorMemory:
    def __init__(self, shared: SharedMemory) -> None:
        self._shared = shared
        self._words = np.zeros((_LANES, _COLUMNS), np.uint32)
        self._known = np.zeros((_LANES, _COLUMNS), np.bool_)
        self._stored = np.zeros((_LANES, _COLUMNS), np.uint8)
        self._loaded = np.zeros((_LANES, _COLUMNS), np.uint8)
        self._busy = np.zeros((_LANES, _COLUMNS), np.bool_)
        self._allocated: dict[int, int] = {}
        self._may_allocate = True
        self._products = 0  # since the last commit

    # ------------------------------------------------------------------------- allocation

    def allocate(self, threads: Any, address: Any, columns: int, where: Any) -> None:
        """By one warp; the address goes to shared memory."""
        warp = _one_warp(threads, where)
        if not self._may_allocate or columns not in (32, 64, 128, 256, 512):
            raise Undefined(f"{columns} columns of tensor memory cannot be had")
        first = max((start + many for start, many in self._allocated.items()), default=0)
        if first + columns > _COLUMNS:
            raise Undefined(f"{columns} columns behind {first} of {_COLUMNS}")
        self._allocated[first] = columns
        here = (threads // LANES == warp).nonzero()[0][:1]
        self._shared.store(threads[here], address[here], np.array([first], np.uint32))

    def relinquish(self, threads: Any, where: Any) -> None:
        _one_warp(threads, where)
        self._may_allocate = False

    def free(self, threads: Any, address: Any, columns: int, where: Any) -> None:
        _one_warp(threads, where)
        first = int(address[0])
        if self._allocated.pop(first, None) != columns:
            raise Undefined(f"{columns} columns at {first:#x} were not allocated")
        self._refuse(self._busy[:, first : first + columns], "is given back")
        self._known[:, first : first + columns] = False

    def end(self) -> None:
        """Of the program."""
        if self._allocated:
            raise Undefined(f"tensor memory is still allocated at its end: {self._allocated}")

    # ------------------------------------------------------------------- loads and stores

    def load(self, threads: Any, address: Any, count: int, split: int) -> list[Any]:
        """`.16x32bx2`: lanes 0-15 of each warp see `count` columns from its address on, lanes 16-31
        those `split` further, of the same 16 lanes of tensor memory."""
        lanes, columns = self._places(threads, address, count, split)
        self._refuse(self._busy[lanes, columns], "is loaded")
        if not self._known[lanes, columns].all():
            raise Undefined("tensor memory is loaded that nobody wrote")
        self._loaded[lanes, columns] = _ASYNC
        found = self._words[lanes, columns]
        return [found[:, i].copy() for i in range(count)]

    def store(self, threads: Any, address: Any, split: int, data: list[Any], where: Any) -> None:
        """The reverse of `load`, by all of these threads or none."""
        if where is not None and not where.all():
            if where.any():
                raise Undefined("some lanes store to tensor memory")
            return
        lanes, columns = self._places(threads, address, len(data), split)
        self._refuse(self._busy[lanes, columns], "is stored to")
        self._words[lanes, columns] = np.stack(data, 1)
        self._known[lanes, columns] = True
        self._stored[lanes, columns] = _ASYNC

    def wait(self, threads: Any, what: str) -> None:
        """For all loads ("ld") or stores ("st") of these warps."""
        did = self._loaded if what == "ld" else self._stored
        for warp in np.unique(threads // LANES):
            quarter = did[_quarter(warp)]
            quarter[quarter == _ASYNC] = _WAITED

    def barrier(self) -> None:
        """All threads were there."""
        for did in (self._loaded, self._stored):
            did[did == _WAITED] = _ORDERED

    def _places(self, threads: Any, address: Any, count: int, split: int) -> tuple[Any, Any]:
        """[threads, count] each."""
        lane = (address >> 16).astype(np.int64)[:, None]
        column = (address & 0xFFFF).astype(np.int64)[:, None] + np.arange(count)
        thread = (threads % LANES)[:, None]
        if (lane != (threads // LANES % 4 * LANES)[:, None]).any():
            raise WrongAddress(f"a warp at lane {int(lane[0, 0])} of tensor memory, not its own")
        column = column + np.where(thread < _HALF, 0, split)
        self._check(column)
        return np.broadcast_to(lane + thread % _HALF, column.shape), column

    def _check(self, columns: Any) -> None:
        inside = np.zeros(columns.shape, np.bool_)
        for first, many in self._allocated.items():
            inside |= (columns >= first) & (columns < first + many)
        if not inside.all():
            wrong = int(columns[~inside].reshape(-1)[0])
            raise WrongAddress(f"column {wrong} of tensor memory, allocated: {self._allocated}")

    @staticmethod
    def _refuse(busy: Any, does: str) -> None:
        if busy.any():
            raise Race(f"tensor memory of a product under way {does}")

    # -------------------------------------------------------------------------- products

    def multiply(
        self, threads: Any, d: Any, a: Any, b: Any, instruction: Any, adds: Any, where: Any
    ) -> None:
        """tcgen05.mma of kind::f16, by the one thread of `where`: d (+)= a @ b."""
        chosen = np.arange(len(threads)) if where is None else where.nonzero()[0]
        if not len(chosen):
            return
        if len(chosen) != 1:
            raise Undefined(f"{len(chosen)} threads start a product")
        at = int(chosen[0])
        columns, dtype = _shape(int(instruction[at]))
        sums = int(d[at]) + np.arange(columns)
        left = int(a[at]) + np.arange(8)
        for place in (sums, left):
            self._check(place)
        self._ordered(threads[at], left, self._stored, "reads")
        self._ordered(threads[at], sums, self._loaded, "writes")
        self._ordered(threads[at], sums, self._stored, "writes")
        halves = self._words[_ROWS[:, None], left].view(np.uint16).reshape(64, 16)
        if not self._known[_ROWS[:, None], left].all():
            raise Undefined("a product of tensor memory that nobody wrote")
        descriptor = int(b[at])
        swizzle = _SWIZZLE.get(descriptor >> 61 & 7)
        if swizzle is None or descriptor >> 46 & 7 != 1 or descriptor >> 52 & 1:
            raise UnknownPtx(f"matrix descriptor {descriptor:#x}")
        older = descriptor & ((1 << 46) - 1) | (descriptor >> 49 & 7) << 49 | swizzle << 62
        octets = self._shared.proxy_load(threads[at : at + 1], described(older, columns, 16))
        right = widened(np.ascontiguousarray(octets).view(np.uint16), dtype)
        before = None
        if adds[at]:
            if not self._known[_ROWS[:, None], sums].all():
                raise Undefined("a product is added to tensor memory that nobody wrote")
            before = self._words[_ROWS[:, None], sums].view(np.float32)
        found = warpgroup_mma(widened(halves, dtype), right.T, before)
        self._words[_ROWS[:, None], sums] = found.view(np.uint32)
        self._known[_ROWS[:, None], sums] = True
        for place in (sums, left):
            self._busy[:, place] = True
        self._products += 1

    def _ordered(self, thread: int, columns: Any, did: Any, does: str) -> None:
        """Raises Race unless what warps did there comes before a product of this thread."""
        state = did[_ROWS[:, None], columns]
        own = np.equal(_ROWS // LANES, thread // LANES % 4)[:, None]
        if ((state == _ASYNC) | (state == _WAITED) & ~own).any():
            raise Race(f"a product {does} tensor memory that warps did not wait for, or meet after")

    def take_products(self) -> int:
        """How many were started since this was asked last."""
        found, self._products = self._products, 0
        return found

    def done(self) -> None:
        """The products have ended. Tensor cores work in order: all before have, too."""
        self._busy[:] = False


def _shape(instruction: int) -> tuple[int, str]:
    """(columns, dtype) of an instruction descriptor. Raises UnknownPtx."""
    columns, rows = (instruction >> 17 & 63) * 8, (instruction >> 24 & 31) * 16
    formats = instruction >> 7 & 7, instruction >> 10 & 7
    known = 3 << 4 | 63 << 7 | 63 << 17 | 31 << 24
    if (
        rows != 64
        or instruction & ~known
        or instruction >> 4 & 3 != 1
        or formats not in ((0, 0), (1, 1))
    ):
        raise UnknownPtx(f"instruction descriptor {instruction:#x}")
    return columns, ("f16", "bf16")[formats[0]]


def _one_warp(threads: Any, where: Any) -> int:
    """Which one executes it, with all of its lanes."""
    chosen = threads if where is None else threads[where]
    if len(chosen) != LANES or (chosen // LANES != chosen[0] // LANES).any():
        raise Undefined(f"{len(chosen)} threads, an instruction of one warp")
    return int(chosen[0] // LANES)


def _quarter(warp: int) -> slice:
    return slice(warp % 4 * LANES, warp % 4 * LANES + LANES)
