"""What every device does, whichever it is."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK, MEMORY, MIB, Rig, make_rig
from tests.fake_cuda.names import CUdevice_attribute
from tierd.gpu.device import Export
from tierd.gpu.errors import DeviceFull, DeviceUnavailable
from tierd.gpu.memfd_device import MemfdDevice

if TYPE_CHECKING:
    from tierd.gpu.device import Device, Kind

CHUNKS = BUDGET // CHUNK


def copy(device: Device, offset: int, content: bytes, arena: int = 0) -> None:
    device.copy(arena, offset, memoryview(bytearray(content))).wait()


def test_it_says_what_it_is(kind: Kind) -> None:
    rig = make_rig(kind)
    info = rig.device.open()
    assert (rig.device.kind, rig.device.number, rig.device.chunk_bytes) == (kind, 0, CHUNK)
    assert info.name
    assert info.uuid
    assert info.driver
    assert (info.total_bytes, info.free_bytes) == (MEMORY, MEMORY)
    rig.device.close()


def test_what_was_copied_is_what_clients_see(rig: Rig) -> None:
    rig.device.back(0, 1, 2)
    content = random.Random(1).randbytes(CHUNK)
    copy(rig.device, CHUNK + 4096, content)
    assert rig.content(0, 1)[4096:] == content[:-4096]
    assert rig.content(0, 2)[:4096] == content[-4096:]


def test_a_read_only_source_is_copied_too(rig: Rig) -> None:
    rig.device.back(0, 0, 1)
    rig.device.copy(0, 0, memoryview(b"read-only")).wait()
    assert rig.content(0, 0)[:9] == b"read-only"


def test_what_is_in_its_memory_can_be_fetched_by_any_thread_part_by_part(rig: Rig) -> None:
    rig.device.back(0, 1, 3)
    content = random.Random(1).randbytes(2 * CHUNK)
    copy(rig.device, CHUNK + 4096, content)
    parts = rig.device.parts(0, CHUNK + 4096, len(content))
    assert sum(nbytes for _, nbytes in parts) == len(content)
    if rig.device.kind != "cuda_ipc":
        assert [nbytes for _, nbytes in parts] == [CHUNK - 4096, CHUNK, 4096], "one of each chunk"
    found: list[bytearray] = []

    def fetch() -> None:
        rig.device.enter()
        found.extend(rig.device.fetch(address, nbytes) for address, nbytes in parts)

    thread = threading.Thread(target=fetch)
    thread.start()
    thread.join(20)
    assert b"".join(found) == content
    with pytest.raises(ValueError, match="has no memory"):
        rig.device.parts(0, CHUNK, 4 * CHUNK)


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [("cuda_vmm", "GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"),
     ("cuda_ipc", "GPU_DIRECT_RDMA_SUPPORTED")],
)  # fmt: skip
def test_a_gpu_that_ssds_cannot_write_into_is_refused_where_they_should(
    kind: Kind, attribute: str
) -> None:
    for direct in (False, True):
        rig = make_rig(kind, direct=direct)
        rig.driver.attributes[getattr(CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")] = 0
        if direct:
            with pytest.raises(DeviceUnavailable, match=f"says 0 to {attribute}") as refused:
                rig.device.open()
            assert refused.value.advice == "leave gpu_direct off"
        else:
            rig.device.open()
            rig.device.close()
        assert rig.driver.live() == {}


def test_chunks_that_ssds_write_into_are_made_for_that() -> None:
    for direct in (False, True):
        rig = make_rig("cuda_vmm", direct=direct)
        rig.device.open()
        rig.device.add_arena(0, BUDGET)
        rig.device.back(0, 0, 1)
        assert [memory.direct for memory in rig.driver.handles.values()] == [direct]
        rig.device.close()


def test_a_source_can_be_released_after_its_copy(rig: Rig) -> None:
    rig.device.back(0, 0, 1)
    memory = bytearray(4096)
    source = memoryview(memory)
    rig.device.copy(0, 0, source).wait()
    source.release()
    memory.append(0)


def test_copies_that_are_started_together_all_arrive(rig: Rig) -> None:
    rig.device.back(0, 0, CHUNKS)
    contents = [bytes([number + 1]) * CHUNK for number in range(CHUNKS)]
    pending = [
        rig.device.copy(0, number * CHUNK, memoryview(content))
        for number, content in enumerate(contents)
    ]
    for one in pending:
        one.wait()
    assert [rig.content(0, number) for number in range(CHUNKS)] == contents


def test_memory_that_is_there_keeps_what_it_holds(rig: Rig) -> None:
    rig.device.back(0, 0, 1)
    copy(rig.device, 0, b"kept")
    rig.device.back(0, 0, 3)
    assert rig.content(0, 0)[:4] == b"kept"


def test_what_has_no_memory_may_be_freed(rig: Rig) -> None:
    rig.device.free(0, 0, CHUNKS)
    rig.device.back(0, 3, 1)
    rig.device.free(0, 0, CHUNKS)
    rig.device.free(0, 0, CHUNKS)
    with pytest.raises(ValueError, match="chunk 3 of arena 0 has no memory"):
        rig.device.export(0, 3)


def test_mistakes_of_the_caller_are_named(rig: Rig) -> None:
    rig.device.back(0, 0, 1)
    with pytest.raises(ValueError, match="there is no arena 5"):
        rig.device.back(5, 0, 1)
    with pytest.raises(ValueError, match=r"chunks \[7, 9\) are not in arena 0 of 8 chunks"):
        rig.device.back(0, 7, 2)
    with pytest.raises(ValueError, match=r"chunks \[-1, 1\)"):
        rig.device.free(0, -1, 2)
    with pytest.raises(ValueError, match="chunk 1 of arena 0 has no memory"):
        rig.device.export(0, 1)
    with pytest.raises(ValueError, match=r"of arena 0: chunk 1 has no memory"):
        rig.device.copy(0, CHUNK - 1, memoryview(b"ab"))
    with pytest.raises(ValueError, match="is no range"):
        rig.device.copy(0, 0, memoryview(b""))
    with pytest.raises(ValueError, match="in one piece"):
        rig.device.copy(0, 0, memoryview(b"abcd")[::2])
    with pytest.raises(ValueError, match="arena 0 exists already"):
        rig.device.add_arena(0, CHUNK)
    with pytest.raises(ValueError, match="whole chunks of 2097152 bytes, not 1 bytes"):
        rig.device.add_arena(1, 1)


def test_a_span_is_whole_chunks_and_holds_the_budget(rig: Rig) -> None:
    for budget in (CHUNK, 5 * CHUNK, BUDGET):
        span = rig.device.span_bytes(budget)
        assert span % CHUNK == 0
        assert span >= budget


def test_a_budget_that_does_not_fit_is_refused_with_both_numbers(kind: Kind) -> None:
    rig = make_rig(kind, budget=MEMORY + CHUNK)
    with pytest.raises(
        DeviceUnavailable, match=r"was given 26(\.0)? MiB, but 24(\.0)? MiB"
    ) as found:
        rig.device.open()
    assert "lower --gpu 0=SIZE" in found.value.advice
    assert rig.driver.live() == {}


def test_a_gpu_that_was_full_can_be_opened_when_there_is_room(kind: Kind) -> None:
    """As after a daemon whose clients still had its memory."""
    rig = make_rig(kind)
    if isinstance(rig.device, MemfdDevice):
        rig.device._memory_bytes = BUDGET - CHUNK
    rig.driver.memory_bytes = BUDGET - CHUNK
    with pytest.raises(DeviceFull) as found:
        rig.device.open()
    assert isinstance(found.value, DeviceUnavailable)
    if isinstance(rig.device, MemfdDevice):
        rig.device._memory_bytes = BUDGET
    rig.driver.memory_bytes = BUDGET
    rig.device.open()
    rig.device.add_arena(0, BUDGET)
    rig.device.back(0, 0, 1)
    copy(rig.device, 0, b"works")
    assert rig.content(0, 0)[:5] == b"works"
    rig.device.close()
    assert rig.driver.live() == {}


def test_an_export_is_a_descriptor_or_a_handle() -> None:
    with pytest.raises(ValueError, match="a descriptor or a handle"):
        Export(1)
    with pytest.raises(ValueError, match="a descriptor or a handle"):
        Export(1, fd=3, handle=b"x")


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_calls_does_what_a_model_of_it_does(rig: Rig, seed: int) -> None:
    """Prints the calls when it fails."""
    rng = random.Random(seed)
    device = rig.device
    model: dict[int, bytearray] = {}
    for _ in range(60):
        first = rng.randrange(CHUNKS)
        count = rng.randint(1, CHUNKS - first)
        match rng.choice(["back", "free", "copy", "copy", "export"]):
            case "back":
                print("back", first, count)
                device.back(0, first, count)
                for chunk in range(first, first + count):
                    if chunk not in model:  # what a chunk holds first is not promised
                        model[chunk] = bytearray(rig.content(0, chunk))
            case "free":
                print("free", first, count)
                device.free(0, first, count)
                for chunk in range(first, first + count):
                    model.pop(chunk, None)
            case "copy":
                offset = first * CHUNK + rng.randrange(CHUNK)
                nbytes = min(rng.randint(1, 3 * MIB), BUDGET - offset)
                print("copy", offset, nbytes)
                content = rng.randbytes(nbytes)
                touched = range(offset // CHUNK, (offset + nbytes - 1) // CHUNK + 1)
                if not all(chunk in model for chunk in touched):
                    with pytest.raises(ValueError, match="has no memory"):
                        copy(device, offset, content)
                    continue
                copy(device, offset, content)
                for chunk in touched:
                    start = max(0, offset - chunk * CHUNK)
                    part = content[max(0, chunk * CHUNK - offset) :][: CHUNK - start]
                    model[chunk][start : start + len(part)] = part
            case "export":
                print("export", first)
                if first not in model:
                    with pytest.raises(ValueError, match="has no memory"):
                        device.export(0, first)
                    continue
                assert rig.content(0, first) == model[first]
        if device.elastic:
            assert device.backed_bytes == len(model) * CHUNK
            assert device.memory().free_bytes == MEMORY - len(model) * CHUNK
