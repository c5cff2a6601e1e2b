from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK, Rig, make_rig
from tests.fake_cuda.names import CUresult
from tierd.gpu.copy_engine import address_of
from tierd.gpu.errors import DeviceError
from tierd.gpu.registration import HostMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 64 << 10
UNKNOWN = CUresult.CUDA_ERROR_UNKNOWN


class Host(HostMemory):
    """With memory that exists, of which parts can be registered."""

    def __init__(self) -> None:
        super().__init__(BLOCK)
        self.memory = memoryview(bytearray(range(256)) * (4 * BLOCK // 256))
        self.add_arena(0, address_of(self.memory), 4 * BLOCK)
        self.populated(0, 0, 4 * BLOCK)

    def register(self, rig: Rig, start: int, end: int) -> None:
        rig.device.register(address_of(self.memory) + start, end - start)
        self.registered(0, start, end)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def rig(host: Host) -> Iterator[Rig]:
    rig = make_rig("cuda_vmm", host=host)
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    rig.device.back(0, 0, 2)
    rig.driver.calls.clear()
    yield rig
    rig.driver.gate.set()
    rig.driver.faults.clear()
    for address in list(rig.driver.registered):
        rig.device.unregister(address, 0)
    rig.device.close()
    assert host.uses == 0
    assert rig.driver.live() == {}


def test_a_copy_is_cut_where_registrations_end_and_arrives_whole(rig: Rig, host: Host) -> None:
    host.register(rig, 0, BLOCK)
    host.register(rig, BLOCK, BLOCK + 4096)
    rig.device.copy(0, 10, host.memory[100 : 3 * BLOCK]).wait()
    assert rig.driver.calls.count("cuMemcpyHtoDAsync") == 3
    assert rig.driver.calls.count("cuEventRecord") == 1
    assert rig.content(0, 0)[10 : 3 * BLOCK - 90] == host.memory[100 : 3 * BLOCK].tobytes()
    assert rig.device.unpinned_bytes == 2 * BLOCK - 4096


def test_the_whole_would_be_refused_by_the_driver(rig: Rig, host: Host) -> None:
    """What the cutting is for: without knowing of registrations, the copy fails."""
    rig.device.register(address_of(host.memory), BLOCK)
    with pytest.raises(DeviceError, match=r"cuMemcpyHtoDAsync \(131072 bytes from .* \(1\)"):
        rig.device.copy(0, 0, host.memory[: 2 * BLOCK])


def test_a_copy_is_under_way_until_its_event_has_passed(rig: Rig, host: Host) -> None:
    host.register(rig, 0, BLOCK)
    rig.driver.gate.clear()
    pending = rig.device.copy(0, 0, host.memory[:BLOCK])
    waited = threading.Thread(target=pending.wait)
    waited.start()
    waited.join(0.05)
    assert waited.is_alive()
    assert host.uses == 1
    rig.driver.gate.set()
    waited.join(20)
    assert host.uses == 0
    assert rig.driver.events == {}


def test_copies_are_started_while_others_are_under_way(rig: Rig, host: Host) -> None:
    rig.driver.gate.clear()
    pending = [rig.device.copy(0, at * BLOCK, host.memory[at * BLOCK :][:BLOCK]) for at in range(4)]
    assert host.uses == 4
    rig.driver.gate.set()
    for one in pending:
        one.wait()
    assert rig.content(0, 0)[: 4 * BLOCK] == host.memory.tobytes()


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuEventCreate", "cuEventRecord"])
def test_a_copy_that_cannot_be_started_leaves_nothing_under_way(
    rig: Rig, host: Host, call: str
) -> None:
    host.register(rig, 0, BLOCK)
    count = 1 + (call == "cuMemcpyHtoDAsync")  # the second part of the copy
    rig.driver.fail_at = (2 * count if call == "cuMemcpyHtoDAsync" else 0, UNKNOWN)
    if call != "cuMemcpyHtoDAsync":
        rig.driver.faults[call] = UNKNOWN
    with pytest.raises(DeviceError, match=call):
        rig.device.copy(0, 0, host.memory[: 2 * BLOCK])
    assert "cuStreamSynchronize" in rig.driver.calls, "what was started has ended"
    assert host.uses == 0
    assert rig.driver.events == {}


def test_a_copy_that_fails_under_way_is_over_when_that_is_said(rig: Rig, host: Host) -> None:
    pending = rig.device.copy(0, 0, host.memory[:BLOCK])
    rig.driver.faults["cuEventSynchronize"] = UNKNOWN
    with pytest.raises(DeviceError, match="cuEventSynchronize"):
        pending.wait()
    assert rig.driver.calls[-4:-2] == ["cuCtxSetCurrent", "cuStreamSynchronize"]
    assert host.uses == 0


def test_an_event_that_is_not_taken_back_is_no_failure_of_the_copy(
    rig: Rig, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    rig.driver.faults["cuEventDestroy"] = UNKNOWN
    rig.device.copy(0, 0, host.memory[:BLOCK]).wait()
    assert "an event is left for later: gpu:0: cuEventDestroy" in caplog.text
    rig.driver.faults.clear()
    assert len(rig.driver.events) == 1


def test_memory_that_is_freed_under_a_copy_is_found_by_the_fake(rig: Rig, host: Host) -> None:
    """So that tests of those who order these two can fail."""
    rig.driver.gate.clear()
    pending = rig.device.copy(0, CHUNK, host.memory[:BLOCK])
    rig.device.free(0, 1, 1)
    rig.driver.gate.set()
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
        pending.wait()
    rig.driver.lost = None
    for event in list(rig.driver.events):
        rig.driver.cuEventDestroy(event)
