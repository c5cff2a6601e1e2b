from __future__ import annotations

import ctypes
import threading
import time

import pytest

from tierd.gpu.copy_engine import CopyEngine, address_of
from tierd.gpu.errors import DeviceError

MIB = 1 << 20


@pytest.fixture
def target() -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * (4 * MIB))()


def test_bytes_arrive_in_the_order_of_the_copies(target: ctypes.Array[ctypes.c_char]) -> None:
    engine = CopyEngine("engine", None, 0)
    address = ctypes.addressof(target)
    copies = [engine.start(address + at, memoryview(b"abcdef"[at:])) for at in range(3)]
    copies += [engine.start(address, memoryview(b"xy"))]
    for copy in copies:
        copy.wait()
    engine.close()
    assert bytes(target)[:6] == b"xycdef"


def test_a_copy_takes_its_latency_and_its_bytes(target: ctypes.Array[ctypes.c_char]) -> None:
    """At least: nothing can make it take less, much can make it take more."""
    engine = CopyEngine("engine", 100 * MIB, 20_000)
    start = time.monotonic()
    engine.start(ctypes.addressof(target), memoryview(bytes(4 * MIB))).wait()
    assert time.monotonic() - start >= 0.02 + 0.04
    engine.close()


def test_the_latency_of_a_copy_passes_while_others_move(
    target: ctypes.Array[ctypes.c_char], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of its own, since others' work is not to be measured."""
    now_ns = 0
    slept: list[int] = []
    started = threading.Event()

    def sleep(seconds: float) -> None:
        nonlocal now_ns
        started.wait()
        slept.append(round(seconds * 1e9))
        now_ns += slept[-1]

    monkeypatch.setattr("tierd.gpu.copy_engine.time.monotonic_ns", lambda: now_ns)
    monkeypatch.setattr("tierd.gpu.copy_engine.time.sleep", sleep)
    engine = CopyEngine("engine", 1000 * MIB, 500)
    address = ctypes.addressof(target)
    copies = [engine.start(address, memoryview(bytes(MIB))) for _ in range(3)]
    started.set()
    for copy in copies:
        copy.wait()
    engine.close()
    assert sum(slept) == 500_000 + 3 * 1_000_000


def test_after_close_nothing_is_started() -> None:
    engine = CopyEngine("tierd-gpu0-engine", None, 0)
    engine.close()
    with pytest.raises(DeviceError, match="tierd-gpu0-engine is closed: 3 bytes are not copied"):
        engine.start(0, memoryview(b"abc"))


@pytest.mark.parametrize(("bandwidth", "latency_us"), [(0, 0), (-1, 0), (None, -1)])
def test_what_no_engine_can_do_is_refused(bandwidth: int | None, latency_us: int) -> None:
    with pytest.raises(ValueError, match="bandwidth above 0"):
        CopyEngine("engine", bandwidth, latency_us)


def test_the_address_of_a_view_is_where_its_bytes_lie() -> None:
    memory = bytearray(b"0123456789")
    view = memoryview(memory)[3:7]
    assert ctypes.string_at(address_of(view), 4) == b"3456"
    view.release()
    memory.append(0)  # nothing holds it
