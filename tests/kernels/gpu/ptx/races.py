"""Who touched each byte of shared memory since threads last met. Our racecheck.

Two warps that touch a byte, one of them writing, have a barrier of the program between; two lanes
of a warp at least one of the warp (bar.warp.sync). That lanes go in step here, or meet in a
shuffle, is no order of their memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import Race
from tests.kernels.gpu.ptx.warps import LANES

BASE: Final = 1024
"""The first address: tiles of tensor cores begin at multiples of it. 0 is nobody's."""
ONES: Final = {nbytes: int("01" * nbytes, 16) for nbytes in (1, 2, 4, 8)}
"""1 in every byte of a word."""
_SEVERAL: Final = 255
_MET: Final = 254
"""Lanes that touched a byte: several, or one or more that have met since. A single one is its
number and 1."""


@dataclass(slots=True)
class Flags:
    """A byte for each byte of shared memory, 0 at first. views: as words, by their bytes."""

    octets: Any
    views: dict[int, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.views = {nbytes: self.octets.view(f"u{nbytes}") for nbytes in (1, 2, 4, 8)}


def named(address: int) -> str:
    return f"shared+{address - BASE}"


class Races:
    """Accesses come as words of `unit` bytes, naturally aligned: the numbers of the words, and the
    thread that touches each."""

    def __init__(self, room: int, threads: int) -> None:
        warps = -(-threads // LANES)
        self._wrote, self._read = (Flags(np.zeros((warps, room), np.uint8)) for _ in range(2))
        self._wrote_any = self._read_any = False

    def read(self, threads: Any, words: Any, unit: int) -> None:
        """Raises Race."""
        if self._wrote_any:
            self._compare(self._wrote, "reads", "written", threads, words, unit)
        self._note(self._read, threads, words, unit)
        self._read_any = True

    def write(self, threads: Any, words: Any, unit: int) -> None:
        """Raises Race."""
        if self._wrote_any:
            self._compare(self._wrote, "writes", "written", threads, words, unit)
        if self._read_any:
            self._compare(self._read, "writes", "read", threads, words, unit)
        self._note(self._wrote, threads, words, unit)
        self._wrote_any = True
        # Two of these threads may have written one word.
        self._compare(self._wrote, "writes", "written", threads, words, unit, within=False)

    def barrier(self) -> None:
        """All threads met."""
        if self._wrote_any:
            self._wrote.octets[:] = 0
        if self._read_any:
            self._read.octets[:] = 0
        self._wrote_any = self._read_any = False

    def meet(self, threads: Any) -> None:
        """The lanes of each of these warps met: what they touched they may all touch, but other
        warps still not."""
        for warp in np.unique(threads // LANES):
            for flags in (self._wrote, self._read):
                row = flags.octets[warp]
                row[row != 0] = _MET

    def writers(self, warps: Any) -> tuple[Any, Any]:
        """Bytes that these warps wrote since the last barrier, and that nobody did."""
        return self._wrote.octets[warps].any(axis=0), ~self._wrote.octets.any(axis=0)

    def _note(self, flags: Flags, threads: Any, words: Any, unit: int) -> None:
        rows, view = threads // LANES, flags.views[unit]
        lanes = _words_of(threads, unit)
        before = view[rows, words]
        view[rows, words] = lanes
        if (other := view[rows, words] != lanes).any():
            view[rows[other], words[other]] = lanes.dtype.type(ONES[unit] * _SEVERAL)
        if (foreign := _foreign(before, lanes, unit)).any():
            wrong = foreign.any(axis=1)
            octets = _octets(view[rows[wrong], words[wrong]], unit)
            octets[foreign[wrong]] = _SEVERAL
            view[rows[wrong], words[wrong]] = octets.view(lanes.dtype).reshape(-1)

    def _compare(
        self,
        flags: Flags,
        does: str,
        did: str,
        threads: Any,
        words: Any,
        unit: int,
        *,
        within: bool = True,
    ) -> None:
        """Raises Race where another warp, or (within) another lane, touched one of the words."""
        view = flags.views[unit]
        rows = threads // LANES
        found = view[:, words] != 0
        found[rows, np.arange(len(words))] = False
        if found.any():
            warp, at = (int(index[0]) for index in found.nonzero())
            raise Race(
                f"warp {rows[at]} {does} byte {named(int(words[at]) * unit)}, {did} by warp {warp} "
                "with no barrier between them"
            )
        if not within:
            return
        foreign = _foreign(view[rows, words], _words_of(threads, unit), unit).any(axis=1)
        if foreign.any():
            at = int(foreign.nonzero()[0][0])
            raise Race(
                f"thread {threads[at]} {does} word {named(int(words[at]) * unit)}, {did} by "
                "another lane of its warp with no bar.warp.sync between them"
            )


def _words_of(threads: Any, unit: int) -> Any:
    """The lane's number in each byte."""
    return (threads % LANES + 1).astype(f"u{unit}") * np.dtype(f"u{unit}").type(ONES[unit])


def _octets(words: Any, unit: int) -> Any:
    return words.view(np.uint8).reshape(-1, unit)


def _foreign(words: Any, lanes: Any, unit: int) -> Any:
    """Bytes [words, unit] that another lane touched, which has not been met since."""
    if (words == lanes).all() or not words.any():
        return np.zeros((len(words), unit), np.bool_)
    found = _octets(words, unit)
    return (found != 0) & (found != _MET) & (found != _octets(lanes, unit))
