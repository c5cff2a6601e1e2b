"""Reads and copies with real threads, fed by hand: what is told to the core, and in which order."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.daemon.conftest import PackOnDisk, write_pack
from tierd.core.model import Discard, DiscardDone, LayerKey, Read, ReadDone, ReadFailed
from tierd.core.stack_model import Copy, CopyDone, CopyFailed, GpuMeasured, StopCopy
from tierd.gpu.memfd_device import MemfdDevice
from tierd.gpu.worker import GpuWorker
from tierd.gpu_filling import GpuFilling
from tierd.io.arena import Arena
from tierd.io.pages import PageKind, Pages
from tierd.io.ssd import ReaderPool
from tierd.pack import load
from tierd.registry import Registry
from tierd.slots import Slots
from tierd.transfers import Transfers
from tierd_layouts.records import BLOCK_BYTES
from tierd_layouts.slot_entries import SlotState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from tierd.core.stack_model import StackEvent

MIB = 1 << 20
LAYERS, LAYER_BYTES = 6, 2 * BLOCK_BYTES + MIB
SPAN, CHUNK = 128 * MIB, 2 * MIB
PATIENCE_S = 20.0


class Node:
    """DRAM and one GPU whose slots are numbered as the layers of one pack."""

    def __init__(self, pack: PackOnDisk) -> None:
        self.pack = pack
        self.opened = load(pack.name, pack.path, pack.path.parent)
        self.opened.model = 1
        registry = Registry()
        registry.by_model[1] = self.opened
        self.slots, self.gpu_slots = Slots.create(epoch=1), Slots.create(epoch=1)
        self.arena = Arena.create(0, SPAN, "tierd-test", pages=Pages(PageKind.SMALL, "4 KiB"))
        self.pool = ReaderPool(3)
        self.pool.configure(chunk_bytes=BLOCK_BYTES)
        self.device = MemfdDevice(0, CHUNK, SPAN)
        loop = asyncio.get_running_loop()
        self.worker = GpuWorker(self.device, 2, loop.call_soon_threadsafe)
        self.events: list[StackEvent] = []
        self.discarded: list[tuple[int, int, int]] = []
        memory = SimpleNamespace(name="gpu:0", worked=lambda: None, failed=lambda error: None)
        filling = self.filling = GpuFilling(
            0, self.worker, self.gpu_slots, cast("Any", memory), self._submit, None
        )
        gpu = SimpleNamespace(filling=filling, slots=self.gpu_slots)
        arenas = SimpleNamespace(
            by_id={0: self.arena}, exists=lambda *_: None, discard=self._discard
        )
        tiers = SimpleNamespace(gpus=(gpu,), closing=None)
        self.transfers = Transfers(
            self._submit, self.slots, cast("Any", arenas), self.pool, registry, cast("Any", tiers)
        )
        self._happened = asyncio.Event()

    async def open(self) -> None:
        for work in (lambda gpu: gpu.open(), lambda gpu: gpu.add_arena(1 << 20, SPAN)):
            done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.worker.submit(work, done.set_result)
            assert not isinstance(await done, Exception)

    def _submit(self, event: StackEvent) -> None:
        if not isinstance(event, GpuMeasured):
            self.events.append(event)
        self._happened.set()

    def _discard(self, arena: int, offset: int, nbytes: int, done: Callable[[], None]) -> None:
        self.discarded.append((arena, offset, nbytes))
        done()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._happened.clear()
                await self._happened.wait()

    def place(self, layer: int) -> int:
        return layer * (LAYER_BYTES + MIB)

    def read(self, layer: int) -> None:
        key = LayerKey(1, layer)
        self.transfers.read(Read(layer, 1, key, 0, self.place(layer), LAYER_BYTES, "demand"))

    def copy(self, layer: int, *, filling: bool = True) -> None:
        place = self.place(layer)
        self.transfers.copy(
            Copy(
                0, layer, 1, LayerKey(1, layer), 1 << 20, place, LAYER_BYTES,
                layer, 0, place, "demand", filling,
            )
        )  # fmt: skip

    def on_gpu(self, layer: int) -> bytes:
        """The bytes in the layer's slot of the GPU."""
        begin, end = self.place(layer), self.place(layer) + LAYER_BYTES
        content = b""
        for chunk in range(begin // CHUNK, -(-end // CHUNK)):
            fd = self.device.export(1 << 20, chunk).fd
            assert fd is not None
            content += os.pread(fd, CHUNK, 0)
            os.close(fd)
        return content[begin % CHUNK :][:LAYER_BYTES]

    def close(self) -> None:
        self.pool.close()
        self.worker.close()
        self.opened.close()
        self.arena.close()
        self.slots.close()
        self.gpu_slots.close()


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(write_pack(tmp_path / "m", LAYERS, LAYER_BYTES))
    await made.open()
    yield made
    made.close()


class Disk:
    """Reads of one layer's last block wait until they may go on, or fail then."""

    def __init__(self, node: Node, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
        (extent,) = node.pack.index.layers[layer].extents
        really, last = os.preadv, extent.offset + 2 * BLOCK_BYTES
        self.gate = threading.Event()
        self.fails = False

        def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
            if offset == last:
                assert self.gate.wait(PATIENCE_S)
                if self.fails:
                    raise OSError(5, "Input/output error")
            return really(fd, targets, offset)

        monkeypatch.setattr(os, "preadv", preadv)


async def copied(node: Node, nbytes: int) -> None:
    """Until so much is on the GPU."""
    await poll(lambda: node.worker.statistics().copied_bytes >= nbytes)


async def poll(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("seed", range(4))
async def test_a_copy_is_done_after_its_read_and_has_its_bytes(node: Node, seed: int) -> None:
    """Copies begin at any moment of their reads."""
    rng = random.Random(seed)
    for layer in range(LAYERS):
        node.read(layer)
        await asyncio.sleep(rng.random() * 0.003)
        done = {event.slot for event in node.events if isinstance(event, ReadDone)}
        node.copy(layer, filling=layer not in done)
    await node.until(lambda: sum(isinstance(event, CopyDone) for event in node.events) == LAYERS)
    for layer in range(LAYERS):
        told = [type(event) for event in node.events if getattr(event, "slot", None) == layer]
        assert told == [ReadDone, CopyDone]
        assert node.on_gpu(layer) == node.pack.content[layer]
        assert node.gpu_slots.table.slot(layer).state is SlotState.RESIDENT


async def test_a_read_that_fails_is_told_first_and_its_copy_fails_with_the_same_words(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(node, 0, monkeypatch)
    disk.fails = True
    node.read(0)
    node.copy(0)
    await copied(node, 2 * BLOCK_BYTES)
    assert node.events == []
    assert node.gpu_slots.table.slot(0).state is SlotState.FILLING
    disk.gate.set()
    await node.until(lambda: len(node.events) == 2)
    read, copy = node.events
    assert isinstance(read, ReadFailed)
    assert isinstance(copy, CopyFailed)
    assert (copy.code, copy.text) == (read.code, read.text)
    assert read.code == "read_failed"


async def test_a_copy_that_is_stopped_answers_before_its_read_has_ended(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(node, 0, monkeypatch)
    node.read(0)
    node.copy(0)
    await copied(node, 2 * BLOCK_BYTES)
    node.transfers.stop_copy(StopCopy(0, 0))
    await node.until(lambda: node.events)
    assert [type(event) for event in node.events] == [CopyFailed]
    node.transfers.stop_copy(StopCopy(0, 0))  # its answer was first
    node.copy(0)  # the same slot, for the same read
    disk.gate.set()
    await node.until(lambda: len(node.events) == 3)
    assert [type(event) for event in node.events] == [CopyFailed, ReadDone, CopyDone]
    assert node.on_gpu(0) == node.pack.content[0]


async def test_memory_goes_back_when_no_copy_that_is_being_stopped_reads_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, started, really = threading.Event(), threading.Event(), node.device.copy

    def slow(*arguments: Any) -> Any:
        started.set()
        assert gate.wait(PATIENCE_S)
        return really(*arguments)

    monkeypatch.setattr(node.device, "copy", slow)
    node.read(0)
    node.copy(0)
    await asyncio.to_thread(started.wait, PATIENCE_S)
    node.transfers.stop_copy(StopCopy(0, 0))
    await node.until(lambda: Counter(map(type, node.events))[ReadDone])
    node.transfers.discard(Discard(0, node.place(0), MIB))
    node.transfers.discard(Discard(0, node.place(1), MIB))
    assert node.discarded == [(0, node.place(1), MIB)], "the other range waits"
    gate.set()
    await node.until(lambda: len(node.discarded) == 2)
    assert [type(event) for event in node.events] == [
        ReadDone, DiscardDone, DiscardDone, CopyFailed,
    ]  # fmt: skip


async def test_nothing_is_told_after_the_stop_and_every_byte_is_given_back(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(node, 0, monkeypatch)
    node.read(0)
    node.copy(0)
    await copied(node, 2 * BLOCK_BYTES)
    node.transfers.stop()
    node.filling.stop()
    disk.gate.set()
    await poll(lambda: not node.transfers.reads)
    assert node.events == []
    assert node.slots.table.slot(0).state is SlotState.FILLING, "a successor sees it as it was"


async def test_a_copy_follows_a_read_that_is_held_back(node: Node) -> None:
    """A warm start gives memory back before it reads; a GPU may be asked for layers meanwhile."""
    node.transfers.hold_reads()
    node.read(0)
    node.copy(0)
    await asyncio.sleep(0.05)
    assert node.events == []
    node.transfers.resume_reads()
    await node.until(lambda: len(node.events) == 2)
    assert [type(event) for event in node.events] == [ReadDone, CopyDone]
    assert node.on_gpu(0) == node.pack.content[0]
