from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.client.fake_streams import FakeStream, FakeStreams
from tierd_client.device_scratch import MOST_BUFFERS, DeviceScratch

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def test_a_thread_that_uses_its_stream_again_gets_the_same_memory_and_waits_for_nothing() -> None:
    streams = FakeStreams(passed_ms=0)
    scratch = DeviceScratch(CPU, streams)
    places = set()
    for _ in range(3):
        with scratch.borrowed((4, 5), torch.float32) as (matrix, _):
            assert (tuple(matrix.shape), matrix.requires_grad) == ((4, 5), True)
            places.add(matrix.data_ptr())
    assert len(places) == 1
    assert (scratch.buffers, scratch.nbytes) == (1, 80)
    assert not streams.current().waited
    assert not any(event.synchronized for event in streams.events)


def test_another_stream_waits_on_the_device_for_the_last_use() -> None:
    streams = FakeStreams(passed_ms=0)
    scratch = DeviceScratch(CPU, streams)
    first, second = FakeStream("first"), FakeStream("second")
    streams.use(first)
    with scratch.borrowed((4, 5), torch.float32):
        assert streams.now_ms == 0
    streams.use(second)
    with scratch.borrowed((4, 5), torch.float32):
        (waited,) = second.waited
        assert waited.stream is first
        assert waited.at_ms == 1
    assert waited.stream is second, "the mark is behind this use now"
    assert not waited.synchronized


def test_a_buffer_grows_when_the_device_is_through_with_it() -> None:
    streams = FakeStreams()
    scratch = DeviceScratch(CPU, streams)
    for rows, waits in ((4, 0), (3, 0), (40, 1), (4, 1), (40, 1)):
        with scratch.borrowed((rows, 5), torch.float32):
            assert sum(event.synchronized for event in streams.events) == waits
    assert scratch.nbytes == 40 * 5 * 4


def test_a_use_that_fails_is_marked_too() -> None:
    streams = FakeStreams()
    scratch = DeviceScratch(CPU, streams)
    with pytest.raises(ZeroDivisionError), scratch.borrowed((1, 1), torch.float32):
        _ = 1 / 0
    assert streams.now_ms == 1
    with scratch.borrowed((1, 1), torch.float32):
        assert scratch.buffers == 1


def test_threads_at_once_have_two_buffers_and_no_more() -> None:
    scratch = DeviceScratch(CPU, FakeStreams())
    inside, most = threading.Semaphore(0), 0
    leave = threading.Event()
    places: list[int] = []

    def use() -> None:
        with scratch.borrowed((8, 8), torch.float32) as (matrix, _):
            places.append(matrix.data_ptr())
            inside.release()
            assert leave.wait(20)

    threads = [threading.Thread(target=use) for _ in range(MOST_BUFFERS + 2)]
    for thread in threads:
        thread.start()
    for _ in range(MOST_BUFFERS):
        assert inside.acquire(timeout=20)
    assert not inside.acquire(timeout=0.05), "a third one is inside"
    most = scratch.buffers
    leave.set()
    for thread in threads:
        thread.join(20)
    assert most == scratch.buffers == MOST_BUFFERS == 2
    assert len(places) == 4
    assert len(set(places)) == 2


# ------------------------------------------------------------------------------------ filled ahead


def fill(scratch: DeviceScratch, streams: FakeStreams, label: object, rows: int = 4) -> int:
    """Where the matrix is that was filled in the stream aside, or 0."""
    with streams.aside(), scratch.filled_ahead((rows, 5), torch.float32, label) as matrix:
        return 0 if matrix is None else matrix.data_ptr()


def borrow(
    scratch: DeviceScratch, label: object = None, then: Callable[[], object] = lambda: None
) -> tuple[int, bool]:
    with scratch.borrowed((4, 5), torch.float32, lambda ahead: ahead == label) as (matrix, there):
        then()
        return matrix.data_ptr(), there


def test_what_was_filled_ahead_is_there_once_and_its_stream_is_waited_for_on_the_device() -> None:
    streams = FakeStreams(passed_ms=0)
    scratch = DeviceScratch(CPU, streams)
    filled: list[int] = []
    first, _ = borrow(scratch, "a", lambda: filled.append(fill(scratch, streams, "b")))
    (place,) = filled
    assert place not in (0, first)
    assert not streams.side.waited, "a new buffer was used by nobody"
    assert borrow(scratch, "b") == (place, True)
    (waited,) = streams.current().waited
    assert not waited.synchronized
    assert not borrow(scratch, "b")[1]


def test_the_stream_aside_waits_for_who_used_the_buffer() -> None:
    streams = FakeStreams(passed_ms=0)
    scratch = DeviceScratch(CPU, streams)
    filled: list[int] = []
    used = []
    for number in range(5):

        def then(following: int = number + 1) -> None:
            filled.append(fill(scratch, streams, following))

        used.append(borrow(scratch, number, then))
    assert [there for _, there in used] == [False, True, True, True, True]
    places = [place for place, _ in used]
    assert places[1:] == filled[:-1]
    assert len(set(places)) == MOST_BUFFERS, "they take turns"
    assert places[0] == places[2] == places[4]
    assert len(streams.side.waited) == 4
    assert scratch.buffers == 2


def test_a_wrong_guess_costs_its_buffer_nothing() -> None:
    streams = FakeStreams(passed_ms=0)
    scratch = DeviceScratch(CPU, streams)
    first, _ = borrow(scratch, None, lambda: fill(scratch, streams, "never asked for"))
    with scratch.borrowed((4, 5), torch.float32) as (matrix, there):
        assert (matrix.data_ptr(), there) == (first, False), "the other one may yet be wanted"
        with scratch.borrowed((4, 5), torch.float32) as (_, second_there):
            assert not second_there
    assert len(streams.current().waited) == 1, "the second was written to in another stream"
    assert not borrow(scratch, "never asked for")[1]


def test_a_fill_that_fails_leaves_no_label() -> None:
    streams = FakeStreams()
    scratch = DeviceScratch(CPU, streams)
    borrow(scratch)
    with (
        pytest.raises(ZeroDivisionError),
        streams.aside(),
        scratch.filled_ahead((4, 5), torch.float32, "b"),
    ):
        _ = 1 / 0
    assert not borrow(scratch, "b")[1]
    assert fill(scratch, streams, "c") != 0, "its place is free again"


def test_nobody_fills_ahead_where_another_thread_computes() -> None:
    streams = FakeStreams()
    scratch = DeviceScratch(CPU, streams)
    borrow(scratch)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(fill(scratch, streams, "b")))
    thread.start()
    thread.join(20)
    assert found == [0]
    with scratch.borrowed((4, 5), torch.float32), scratch.borrowed((4, 5), torch.float32):
        assert fill(scratch, streams, "b") == 0, "both buffers are in use"
    assert fill(scratch, streams, "b") != 0


def test_a_buffer_that_would_have_to_grow_is_not_filled_ahead() -> None:
    streams = FakeStreams()
    scratch = DeviceScratch(CPU, streams)
    borrow(scratch, None, lambda: fill(scratch, streams, "b", rows=3))
    assert scratch.nbytes == 2 * 80, "the second one is made as large as the first"
    assert fill(scratch, streams, "b", rows=5) == 0
    assert not any(event.synchronized for event in streams.events)


def test_no_room_for_a_second_buffer_leaves_the_first_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = FakeStreams()
    scratch = DeviceScratch(CPU, streams)
    borrow(scratch)

    def full(*shape: Any, **how: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, scratch.borrowed((4, 5), torch.float32):
        patch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            fill(scratch, streams, "b")
    assert scratch.buffers == 1
    assert fill(scratch, streams, "b") != 0
