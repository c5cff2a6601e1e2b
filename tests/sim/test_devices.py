"""Disks and links of the simulator: what is answered when, and in which order."""

from __future__ import annotations

import heapq
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tierd.core.model import LayerKey, Read, ReadDone, ReadFailed
from tierd.core.stack_model import Copy, CopyDone, CopyFailed, DirectRead, StopCopy
from tierd.sim.devices import Devices
from tierd.sim.errors import BrokenPromise
from tierd.sim.fleet import Size, drawn_fleet
from tierd.sim.scenario import Device
from tierd.sim.world import World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.stack_model import StackEvent
    from tierd.sim.fleet import Fleet

MIB = 1 << 20
KEY = LayerKey(0, 0)
LAYER = 8 * MIB
BLOCK_NS = 1_000_000  #: of 1 MiB on an even device
EVEN = Device(bandwidth=MIB * 1000, latency_ns=0)
READ = Read(3, 1, KEY, 0, 0, LAYER, "demand")
COPY = Copy(0, 5, 1, KEY, 1, 0, LAYER, 3, 0, 0, "demand", filling=True)


class Bench:
    """One disk and one GPU; nobody decides anything."""

    def __init__(self, fleet: Fleet) -> None:
        self.now = 0
        self.answers: list[StackEvent] = []
        self.dram, self.gpu = World(64 * MIB, MIB), World(64 * MIB, MIB, gpu=True)
        self.dram.spans[0] = self.gpu.spans[1] = 64 * MIB
        self.devices = Devices(
            fleet, random.Random(3), {None: self.dram, 0: self.gpu}, lambda: self.now, self.after,
            self.answers.append,
        )  # fmt: skip
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._sequence = 0

    def after(self, delay_ns: int, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay_ns, self._sequence, act))

    def read(self) -> None:
        self.dram.read(READ)
        self.devices.read(READ)

    def copy(self, copy: Copy = COPY) -> None:
        self.gpu.read(copy)
        self.devices.copy(copy)

    def run(self, until_ns: int | None = None) -> None:
        while self._heap and (until_ns is None or self._heap[0][0] <= until_ns):
            self.now, _, act = heapq.heappop(self._heap)
            act()
        self.now = max(self.now, until_ns or 0)


def bench(disk: Device = EVEN, link: Device = EVEN, *, direct: bool = False) -> Bench:
    fleet = drawn_fleet(0, Size(clients=1, models=1, gpus=1, layers=1, events=1))
    return Bench(replace(fleet, disk=disk, link=link, block_bytes=MIB, direct=(direct,)))


def test_an_early_copy_ends_one_block_after_its_read() -> None:
    one = bench()
    one.read()
    one.copy()
    one.run()
    assert one.answers == [ReadDone(8 * BLOCK_NS, 3), CopyDone(9 * BLOCK_NS, 0, 5)]
    assert one.gpu.slots[5].filled
    assert not one.dram.slots[3].in_use
    assert not one.devices


def test_a_copy_of_what_was_half_read_catches_up() -> None:
    one = bench(link=replace(EVEN, bandwidth=4 * EVEN.bandwidth))
    one.read()
    one.run(6 * BLOCK_NS)
    one.copy()
    one.run()
    assert one.answers[-1] == CopyDone(8 * BLOCK_NS + BLOCK_NS // 4, 0, 5)


def test_a_read_that_fails_ends_its_copies_and_is_told_first() -> None:
    one = bench(disk=replace(EVEN, error_share=1))
    one.read()
    one.copy()
    one.run()
    assert [type(answer) for answer in one.answers] == [ReadFailed, CopyFailed]
    assert not one.gpu.slots[5].filled
    assert not one.gpu.slots[5].in_use
    assert (one.devices.stopped, one.devices.failures) == (1, 1)


def test_a_copy_that_fails_is_told_while_its_read_goes_on() -> None:
    one = bench(link=replace(EVEN, error_share=1))
    one.read()
    one.copy()
    one.run()
    assert [type(answer) for answer in one.answers] == [CopyFailed, ReadDone]


def test_a_copy_that_is_stopped_ends_its_block_and_is_answered_once() -> None:
    one = bench(link=replace(EVEN, bandwidth=EVEN.bandwidth // 4))
    one.read()
    one.copy()
    one.run(2 * BLOCK_NS)
    one.devices.stop(StopCopy(0, 5))
    assert one.gpu.slots[5].in_use
    one.run()
    assert [answer for answer in one.answers if not isinstance(answer, ReadDone)] == [
        CopyFailed(5 * BLOCK_NS, 0, 5, "model_removed", "stopped (simulated)")
    ]
    assert not one.dram.slots[3].in_use, "nothing holds its source"


def test_a_copy_whose_last_block_was_under_way_when_it_was_stopped_is_done() -> None:
    one = bench(link=replace(EVEN, bandwidth=EVEN.bandwidth // 2))
    one.read()
    one.run(8 * BLOCK_NS - 1)
    one.copy(replace(COPY, nbytes=MIB))
    one.devices.stop(StopCopy(0, 5))
    one.run()
    assert [type(answer) for answer in one.answers] == [ReadDone, CopyDone]


def test_a_copy_of_what_nothing_reads_breaks_a_promise() -> None:
    one = bench()
    with pytest.raises(BrokenPromise, match="nothing reads that into its source"):
        one.copy()
    one = bench()
    one.read()
    with pytest.raises(BrokenPromise, match="is copied from slot 3"):
        one.copy(replace(COPY, filling=False))
    with pytest.raises(BrokenPromise, match="stops nothing that fills"):
        bench().devices.stop(StopCopy(0, 5))


def test_a_source_that_changes_under_a_copy_breaks_a_promise() -> None:
    one = bench()
    one.read()
    one.copy()
    one.run(3 * BLOCK_NS)
    one.dram.slots[3].key = LayerKey(0, 1)
    with pytest.raises(BrokenPromise, match="is copied from slot 3"):
        one.run()


def test_a_direct_read_takes_the_disks_time_and_is_answered_as_a_copy_is() -> None:
    read = DirectRead(0, 5, 1, KEY, 1, 0, LAYER, "demand")
    with pytest.raises(BrokenPromise, match="does not read directly"):
        bench().devices.direct_read(read)
    one = bench(direct=True)
    one.gpu.read(read)
    one.devices.direct_read(read)
    one.run()
    assert one.answers == [CopyDone(8 * BLOCK_NS, 0, 5)]
    failing = bench(replace(EVEN, error_share=1), direct=True)
    failing.gpu.read(read)
    failing.devices.direct_read(read)
    failing.run()
    assert [type(answer) for answer in failing.answers] == [CopyFailed]
