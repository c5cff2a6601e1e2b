"""One GPU's thread: calls and copies, each answered once, whatever fails and whenever it closes."""

from __future__ import annotations

import random
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.worker_by_hand import PATIENCE_S, SMALL, Flaky, Gated, Loop, ask
from tierd.gpu.copies import CopyJob, CopyResult
from tierd.gpu.errors import DeviceError, DeviceUnavailable, GpuError
from tierd.gpu.memfd_device import MemfdDevice
from tierd.gpu.worker import SILENT_NS, GpuWorker

if TYPE_CHECKING:
    from tierd.gpu.device import Device, DeviceInfo


def job(chunk: int = 0, nbytes: int = SMALL) -> CopyJob:
    return CopyJob(0, chunk * SMALL, memoryview(bytearray(nbytes)), f"layer {chunk}")


def test_a_call_is_made_on_the_devices_own_thread_and_answered_on_the_loop(loop: Loop) -> None:
    worker = GpuWorker(MemfdDevice(3, SMALL, SMALL), 1, loop.call_soon_threadsafe)
    names: list[str] = []
    answers: list[DeviceInfo | GpuError] = []

    def work(device: Device) -> DeviceInfo:
        names.append(threading.current_thread().name)
        return device.open()

    worker.submit(work, answers.append)
    loop.run_one()
    worker.close()
    assert names == ["tierd-gpu3"]
    assert not isinstance(answers[0], GpuError)


def test_what_a_call_raises_is_its_answer(worker: GpuWorker, loop: Loop) -> None:
    def refuse(device: Device) -> None:
        raise DeviceUnavailable("no card", "buy one")

    answer = ask(worker, loop, refuse)
    assert isinstance(answer, DeviceUnavailable)
    assert (answer.reason, answer.advice) == ("no card", "buy one")


def test_a_mistake_in_a_call_is_an_answer_too_and_the_thread_goes_on(
    worker: GpuWorker, loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ask(worker, loop, lambda device: device.back(7, 0, 1))
    assert isinstance(answer, DeviceError)
    assert "there is no arena 7" in str(answer)
    assert "there is no arena 7" in caplog.text
    assert ask(worker, loop, lambda device: device.back(0, 0, 1)) is None


def test_a_copy_puts_memory_behind_every_chunk_that_it_touches(loop: Loop) -> None:
    device = MemfdDevice(0, SMALL, 4 * SMALL)
    worker = GpuWorker(device, 1, loop.call_soon_threadsafe)
    ask(worker, loop, lambda opened: opened.open())
    ask(worker, loop, lambda opened: opened.add_arena(0, 16 * SMALL))
    answers: list[CopyResult | GpuError] = []
    source = memoryview(bytearray(2 * SMALL))
    worker.copy(CopyJob(0, SMALL // 2, source, "layer"), answers.append)
    loop.run_one()
    assert isinstance(answers[0], CopyResult)
    assert answers[0].nbytes == 2 * SMALL
    assert device.backed_bytes == 3 * SMALL
    worker.close()
    assert device.backed_bytes == 0


def test_as_many_copies_are_started_as_may_be_in_flight_before_the_first_is_done(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    for chunk in range(3):
        worker.copy(job(chunk), lambda _: None)
    device.wait_started()
    device.wait_started()
    assert ask(worker, loop, lambda _: len(device.gates)) == 2
    assert (worker.statistics().in_flight, worker.statistics().queued) == (2, 1)
    device.gates[0].opened.set()
    device.wait_started()
    loop.run_one()
    assert (worker.statistics().in_flight, worker.statistics().queued) == (2, 0)


def test_a_call_overtakes_copies_that_were_not_started(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    for chunk in range(5):
        worker.copy(job(chunk), lambda _: None)
    device.wait_started()
    device.wait_started()
    assert ask(worker, loop, lambda _: len(device.gates)) == 2


def test_the_source_is_released_when_nothing_reads_it_and_not_before(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    memory = bytearray(SMALL)
    worker.copy(CopyJob(0, 0, memoryview(memory), "layer"), lambda _: None)
    device.wait_started()
    with pytest.raises(BufferError):
        memory.append(0)
    device.gates[0].opened.set()
    loop.run_one()
    memory.append(0)


@pytest.mark.parametrize("when", ["at the start", "while it runs"])
def test_a_copy_that_fails_is_answered_and_the_next_one_is_made(
    worker: GpuWorker, device: Gated, loop: Loop, when: str
) -> None:
    failure = DeviceError("gpu:0: cuMemcpyHtoDAsync: 719")
    answers: list[CopyResult | GpuError] = []
    memory = bytearray(SMALL)
    if when == "at the start":
        device.refuses = failure
    worker.copy(CopyJob(0, 0, memoryview(memory), "layer"), answers.append)
    if when == "while it runs":
        device.wait_started()
        device.gates[0].failure = failure
        device.gates[0].opened.set()
    loop.run_one()
    device.refuses = None
    assert answers == [failure]
    memory.append(0)
    worker.copy(job(), answers.append)
    device.wait_started()
    device.gates[-1].opened.set()
    loop.run_one()
    assert isinstance(answers[1], CopyResult)
    found = worker.statistics()
    assert (found.copies, found.failed, found.in_flight, found.copied_bytes) == (1, 1, 0, SMALL)


def test_close_gives_up_what_is_queued_and_finishes_what_was_started(
    worker: GpuWorker, device: Gated, loop: Loop
) -> None:
    answers: dict[int, CopyResult | GpuError] = {}
    memory = [bytearray(SMALL) for _ in range(4)]
    for chunk, content in enumerate(memory):
        source = CopyJob(0, chunk * SMALL, memoryview(content), f"layer {chunk}")
        worker.copy(source, lambda answer, chunk=chunk: answers.update({chunk: answer}))  # type: ignore[misc]
    device.wait_started()
    device.wait_started()
    closing = threading.Thread(target=worker.close)
    closing.start()
    for _ in range(2):
        loop.run_one()
    assert sorted(answers) == [2, 3]
    assert "the copy of layer 2 was given up: the daemon shuts down" in str(answers[2])
    assert not device.closed
    for gate in device.gates:
        gate.opened.set()
    closing.join(PATIENCE_S)
    for _ in range(2):
        loop.run_one()
    assert all(isinstance(answers[chunk], CopyResult) for chunk in (0, 1))
    assert device.closed
    for content in memory:
        content.append(0)


def test_after_close_a_job_is_answered_with_an_error(worker: GpuWorker, loop: Loop) -> None:
    worker.close()
    answers: list[CopyResult | GpuError] = []
    memory = bytearray(SMALL)
    worker.copy(CopyJob(0, 0, memoryview(memory), "layer"), answers.append)
    loop.run_one()
    assert isinstance(answers[0], DeviceError)
    assert isinstance(ask(worker, loop, lambda device: device.open()), DeviceError)
    memory.append(0)


def test_close_says_which_thread_is_stuck(worker: GpuWorker, device: Gated) -> None:
    worker.copy(job(), lambda _: None)
    device.wait_started()
    with pytest.raises(TimeoutError, match="tierd-gpu0, tierd-gpu0-wait did not end"):
        worker.close(timeout_s=0.05)


def test_a_gpu_that_does_not_answer_is_named(
    worker: GpuWorker, device: Gated, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.silent() is None
    worker.copy(job(), lambda _: None)
    device.wait_started()
    assert worker.silent() is None
    monkeypatch.setattr("tierd.gpu.worker.SILENT_NS", -1)
    assert SILENT_NS > 0
    silent = worker.silent()
    assert silent is not None
    assert silent.startswith("gpu:0 (memfd) has not answered for")
    assert worker.alive()
    device.gates[0].opened.set()
    loop.run_one()


def test_a_loop_that_never_asks_has_no_thread() -> None:
    worker = GpuWorker(MemfdDevice(9, SMALL, SMALL), 1, Loop().call_soon_threadsafe)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tierd-gpu9")]
    assert worker.alive()
    worker.close()


@pytest.mark.parametrize("seed", range(10))
def test_every_job_is_answered_once_whatever_fails_and_whenever_it_is_closed(seed: int) -> None:
    """And nothing holds a source afterwards."""
    rng = random.Random(seed)
    loop = Loop()
    device = Flaky(rng)
    worker = GpuWorker(device, rng.randint(1, 4), loop.call_soon_threadsafe)
    ask(worker, loop, lambda opened: opened.open())
    ask(worker, loop, lambda opened: opened.add_arena(0, 16 * SMALL))
    sources: list[bytearray] = []
    answers: dict[int, object] = {}

    def note(number: int, answer: object) -> None:
        assert number not in answers
        answers[number] = answer

    count = rng.randint(20, 60)
    closes_at = rng.randrange(count)
    for number in range(count):
        if number == closes_at:
            worker.close()
        if rng.random() < 0.6:
            sources.append(bytearray(rng.randint(1, 3 * SMALL)))
            offset = rng.randrange(12 * SMALL)
            job = CopyJob(0, offset, memoryview(sources[-1]), str(number))
            worker.copy(job, partial(note, number))
        else:
            first = rng.randrange(16)
            worker.submit(lambda opened, at=first: opened.back(0, at, 1), partial(note, number))  # type: ignore[misc]
    while len(answers) < count:
        loop.run_one()
    assert loop.calls.empty()
    for memory in sources:
        memory.append(0)
    found = worker.statistics()
    assert (found.in_flight, found.queued) == (0, 0)
    results = [answer for answer in answers.values() if isinstance(answer, CopyResult)]
    assert (found.copies, found.copied_bytes) == (
        len(results), sum(result.nbytes for result in results),
    )  # fmt: skip
    assert device.backed_bytes == 0


def test_no_copies_in_flight_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 copy in flight, not 0"):
        GpuWorker(MemfdDevice(0, SMALL, SMALL), 0, Loop().call_soon_threadsafe)
