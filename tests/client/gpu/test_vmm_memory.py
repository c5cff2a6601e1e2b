from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import pytest
import torch

from tierd_client.errors import ProtocolBroken
from tierd_client.gpu.cuda_driver import CudaDriver
from tierd_client.gpu.vmm_memory import VmmMemory

if TYPE_CHECKING:
    from tests.client.gpu.conftest import Exporter
    from tests.fake_cuda.driver import FakeDriver

CHUNK = 2 << 20
#: The driver's addresses are addresses of this process, so torch's CPU reads them.
HOST = torch.device("cpu")


def memory_of(fake: FakeDriver) -> VmmMemory:
    return VmmMemory(4 * CHUNK, CHUNK, HOST, CudaDriver(0, fake), "arena 0 of gpu:0")


def test_a_chunk_lies_at_its_place_in_the_arena(fake: FakeDriver, exporter: Exporter) -> None:
    memory = memory_of(fake)
    memory.map(2, exporter.chunk(b"weights", CHUNK))
    memory.map(3, exporter.chunk(b"and more", CHUNK))
    assert bytes(memory.tensor(torch.uint8, (7,), (1,), 2 * CHUNK).tolist()) == b"weights"
    whole = memory.tensor(torch.uint8, (2 * CHUNK,), (1,), 2 * CHUNK)
    assert bytes(whole[CHUNK : CHUNK + 8].tolist()) == b"and more"


def test_what_is_let_go_is_unmapped_and_can_come_back(fake: FakeDriver, exporter: Exporter) -> None:
    memory = memory_of(fake)
    memory.map(2, exporter.chunk(b"old", CHUNK))
    memory.unmap(2)
    assert fake.mappings == {}
    memory.map(2, exporter.chunk(b"new", CHUNK))
    assert bytes(memory.tensor(torch.uint8, (3,), (1,), 2 * CHUNK).tolist()) == b"new"


def test_addresses_go_when_the_last_tensor_is_gone(fake: FakeDriver, exporter: Exporter) -> None:
    memory = memory_of(fake)
    memory.map(1, exporter.chunk(b"weights", CHUNK))
    view, held = memory.tracked(torch.uint8, (7,), CHUNK, 7)
    memory.tensor(torch.uint8, (7,), (1,), CHUNK)
    del memory, held
    gc.collect()
    assert fake.live() != {}
    assert bytes(view.tolist()) == b"weights"
    del view
    gc.collect()
    assert fake.live() == {}


def test_a_forked_child_touches_nothing_of_cuda(fake: FakeDriver, exporter: Exporter) -> None:
    memory = memory_of(fake)
    memory.map(1, exporter.chunk(b"weights", CHUNK))
    calls = len(fake.calls)
    child = os.fork()
    if child == 0:
        fence = memory.fence()
        del memory
        gc.collect()
        os._exit(7 if len(fake.calls) == calls and fence is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert bytes(memory.tensor(torch.uint8, (7,), (1,), CHUNK).tolist()) == b"weights"


def test_a_handle_is_refused(fake: FakeDriver) -> None:
    with pytest.raises(ProtocolBroken, match="arena 0 of gpu:0 is a cuda_vmm device's"):
        memory_of(fake).map_all(b"x" * 64, CHUNK)
