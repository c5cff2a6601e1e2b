"""Shared memory of a program, and what is under way in it.

A byte that nobody wrote, that a cp.async is still to write, or that a tensor core may still read,
is not touched; who touched what since the last barrier is for `races.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import PtxError, Race, Undefined, WrongAddress
from tests.kernels.gpu.ptx.memory import UNIT
from tests.kernels.gpu.ptx.races import BASE, ONES, Flags, Races, named
from tests.kernels.gpu.ptx.warps import LANES

_POISON: Final = 0xA5


@dataclass(frozen=True, slots=True)
class _Copy:
    """A cp.async under way. groups: the number of the group that each thread will commit it to."""

    threads: Any
    groups: Any
    address: Any
    data: Any


class SharedMemory:
    def __init__(self, nbytes: int, threads: int) -> None:
        self.nbytes = nbytes
        room = -(-(BASE + nbytes) // 16) * 16
        octets = np.zeros(room + 16, np.uint8)
        octets = octets[-octets.ctypes.data % 16 :][:room]
        octets[:] = _POISON
        self._units = {size: octets.view(unit) for size, unit in UNIT.items()}
        self._known = Flags(np.zeros(room, np.uint8))
        self._awaited = Flags(np.zeros(room, np.uint8))
        self._unfenced = Flags(np.zeros(room, np.uint8))
        self._races = Races(room, threads)
        self._pinned = Flags(np.zeros(room, np.uint8))
        self._pins: list[Any] = []
        self._commits = np.zeros(threads, np.int64)
        self._copies: list[_Copy] = []

    # ------------------------------------------------------------------------- synchronous

    def load(self, threads: Any, address: Any, nbytes: int, where: Any = None) -> Any:
        """[threads] of UNIT[nbytes], as `GlobalMemory.load`."""
        if where is not None:
            found = np.full(len(address), _POISON, np.uint8).repeat(nbytes).view(UNIT[nbytes])
            if where.any():
                found[where] = self.load(threads[where], address[where], nbytes)
            return found
        self._look(threads, address, nbytes)
        return self._units[nbytes][address.astype(np.int64) // nbytes]

    def store(self, threads: Any, address: Any, data: Any, where: Any = None) -> None:
        """data: of UNIT of what is stored at each address."""
        if where is not None:
            threads, address, data = threads[where], address[where], data[where]
            if not len(address):
                return
        self._touch(threads, address, data.itemsize)
        self._put(address, data)

    def barrier(self) -> None:
        """All threads were there."""
        self._races.barrier()

    def meet(self, threads: Any) -> None:
        """The lanes of these warps were at a bar.warp.sync."""
        self._races.meet(threads)

    # ------------------------------------------------------------------------ asynchronous

    def copy(self, threads: Any, address: Any, data: Any, where: Any = None) -> None:
        """cp.async: the bytes arrive when the threads have waited for them, until then nobody
        touches them."""
        if where is not None:
            threads, address, data = threads[where], address[where], data[where]
            if not len(address):
                return
        self._touch(threads, address, data.itemsize)
        unit, places = _places(address, data.itemsize)
        self._awaited.views[unit][places] = ONES[unit]
        self._copies.append(_Copy(threads, self._commits[threads], address, data))

    def commit(self, threads: Any) -> None:
        self._commits[threads] += 1

    def wait(self, threads: Any, most: int | None) -> None:
        """Until at most so many of the groups of a thread are under way; None: all its copies."""
        waits = np.full(len(self._commits), -1)
        waits[threads] = self._commits[threads] - most if most is not None else np.iinfo("i8").max
        left = []
        for copy in self._copies:
            arrived = copy.groups < waits[copy.threads]
            if arrived.any():
                address, data = copy.address[arrived], copy.data[arrived]
                unit, places = _places(address, data.itemsize)
                self._awaited.views[unit][places] = 0
                self._touch(copy.threads[arrived], address, data.itemsize)
                self._put(address, data)
            if not arrived.all():
                kept = ~arrived
                parts = (copy.threads, copy.groups, copy.address, copy.data)
                left.append(_Copy(*(part[kept] for part in parts)))
        self._copies = left

    def fence(self, threads: Any) -> None:
        """fence.proxy.async: what these threads wrote, or can see, the tensor cores see too."""
        warps = np.unique(threads // LANES)
        ours, seen = self._races.writers(warps)
        self._unfenced.octets[ours | seen] = 0

    def proxy_load(self, threads: Any, octets: Any) -> Any:
        """What the tensor cores read for all warps of `threads`: uint8 of the shape of `octets`,
        which are addresses of single bytes. Nobody may write there until `unpin`."""
        flat = octets.reshape(-1).astype(np.int64)
        self._look_as_warps(threads, flat)
        self._pins.append(flat)
        self._pinned.octets[flat] = 1
        if self._unfenced.octets[flat].any():
            wrong = int(flat[self._unfenced.octets[flat] != 0][0])
            raise Race(f"tensor cores read byte {named(wrong)} without fence.proxy.async after it")
        return self._units[1][flat].reshape(octets.shape)

    def unpin(self, threads: Any, loads: int) -> None:
        """The first so many of `proxy_load` have ended, as `threads` now know."""
        done, self._pins = self._pins[:loads], self._pins[loads:]
        for flat in done:
            self._pinned.octets[flat] = 0
            self._look_as_warps(threads, flat)
        for flat in self._pins:
            self._pinned.octets[flat] = 1

    # ----------------------------------------------------------------------------- checks

    def _look_as_warps(self, threads: Any, octets: Any) -> None:
        for warp in np.unique(threads // LANES):
            self._look(np.full(len(octets), warp * LANES), octets, 1)

    def _look(self, threads: Any, address: Any, nbytes: int) -> None:
        self._check(address, nbytes)
        unit, places = _places(address, nbytes)
        lanes = _lanes(threads, len(places))
        if self._copies:
            self._ask_copies("reads", lanes, places, unit)
        if (self._known.views[unit][places] != ONES[unit]).any():
            self._refuse(Undefined, "reads", "that nobody wrote", self._known, lanes, places, unit)
        self._races.read(lanes, places, unit)

    def _touch(self, threads: Any, address: Any, nbytes: int) -> None:
        self._check(address, nbytes)
        unit, places = _places(address, nbytes)
        lanes = _lanes(threads, len(places))
        self._races.write(lanes, places, unit)
        if self._copies:
            self._ask_copies("writes", lanes, places, unit)
        if self._pins and self._pinned.views[unit][places].any():
            why = "that tensor cores may still read"
            self._refuse(Race, "writes", why, self._pinned, lanes, places, unit)

    def _put(self, address: Any, data: Any) -> None:
        units = self._units[data.itemsize]
        places = address.astype(np.int64) // data.itemsize
        units[places] = data
        there = units[places]
        if there.tobytes() != data.tobytes():
            at = next(i for i in range(len(data)) if there[i].tobytes() != data[i].tobytes())
            raise Undefined(f"two threads store different numbers to {named(int(address[at]))}")
        unit, places = _places(address, data.itemsize)
        self._known.views[unit][places] = ONES[unit]
        self._unfenced.views[unit][places] = ONES[unit]

    def _check(self, address: Any, nbytes: int) -> None:
        address = address.astype(np.int64)
        if (address & nbytes - 1).any():
            wrong = int(address[(address & nbytes - 1) != 0][0])
            raise WrongAddress(f"{named(wrong)} is no multiple of {nbytes} bytes")
        outside = (address < BASE) | (address > BASE + self.nbytes - nbytes)
        if outside.any():
            wrong = int(address[outside][0])
            raise WrongAddress(f"{nbytes} bytes at {named(wrong)} of {self.nbytes}")

    def _ask_copies(self, does: str, lanes: Any, places: Any, unit: int) -> None:
        if self._awaited.views[unit][places].any():
            self._refuse(Race, does, "of a cp.async under way", self._awaited, lanes, places, unit)

    @staticmethod
    def _refuse(
        error: type[PtxError],
        does: str,
        why: str,
        flags: Flags,
        lanes: Any,
        places: Any,
        unit: int,
    ) -> None:
        wrong = flags.views[unit][places] != (ONES[unit] if error is Undefined else 0)
        at = int(wrong.nonzero()[0][0])
        place = named(int(places[at]) * unit)
        raise error(f"thread {lanes[at]} {does} byte {place} of shared memory {why}")


def _places(address: Any, nbytes: int) -> tuple[int, Any]:
    """In words of 8 bytes at most: (bytes of a word, numbers of the words)."""
    unit = min(nbytes, 8)
    places = address.astype(np.int64) // unit
    return unit, np.concatenate([places, places + 1]) if nbytes > unit else places


def _lanes(threads: Any, places: int) -> Any:
    """The thread of each word."""
    return threads if len(threads) == places else np.concatenate([threads, threads])
