from __future__ import annotations

import threading

import pytest
import torch

from tests.client.fake_streams import FakeStream, FakeStreams
from tierd_client.scratch import ALIGNMENT, MOST_BUFFERS, DeviceScratch, Scratch


def test_the_same_memory_serves_every_shape_and_dtype() -> None:
    scratch = Scratch()
    large = scratch.matrix((7, 5), torch.float32)
    small = scratch.matrix((3, 4), torch.bfloat16)
    assert large.data_ptr() == small.data_ptr()
    assert large.data_ptr() % ALIGNMENT == 0
    assert (tuple(small.shape), small.dtype) == ((3, 4), torch.bfloat16)
    assert scratch.matrix((7, 5), torch.float32) is large
    assert scratch.nbytes == 7 * 5 * 4


def test_it_grows_to_the_largest_matrix_and_keeps_no_older_buffer() -> None:
    scratch = Scratch()
    assert scratch.nbytes == 0
    for rows in (3, 1000, 2):
        matrix = scratch.matrix((rows, 8), torch.float16)
        assert matrix.shape == (rows, 8)
        assert matrix.data_ptr() % ALIGNMENT == 0
    assert scratch.nbytes == 1000 * 8 * 2
    again = scratch.matrix((3, 8), torch.float16)
    assert again.data_ptr() == matrix.data_ptr(), "laid over the buffer that grew"


def test_a_matrix_without_elements_is_one() -> None:
    assert Scratch().matrix((0, 4), torch.bfloat16).shape == (0, 4)


def test_it_looks_like_a_parameter_and_outlives_inference_mode() -> None:
    with torch.inference_mode():
        matrix = Scratch().matrix((2, 2), torch.float32)
    assert matrix.requires_grad
    assert matrix.is_leaf
    assert not matrix.is_inference()


# ------------------------------------------------------------------------------------ on a device

CPU = torch.device("cpu")


def test_a_thread_that_uses_its_stream_again_gets_the_same_memory_and_waits_for_nothing() -> None:
    streams = FakeStreams(passed_ms=0)
    scratch = DeviceScratch(CPU, streams)
    places = set()
    for _ in range(3):
        with scratch.borrowed((4, 5), torch.float32) as matrix:
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
        with scratch.borrowed((8, 8), torch.float32) as matrix:
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
