"""Global memory: the arrays that a launch gives, at their own addresses. Our memcheck.

An access is natural: as many bytes as it says, at a multiple of them, inside of one array that may
be written if it writes. Everything else is an error with the nearest array.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import Undefined, UnknownPtx, WrongAddress
from tests.kernels.gpu.ptx.owners import Owners

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT: Final = {
    nbytes: np.dtype(name) for nbytes, name in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"))
} | {16: np.dtype("c16")}
"""What numpy moves so many bytes as; nobody computes with it."""
_ORIGIN: Final = 1 << 16
"""The first address that is ever looked at: numpy takes no array that begins at 0."""
_LAST: Final = 1 << 47


def _everywhere(unit: np.dtype[Any]) -> Any:
    """All addresses of the process as an array. Only what was checked is looked at."""
    octets = (ctypes.c_uint8 * (_LAST - _ORIGIN)).from_address(_ORIGIN)
    return np.frombuffer(memoryview(octets), unit)


_ALL: Final = {nbytes: _everywhere(unit) for nbytes, unit in UNIT.items()}

ATOMIC: Final[dict[str, Callable[[int, int], int]]] = {
    "min": min,
    "max": max,
    "add": lambda old, new: old + new,
    "and": lambda old, new: old & new,
    "or": lambda old, new: old | new,
    "xor": lambda old, new: old ^ new,
    "exch": lambda old, new: new,
}


@dataclass(frozen=True, slots=True)
class Array:
    """`nbytes` at `address`, which live as long as the launch."""

    name: str
    address: int
    nbytes: int
    writable: bool = True

    def __str__(self) -> str:
        access = "" if self.writable else ", not to be written"
        return f"{self.name} at {self.address:#x}, {self.nbytes} bytes{access}"


class GlobalMemory:
    """Loads and stores of all threads at once; `where` (or None: everywhere) says of which."""

    def __init__(self, arrays: list[Array]) -> None:
        self._arrays = [array for array in arrays if array.nbytes]
        self._last: dict[int, Array] = {}
        self._owners = {array: Owners(array) for array in self._arrays if array.writable}
        self._program = 0

    def next_program(self) -> None:
        """Accesses from now on are those of another program of the grid."""
        self._program += 1

    def load(self, site: int, address: Any, nbytes: int, where: Any = None) -> Any:
        """[threads] of UNIT[nbytes]. Where nothing is loaded there is no number to rely on.

        site: of the instruction; it mostly asks for the same array as before.
        """
        if where is not None:
            found = np.full(len(address), 0xA5, np.uint8).repeat(nbytes).view(UNIT[nbytes])
            if where.any():
                found[where] = self.load(site, address[where], nbytes)
            return found
        array = self._check(site, address, nbytes, writes=False)
        if owners := self._owners.get(array):
            owners.read(self._program, address, nbytes)
        return _ALL[nbytes][(address - _ORIGIN).view(np.int64) // nbytes]

    def store(self, site: int, address: Any, data: Any, where: Any = None) -> None:
        """data: of UNIT of what is stored at each address."""
        if where is not None:
            address, data = address[where], data[where]
            if not len(address):
                return
        nbytes = data.itemsize
        array = self._check(site, address, nbytes, writes=True)
        self._owners[array].write(self._program, address, nbytes)
        places = (address - _ORIGIN).view(np.int64) // nbytes
        _ALL[nbytes][places] = data
        there = _ALL[nbytes][places]
        if there.tobytes() != data.tobytes():
            at = next(i for i in range(len(data)) if there[i].tobytes() != data[i].tobytes())
            raise Undefined(f"two threads store different numbers to {int(address[at]):#x}")

    def atomic(self, site: int, what: str, address: Any, data: Any, where: Any = None) -> Any:
        """The numbers that were there; threads come in their order. data: of its signedness."""
        old = np.zeros_like(data)
        lanes = np.arange(len(data)) if where is None else where.nonzero()[0]
        if not len(lanes):
            return old
        nbytes = data.itemsize
        self._check(site, address[lanes], nbytes, writes=True)
        everywhere = _ALL[nbytes].view(data.dtype)
        for lane in lanes:
            place = (int(address[lane]) - _ORIGIN) // nbytes
            old[lane] = everywhere[place]
            new = ATOMIC[what](int(old[lane]), int(data[lane]))
            everywhere[place] = np.array(new & (1 << 8 * nbytes) - 1, f"u{nbytes}").view(data.dtype)
        return old

    def _check(self, site: int, address: Any, nbytes: int, *, writes: bool) -> Array:
        if (address & np.uint64(nbytes - 1)).any():
            wrong = int(address[(address & np.uint64(nbytes - 1)) != 0][0])
            raise WrongAddress(f"{wrong:#x} is no multiple of {nbytes} bytes")
        array = self._last.get(site)
        if array is None or not self._inside(array, address, nbytes).all():
            array = self._find(site, address, nbytes)
        if writes and not array.writable:
            raise WrongAddress(f"writes to {array}")
        return array

    def _find(self, site: int, address: Any, nbytes: int) -> Array:
        """The first array that all of them lie in."""
        outside = np.ones(len(address), np.bool_)
        for array in self._arrays:
            inside = self._inside(array, address, nbytes)
            if inside.all():
                self._last[site] = array
                return array
            outside &= ~inside
        if outside.any():
            raise WrongAddress(self._strange(int(address[outside][0]), nbytes))
        raise UnknownPtx("an instruction whose threads reach into several arrays")

    @staticmethod
    def _inside(array: Array, address: Any, nbytes: int) -> Any:
        if array.nbytes < nbytes:
            return np.zeros(len(address), np.bool_)
        return address - np.uint64(array.address) <= np.uint64(array.nbytes - nbytes)

    def _strange(self, address: int, nbytes: int) -> str:
        if not self._arrays:
            return f"{nbytes} bytes at {address:#x}: no array was given"

        def distance(array: Array) -> int:
            return max(array.address - address, address + nbytes - array.address - array.nbytes)

        nearest = min(self._arrays, key=distance)
        offset = address - nearest.address
        return f"{nbytes} bytes at {address:#x}, byte {offset} of {nearest}"
