"""The thread that reads into GPUs, with a cuFile that does what the test says."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.daemon.gpu.worker_by_hand import PATIENCE_S, Loop
from tierd.errors import ReadError
from tierd.gpu.direct_reads import DirectReads
from tierd.gpu.errors import DeviceError
from tierd.gpu.memfd_device import MemfdDevice
from tierd.io.cufile import DirectJob
from tierd.io.ssd_job import ExtentRead, ReadResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tierd.io.cufile import CuFileReader


class Reader:
    """A `CuFileReader` whose reads end when they may."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.verified: list[tuple[str, str]] = []
        self.verify_gate = threading.Event()
        self.verify_gate.set()
        self.mismatch: ReadError | None = None

    def _called(self, what: str) -> None:
        self.calls.append(what)
        self.threads.add(threading.current_thread().name)

    def open(self) -> None:
        self._called("open")

    def read(self, job: DirectJob) -> None:
        self._called(f"read {job.layer}")
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.failure is not None:
            raise self.failure

    def verify(self, job: DirectJob) -> None:
        self.verified.append((job.layer, threading.current_thread().name))
        assert self.verify_gate.wait(PATIENCE_S)
        if self.mismatch is not None:
            raise self.mismatch

    def forget(self, files: Iterable[tuple[int, int]]) -> None:
        self._called(f"forget {list(files)}")

    def close(self) -> None:
        self._called("close")


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.gate.set()


@pytest.fixture
def direct(reader: Reader, loop: Loop) -> DirectReads:
    return DirectReads(cast("CuFileReader", reader), loop.call_soon_threadsafe)


DEVICE = MemfdDevice(0, 1 << 16, 1 << 16)


def job(layer: str = "a") -> DirectJob:
    extent = ExtentRead(0, "shard", 0, 4096, (0,))
    return DirectJob("pack", layer, (extent,), ((0, 4096),), lambda address, nbytes: b"")


def test_layers_are_read_one_after_the_other_by_one_thread_for_all_gpus(
    direct: DirectReads, reader: Reader, loop: Loop
) -> None:
    answers: list[Any] = []
    reader.gate.set()
    for number in (0, 1):
        direct.open(MemfdDevice(number, 1 << 16, 1 << 16), answers.append)
    direct.read(DEVICE, job("a"), answers.append)
    direct.read(DEVICE, job("b"), answers.append)
    direct.forget([(1, 2)])
    for _ in range(4):
        loop.run_one()
    assert answers[:2] == [None, None]
    assert [answer.nbytes for answer in answers[2:]] == [4096, 4096]
    direct.close()
    assert reader.calls == ["open", "read a", "read b", "forget [(1, 2)]", "close"]
    assert reader.threads == {"tierd-direct"}
    assert reader.verified == [("a", "tierd-direct-verify"), ("b", "tierd-direct-verify")]


def test_a_layer_is_read_while_the_one_before_is_verified(
    direct: DirectReads, reader: Reader, loop: Loop
) -> None:
    answers: list[Any] = []
    reader.gate.set()
    reader.verify_gate.clear()
    reader.mismatch = ReadError("corrupt")
    for layer in ("a", "b", "c"):
        direct.read(DEVICE, job(layer), answers.append)
    deadline = time.monotonic() + PATIENCE_S
    while len(reader.calls) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert answers == []
    reader.verify_gate.set()
    for _ in range(3):
        loop.run_one()
    assert answers == [reader.mismatch] * 3
    direct.close()


def test_close_gives_up_what_was_not_verified(
    direct: DirectReads, reader: Reader, loop: Loop
) -> None:
    answers: dict[str, Any] = {}
    reader.gate.set()
    reader.verify_gate.clear()
    for layer in ("a", "b"):
        direct.read(DEVICE, job(layer), lambda answer, layer=layer: answers.update({layer: answer}))  # type: ignore[misc]
    deadline = time.monotonic() + PATIENCE_S
    while len(reader.calls) < 2 or not reader.verified:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with pytest.raises(TimeoutError, match="tierd-direct-verify did not end"):
        direct.close(timeout_s=0.3)
    reader.verify_gate.set()
    direct.close()
    for _ in range(2):
        loop.run_one()
    assert isinstance(answers["a"], ReadResult)
    assert "the checksum of pack 'pack', layer 'b' was given up" in str(answers["b"])


@pytest.mark.parametrize("failure", [ReadError("a layer is not read"), RuntimeError("a defect")])
def test_whatever_happens_to_a_read_is_its_answer_and_the_next_one_is_made(
    direct: DirectReads, reader: Reader, loop: Loop, failure: Exception
) -> None:
    answers: list[Any] = []
    reader.gate.set()
    reader.failure = failure
    direct.read(DEVICE, job(), answers.append)
    loop.run_one()
    reader.failure = None
    direct.read(DEVICE, job(), answers.append)
    loop.run_one()
    if isinstance(failure, ReadError):
        assert answers[0] is failure
    else:
        assert type(answers[0]) is DeviceError
        assert "RuntimeError('a defect')" in str(answers[0])
    assert isinstance(answers[1], ReadResult)
    direct.close()


def test_close_lets_the_read_under_way_end_and_gives_up_the_others(
    direct: DirectReads, reader: Reader, loop: Loop
) -> None:
    answers: dict[str, Any] = {}
    for layer in ("a", "b"):
        direct.read(DEVICE, job(layer), lambda answer, layer=layer: answers.update({layer: answer}))  # type: ignore[misc]
    assert reader.entered.wait(PATIENCE_S)
    with pytest.raises(TimeoutError, match="tierd-direct did not end"):
        direct.close(timeout_s=0.05)
    loop.run_one()
    assert "the read of pack 'pack', layer 'b' was given up" in str(answers["b"])
    assert "a" not in answers
    reader.gate.set()
    direct.close()
    loop.run_one()
    assert "the checksum of pack 'pack', layer 'a' was given up" in str(answers["a"])
    direct.read(DEVICE, job("c"), lambda answer: answers.update(c=answer))
    loop.run_one()
    assert "was given up: the daemon shuts down" in str(answers["c"])


def test_a_read_that_takes_too_long_is_said_to(
    direct: DirectReads, reader: Reader, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert direct.silent() is None
    direct.read(DEVICE, job(), lambda _: None)
    assert reader.entered.wait(PATIENCE_S)
    assert direct.silent() is None
    monkeypatch.setattr("tierd.gpu.direct_reads.SILENT_NS", -1)
    assert str(direct.silent()).startswith("cuFile has not answered for")
    assert direct.alive()
    reader.gate.set()
    loop.run_one()
    direct.close()


def test_without_a_gpu_there_is_no_thread(direct: DirectReads, reader: Reader) -> None:
    direct.forget([(1, 2)])
    assert direct.alive()
    direct.close()
    assert reader.calls == []
