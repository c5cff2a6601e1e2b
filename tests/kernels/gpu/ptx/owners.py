"""Which program of a grid touched each byte of global memory: nothing orders two of them.

That they run one after another here is not to be relied on. Atomic accesses are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.gpu.ptx.errors import Race

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.memory import Array

_NOBODY = 0
_SEVERAL = -1


class Owners:
    """Of the bytes of an array that may be written to. Programs are numbered from 1 on."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self._wrote = np.zeros(array.nbytes, np.int32)
        self._read = np.zeros(array.nbytes, np.int32)

    def read(self, program: int, address: Any, nbytes: int) -> None:
        """Raises Race where another program has written."""
        octets = self._octets(address, nbytes)
        self._compare(self._wrote, program, octets, "reads", "wrote")
        before = self._read[octets]
        others = (before != _NOBODY) & (before != program)
        self._read[octets] = np.where(others, _SEVERAL, program)

    def write(self, program: int, address: Any, nbytes: int) -> None:
        """Raises Race where another program has written or read."""
        octets = self._octets(address, nbytes)
        self._compare(self._wrote, program, octets, "writes", "wrote")
        self._compare(self._read, program, octets, "writes", "read")
        self._wrote[octets] = program

    def _octets(self, address: Any, nbytes: int) -> Any:
        first = (address - np.uint64(self._array.address)).view(np.int64)
        return (first[:, None] + np.arange(nbytes)).reshape(-1)

    def _compare(self, by: Any, program: int, octets: Any, does: str, did: str) -> None:
        found = by[octets]
        wrong = (found != _NOBODY) & (found != program)
        if wrong.any():
            at = int(wrong.nonzero()[0][0])
            whose = "others" if found[at] == _SEVERAL else f"program number {found[at] - 1}"
            raise Race(
                f"program number {program - 1} {does} byte {octets[at]} of {self._array}, which "
                f"{whose} {did}"
            )
