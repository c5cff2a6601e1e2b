"""What disks and links do in a run of a fleet: read and copy layers, block by block, and fail.

The shell of three tiers in small: it copies a block of a layer when that is verified, ends copies
whose read failed or that are stopped once nothing of them is under way any more, and answers each
exactly once. Whatever a copy takes from a slot in DRAM must be the layer that it was told, and stay
so while it is taken, unless the copy is being stopped: then nobody will ever see it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.model import ReadDone, ReadFailed
from tierd.core.stack_model import CopyDone, CopyFailed
from tierd.sim.errors import BrokenPromise

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tierd.core.model import Read
    from tierd.core.stack_model import Copy, DirectRead, StackEvent, StopCopy
    from tierd.sim.fleet import Fleet
    from tierd.sim.scenario import Device
    from tierd.sim.world import World

SECOND_NS = 1_000_000_000
NOTICED_NS = 100_000  #: until a copy is stopped that waits for a block, at most


@dataclass(slots=True, eq=False)
class _Reading:
    """A read into DRAM: block `i` is verified at `begin_ns + (i + 1) * block_ns`."""

    read: Read
    begin_ns: int
    block_ns: int
    fails_at: int | None  #: block
    whole: bool = False
    copies: list[_Copying] = field(default_factory=list)  #: early ones

    def brings(self, block: int) -> bool:
        """Whether the block is verified some time."""
        return self.fails_at is None or block < self.fails_at

    def verified_ns(self, block: int) -> int:
        return self.begin_ns + (block + 1) * self.block_ns


@dataclass(slots=True, eq=False)
class _Copying:
    """A copy, or a read past DRAM, under way."""

    gpu: int
    slot: int
    blocks: int
    block_ns: int
    fails_at: int | None  #: block
    source: Copy | None = None  #: the slot in DRAM that it reads
    reading: _Reading | None = None  #: what fills that, of an early copy
    copied: int = 0  #: blocks
    busy: bool = False  #: a block is under way, or the answer is
    stopped: tuple[str, str] | None = None  #: code and text of the answer
    held: bool = False  #: its source has to stay for it

    @property
    def has_all(self) -> bool:
        return self.copied == self.blocks and (self.reading is None or self.reading.whole)


class Devices:
    """Of all tiers of one run."""

    def __init__(
        self,
        fleet: Fleet,
        rng: random.Random,
        worlds: dict[int | None, World],
        now: Callable[[], int],
        after: Callable[[int, Callable[[], None]], None],
        feed: Callable[[StackEvent], None],
    ) -> None:
        """after: calls something in so many nanoseconds. feed: takes what is answered."""
        self.failures = 0
        self.early = 0  #: copies that began before their layer was whole
        self.stopped = 0  #: of these: that were stopped, or whose read failed
        self.direct = 0  #: reads past DRAM
        self._fleet = fleet
        self._rng = rng
        self._dram = worlds[None]
        self._worlds = worlds
        self._now = now
        self._after = after
        self._feed = feed
        self._free_ns: dict[int | None, int] = dict.fromkeys(worlds, 0)
        self._readings: dict[int, _Reading] = {}  #: by slot in DRAM
        self._copyings: dict[tuple[int, int], _Copying] = {}  #: by GPU and slot there

    def __bool__(self) -> bool:
        """Whether something is under way."""
        return bool(self._readings or self._copyings)

    # --------------------------------------------------------------------------------------- reads

    def read(self, action: Read) -> None:
        """From the disk into DRAM."""
        begin_ns, took_ns, blocks = self._disk_time(action.nbytes)
        reading = _Reading(
            action, begin_ns, took_ns // blocks, self._fails_at(self._fleet.disk, blocks)
        )
        self._readings[action.slot] = reading
        end_ns = begin_ns + took_ns
        if reading.fails_at is not None:
            end_ns = reading.verified_ns(reading.fails_at)
        self._after(end_ns - self._now(), lambda: self._read_over(reading))

    def _read_over(self, reading: _Reading) -> None:
        slot, now = reading.read.slot, self._now()
        del self._readings[slot]
        reading.copies = [copying for copying in reading.copies if self._is_under_way(copying)]
        if reading.fails_at is not None:
            self._dram.read_failed(slot)
            for copying in reading.copies:
                self.stopped += copying.stopped is None
                copying.stopped = ("read_failed", "EIO (simulated)")
            self._feed(ReadFailed(now, slot, "read_failed", "EIO (simulated)"))
        else:
            reading.whole = True
            self._dram.read_done(slot)
            for copying in reading.copies:
                if copying.stopped is None:
                    self._hold(copying)
            self._feed(ReadDone(now, slot))
        for copying in reading.copies:
            self._step(copying)

    def _is_under_way(self, copying: _Copying) -> bool:
        return self._copyings.get((copying.gpu, copying.slot)) is copying

    def direct_read(self, action: DirectRead) -> None:
        """From the disk to a GPU."""
        if not (self._fleet.direct and self._fleet.direct[action.gpu]):
            raise BrokenPromise(f"{action} on a GPU that does not read directly")
        self.direct += 1
        begin_ns, took_ns, _ = self._disk_time(action.nbytes)
        fails_at = self._fails_at(self._fleet.disk, 1)
        copying = _Copying(action.gpu, action.slot, 1, took_ns, fails_at, busy=True)
        self._copyings[action.gpu, action.slot] = copying
        self._after(begin_ns + took_ns - self._now(), lambda: self._moved(copying))

    def _disk_time(self, nbytes: int) -> tuple[int, int, int]:
        """When the first bytes of a read can be there, what it takes from then on, its blocks."""
        disk = self._fleet.disk
        slow = self._slowness(disk)
        took_ns = slow * nbytes * SECOND_NS // disk.bandwidth
        begin_ns = max(self._now(), self._free_ns[None])
        self._free_ns[None] = begin_ns + took_ns
        return begin_ns + slow * disk.latency_ns, took_ns, self._blocks(nbytes)

    # -------------------------------------------------------------------------------------- copies

    def copy(self, action: Copy) -> None:
        """From DRAM to a GPU."""
        link = self._fleet.link
        blocks = self._blocks(action.nbytes) if action.filling else 1
        took_ns = self._slowness(link) * action.nbytes * SECOND_NS // link.bandwidth
        copying = _Copying(
            action.gpu, action.slot, blocks, took_ns // blocks, self._fails_at(link, blocks), action
        )
        if action.filling:
            self.early += 1
            copying.reading = self._readings.get(action.from_slot)
            if copying.reading is None or copying.reading.read.key != action.key:
                raise BrokenPromise(f"{action}, but nothing reads that into its source")
            copying.reading.copies.append(copying)
            self._check_source(copying)
        else:
            self._hold(copying)
        self._copyings[action.gpu, action.slot] = copying
        self._step(copying)

    def stop(self, action: StopCopy) -> None:
        """A copy is to end early."""
        copying = self._copyings.get((action.gpu, action.slot))
        if copying is None or copying.reading is None or copying.reading.whole:
            raise BrokenPromise(f"{action} stops nothing that fills")
        self.stopped += 1
        copying.stopped = ("model_removed", "stopped (simulated)")
        self._after(self._rng.randint(0, NOTICED_NS), lambda: self._step(copying))

    def _step(self, copying: _Copying) -> None:
        """What a copy does next, when nothing of it is under way."""
        if copying.busy or not self._is_under_way(copying):
            return
        if copying.has_all:
            self._answer(copying, None)
        elif copying.stopped is not None:
            self._answer(copying, copying.stopped)
        elif copying.copied < copying.blocks and (ready_ns := self._ready_ns(copying)) is not None:
            if ready_ns > self._now():
                self._after(ready_ns - self._now(), lambda: self._step(copying))
            else:
                self._move(copying)

    def _ready_ns(self, copying: _Copying) -> int | None:
        """When its next block is verified; None: never, so it waits for the end of the read."""
        reading, block = copying.reading, copying.copied
        if reading is None:
            return self._now()
        return reading.verified_ns(block) if reading.brings(block) else None

    def _move(self, copying: _Copying) -> None:
        self._check_source(copying)
        copying.busy = True
        end_ns = max(self._now(), self._free_ns[copying.gpu]) + copying.block_ns
        self._free_ns[copying.gpu] = end_ns
        self._after(end_ns - self._now(), lambda: self._moved(copying))

    def _moved(self, copying: _Copying) -> None:
        """A block is on the GPU."""
        self._check_source(copying)
        copying.busy = False
        if copying.fails_at == copying.copied:
            self._answer(copying, ("read_failed", "ECC (simulated)"))
        else:
            copying.copied += 1
            self._step(copying)

    def _check_source(self, copying: _Copying) -> None:
        """What is copied is what was told, and nothing else was written there meanwhile."""
        source = copying.source
        if source is not None and copying.stopped is None:
            self._dram.check_source(source.from_slot, source.key, source.from_offset)

    def _hold(self, copying: _Copying) -> None:
        """Its source is whole, and has to stay until the answer."""
        source = copying.source
        assert source is not None
        self._dram.copy_from(source.from_slot, source.key, source.from_offset)
        copying.held = True

    def _answer(self, copying: _Copying, failure: tuple[str, str] | None) -> None:
        copying.busy = True
        self._after(self._fleet.link.latency_ns, lambda: self._answered(copying, failure))

    def _answered(self, copying: _Copying, failure: tuple[str, str] | None) -> None:
        gpu, slot = copying.gpu, copying.slot
        del self._copyings[gpu, slot]
        if copying.held and copying.source is not None:
            self._dram.copied(copying.source.from_slot)
        if failure is None:
            self._worlds[gpu].read_done(slot)
            self._feed(CopyDone(self._now(), gpu, slot))
        else:
            self._worlds[gpu].read_failed(slot)
            self._feed(CopyFailed(self._now(), gpu, slot, *failure))

    # ------------------------------------------------------------------------------------- devices

    def _blocks(self, nbytes: int) -> int:
        return -(-nbytes // self._fleet.block_bytes)

    def _slowness(self, device: Device) -> int:
        return device.slow_factor if self._rng.random() < device.slow_share else 1

    def _fails_at(self, device: Device, blocks: int) -> int | None:
        if self._rng.random() >= device.error_share:
            return None
        self.failures += 1
        return self._rng.randrange(blocks)
