"""Copies that follow the read of their source: piece by piece, whatever fails and whenever."""

from __future__ import annotations

import os
import random
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.conftest import CHUNK, Rig, make_rig
from tests.daemon.gpu.worker_by_hand import SMALL, Flaky, Gated, Loop, ask
from tests.fake_cuda.names import CUresult
from tierd.errors import ChecksumMismatch
from tierd.gpu.copies import CopyJob, CopyResult, LayerCopy
from tierd.gpu.errors import CopyStopped, DeviceError, DeviceLost, GpuError, SourceFailed
from tierd.gpu.kinds import KINDS
from tierd.gpu.memfd_device import MemfdDevice
from tierd.gpu.registration import HostMemory
from tierd.gpu.worker import GpuWorker
from tierd.io.arena import Arena
from tierd.io.pages import PageKind, Pages
from tierd.io.verified import VerifiedBlocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd.gpu.device import Kind

BLOCK = 4096
CORRUPT = ChecksumMismatch("block 3 of 4 is corrupt")

Answer = CopyResult | GpuError


class Following:
    """A copy of four blocks, and the read that it follows."""

    def __init__(self, worker: GpuWorker, blocks: int = 4) -> None:
        self.memory = bytearray(random.Random(7).randbytes(blocks * BLOCK))
        self.verified = VerifiedBlocks()
        self.answers: list[Answer] = []
        job = CopyJob(0, SMALL, memoryview(self.memory), "layer", self.verified)
        self.copy = worker.copy(job, self.answers.append)

    def announce(self, *blocks: int) -> None:
        for block in blocks:
            self.verified.announce(block * BLOCK, BLOCK)

    def check_released(self) -> None:
        self.memory.append(0)


def test_a_block_is_copied_when_it_is_verified_and_the_answer_waits_for_the_end_of_the_read(
    loop: Loop,
) -> None:
    device = MemfdDevice(0, SMALL, SMALL)
    worker = GpuWorker(device, 2, loop.call_soon_threadsafe)
    ask(worker, loop, lambda opened: opened.open())
    ask(worker, loop, lambda opened: opened.add_arena(0, 16 * SMALL))
    following = Following(worker)
    for block in (2, 0, 3, 1):
        following.announce(block)
        wait_copied(worker, BLOCK)
    found = worker.statistics()
    assert (found.in_flight, found.copies, found.copied_bytes) == (1, 0, 4 * BLOCK)
    assert loop.calls.empty(), "all is there, but the read has not ended"
    following.verified.end(None)
    loop.run_one()
    assert [answer.nbytes for answer in following.answers if isinstance(answer, CopyResult)] == [
        4 * BLOCK
    ]
    assert content(device, SMALL, 4 * BLOCK) == bytes(following.memory)
    following.check_released()
    worker.close()


def wait_copied(worker: GpuWorker, more_bytes: int) -> None:
    """Until the GPU has so many bytes more than when this was asked last."""
    deadline = time.monotonic() + 20
    wanted = getattr(worker, "seen_bytes", 0) + more_bytes
    while worker.statistics().copied_bytes < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    worker.seen_bytes = wanted  # type: ignore[attr-defined]


def content(device: MemfdDevice, offset: int, nbytes: int) -> bytes:
    """What is in arena 0 there."""
    first, last = offset // SMALL, -(-(offset + nbytes) // SMALL)
    parts = []
    for chunk in range(first, last):
        fd = device.export(0, chunk).fd
        assert fd is not None
        parts.append(os.pread(fd, SMALL, 0))
        os.close(fd)
    return b"".join(parts)[offset - first * SMALL :][:nbytes]


def test_what_was_verified_while_nothing_could_be_moved_goes_in_one_piece(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    for chunk in (2, 3):
        worker.copy(CopyJob(0, chunk * SMALL, memoryview(bytearray(8)), "other"), lambda _: None)
        device.wait_started()
    following = Following(worker)
    following.announce(0, 2, 1)
    following.verified.announce(3 * BLOCK, BLOCK)
    following.verified.end(None)
    device.gates[0].opened.set()
    device.wait_started()
    assert len(device.gates) == 3
    device.gates[2].opened.set()
    device.gates[1].opened.set()
    for _ in range(3):
        loop.run_one()
    assert len(device.gates) == 3, "four blocks, one copy"
    assert isinstance(following.answers[0], CopyResult)


def test_a_copy_that_waits_for_its_read_holds_up_no_other(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    first, second = Following(worker), Following(worker)
    answers: list[Answer] = []
    worker.copy(CopyJob(0, 0, memoryview(bytearray(8)), "full"), answers.append)
    device.wait_started()
    assert (worker.statistics().in_flight, worker.statistics().queued) == (1, 2)
    device.gates[0].opened.set()
    loop.run_one()
    assert isinstance(answers[0], CopyResult)
    second.announce(0, 1, 2, 3)
    first.announce(0)
    device.wait_started()
    device.wait_started()
    assert worker.silent() is None


def test_a_copy_whose_read_failed_waits_for_what_is_under_way_and_has_that_failure(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    following = Following(worker)
    following.announce(0)
    device.wait_started()
    following.announce(1)
    device.wait_started()
    following.announce(2)  # waits: two are under way
    following.verified.end(CORRUPT)
    device.gates[0].opened.set()
    assert loop.calls.empty()
    with pytest.raises(BufferError):
        following.memory.append(0)
    device.gates[1].opened.set()
    loop.run_one()
    (answer,) = following.answers
    assert isinstance(answer, SourceFailed)
    assert (answer.failure, answer.text) == (CORRUPT, CORRUPT.text)
    assert len(device.gates) == 2, "the third block was not copied any more"
    following.check_released()
    found = worker.statistics()
    assert (found.failed, found.in_flight, found.queued) == (1, 0, 0)


@pytest.mark.parametrize("when", ["before its first block", "under way", "all there but the end"])
def test_a_copy_that_is_stopped_is_answered_once_and_the_read_may_go_on(
    worker: GpuWorker, device: Gated, loop: Loop, when: str
) -> None:
    following = Following(worker, blocks=1 if when == "all there but the end" else 4)
    if when != "before its first block":
        following.announce(0)
        device.wait_started()
    if when == "all there but the end":
        device.gates[0].opened.set()
        wait_copied(worker, BLOCK)
    worker.stop(following.copy)
    if when == "under way":
        assert loop.calls.empty()
        device.gates[0].opened.set()
    loop.run_one()
    (answer,) = following.answers
    assert isinstance(answer, CopyStopped)
    following.check_released()
    following.announce(1, 2, 3)
    following.verified.end(None)
    worker.stop(following.copy)
    assert ask(worker, loop, lambda _: len(device.gates)) <= 1
    assert following.answers == [answer]
    assert worker.statistics().failed == 0, "stopped is not failed"


def test_a_copy_that_is_over_is_not_stopped_any_more(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    following = Following(worker, blocks=1)
    following.announce(0)
    device.wait_started()
    following.verified.end(None)
    device.gates[0].opened.set()
    wait_copied(worker, BLOCK)
    while loop.calls.empty():
        time.sleep(0.001)
    worker.stop(following.copy)  # its answer is on the way
    loop.run_one()
    assert loop.calls.empty()
    assert isinstance(following.answers[0], CopyResult)


def test_a_gpu_that_refuses_one_block_ends_the_copy_when_the_others_are_over(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    following = Following(worker)
    following.announce(0)
    device.wait_started()
    failure = device.refuses = DeviceError("gpu:0: no copy")
    following.announce(1)
    ask(worker, loop, lambda _: None)
    assert following.answers == []
    device.refuses = None
    following.announce(2, 3)
    device.gates[0].opened.set()
    loop.run_one()
    assert following.answers == [failure]
    assert len(device.gates) == 1
    following.check_released()
    following.verified.end(CORRUPT)
    assert loop.calls.empty()


def test_a_worker_that_is_closed_answers_a_copy_in_the_middle_of_its_read(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    waiting, moving = Following(worker), Following(worker)
    moving.announce(0)
    device.wait_started()
    closing = threading.Thread(target=worker.close)
    closing.start()
    loop.run_one()
    assert "was given up: the daemon shuts down" in str(waiting.answers[0])
    moving.announce(1)
    assert moving.answers == []
    device.gates[0].opened.set()
    loop.run_one()
    closing.join(20)
    assert "was given up" in str(moving.answers[0])
    assert len(device.gates) == 1
    for following in (waiting, moving):
        following.check_released()


def test_a_copy_after_close_follows_nothing(worker: GpuWorker, loop: Loop) -> None:
    worker.close()
    following = Following(worker)
    following.announce(0)
    following.verified.end(None)
    loop.run_one()
    assert "was given up" in str(following.answers[0])
    assert loop.calls.empty()


@pytest.mark.parametrize("seed", range(12))
def test_every_copy_is_answered_once_and_what_is_done_has_the_bytes_of_its_read(seed: int) -> None:
    """Readers, the GPU and who stops copies in threads of their own. After an answer nothing is
    read or written for that copy any more: its source is then filled with something else."""
    rng = random.Random(seed)
    loop, device = Loop(), Flaky(rng)
    worker = GpuWorker(device, rng.randint(1, 3), loop.call_soon_threadsafe)
    ask(worker, loop, lambda opened: opened.open())
    ask(worker, loop, lambda opened: opened.add_arena(0, 16 * SMALL))
    count, blocks = 12, 6
    memory = [bytearray(rng.randbytes(blocks * BLOCK)) for _ in range(count)]
    wanted = [bytes(content) for content in memory]
    answers: dict[int, Answer] = {}

    def answered(number: int, answer: Answer) -> None:
        assert number not in answers
        answers[number] = answer
        memory[number][:] = bytes(len(memory[number]))
        memory[number].append(0)  # BufferError: something still has it

    def read(verified: VerifiedBlocks, chance: random.Random) -> None:
        order = list(range(blocks))
        chance.shuffle(order)
        failing = chance.random() < 0.25
        for block in order[: blocks // 2] if failing else order:
            time.sleep(chance.random() * 0.002)
            verified.announce(block * BLOCK, BLOCK)
        verified.end(CORRUPT if failing else None)

    readers, copies = [], list[LayerCopy]()
    for number in range(count):
        verified = VerifiedBlocks() if rng.random() < 0.8 else None
        if verified is not None:
            chance = random.Random(rng.random())
            readers.append(threading.Thread(target=read, args=(verified, chance)))
            readers[-1].start()
        if rng.random() < 0.3:
            time.sleep(0.003)
        source = memoryview(memory[number])
        job = CopyJob(0, number * SMALL, source, str(number), verified)
        copies.append(worker.copy(job, partial(answered, number)))
    for copy in rng.sample(copies, 4):
        time.sleep(rng.random() * 0.003)
        worker.stop(copy)
    while len(answers) < count:
        loop.run_one()
    for reader in readers:
        reader.join(20)
    ask(worker, loop, lambda _: None)
    for number, answer in answers.items():
        if isinstance(answer, CopyResult):
            assert content(device, number * SMALL, blocks * BLOCK) == wanted[number]
    found = worker.statistics()
    assert (found.in_flight, found.queued) == (0, 0)
    assert found.copies == sum(isinstance(answer, CopyResult) for answer in answers.values())
    assert found.copied_bytes >= found.copies * blocks * BLOCK
    worker.close()
    assert loop.calls.empty()


# ---------------------------------------------------------------------------- devices of every kind

LAYER = 3 * CHUNK + 5 * BLOCK
OFFSET = CHUNK // 2  # a layer begins in the middle of a chunk, and ends in one
REGISTERED = 1 << 20  # a registration covers so much


class Source:
    """DRAM of which every second part is registered, with a layer in it."""

    def __init__(self, rig: Rig, host: HostMemory) -> None:
        self.arena = Arena.create(0, 16 << 20, "tierd-test", pages=Pages(PageKind.SMALL, "4 KiB"))
        host.add_arena(0, self.arena.address, 16 << 20)
        host.populated(0, 0, 16 << 20)
        for start in range(0, 8 << 20, 2 * REGISTERED):
            rig.device.register(self.arena.address + start, REGISTERED)
            host.registered(0, start, start + REGISTERED)
        self.content = random.Random(3).randbytes(LAYER)
        self.view = self.arena.buffer(3 * BLOCK, LAYER)

    def fill(self, start: int, nbytes: int) -> None:
        self.view[start : start + nbytes] = self.content[start : start + nbytes]

    def close(self, rig: Rig) -> None:
        self.view.release()
        for start in range(0, 8 << 20, 2 * REGISTERED):
            rig.device.unregister(self.arena.address + start, REGISTERED)
        self.arena.close()


class Played:
    """A worker on a device of one kind that follows a reader of blocks of 300 KiB."""

    def __init__(self, kind: Kind, loop: Loop) -> None:
        host = HostMemory(REGISTERED)
        self.host = host
        self.rig = make_rig(kind, host=host)
        self.loop = loop
        self.worker = GpuWorker(self.rig.device, 2, loop.call_soon_threadsafe)
        ask(self.worker, loop, lambda device: device.open())
        ask(self.worker, loop, lambda device: device.add_arena(0, 16 << 20))
        self.source = Source(self.rig, host)
        self.verified = VerifiedBlocks()
        self.answers: list[Answer] = []
        step = 300 << 10
        self.blocks = [(at, min(step, LAYER - at)) for at in range(0, LAYER, step)]
        job = CopyJob(0, OFFSET, self.source.view[:], "layer", self.verified)
        self.worker.copy(job, self.answers.append)

    def read(self, *numbers: int) -> None:
        for number in numbers:
            start, nbytes = self.blocks[number]
            self.source.fill(start, nbytes)
            self.verified.announce(start, nbytes)

    def bytes_there(self) -> bytes:
        chunks = range((OFFSET + LAYER) // CHUNK + 1)
        return b"".join(self.rig.content(0, chunk) for chunk in chunks)[OFFSET:][:LAYER]

    def close(self) -> None:
        assert self.host.uses == 0, "nothing reads DRAM any more"
        if self.rig.driver.lost is None:
            self.source.close(self.rig)
        self.worker.close()


@pytest.fixture(params=KINDS)
def played(request: pytest.FixtureRequest, loop: Loop) -> Iterator[Played]:
    made = Played(request.param, loop)
    yield made
    made.close()


def test_blocks_over_borders_of_chunks_and_registrations_arrive_on_every_kind(
    played: Played,
) -> None:
    order = list(range(len(played.blocks)))
    random.Random(5).shuffle(order)
    for number in order:
        played.read(number)
    played.verified.end(None)
    played.loop.run_one()
    assert isinstance(played.answers[0], CopyResult)
    assert played.bytes_there() == played.source.content
    assert played.rig.device.unpinned_bytes > 0


def test_a_read_that_fails_in_the_middle_fails_the_copy_on_every_kind(played: Played) -> None:
    played.read(0, 3, 1)
    wait_copied(played.worker, 3 * (300 << 10))
    played.verified.end(CORRUPT)
    played.loop.run_one()
    assert isinstance(played.answers[0], SourceFailed)


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuEventRecord", "cuEventSynchronize"])
@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (CUresult.CUDA_ERROR_INVALID_VALUE, DeviceError),
        (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, DeviceLost),
    ],
)
def test_a_driver_that_refuses_a_block_in_the_middle_is_quoted_and_nothing_is_read_on(
    loop: Loop, kind: Kind, call: str, code: CUresult, error: type[DeviceError]
) -> None:
    played = Played(kind, loop)
    played.read(0, 1)
    wait_copied(played.worker, 2 * (300 << 10))
    played.rig.driver.faults[call] = code
    played.read(2)
    loop.run_one()
    (answer,) = played.answers
    assert type(answer) is error
    assert call in str(answer)
    played.read(3)
    played.verified.end(None)
    ask(played.worker, loop, lambda _: None)
    assert len(played.answers) == 1
    played.rig.driver.faults.clear()
    played.close()
