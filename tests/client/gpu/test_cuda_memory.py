from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from tierd_client.errors import BadTensorArgument
from tierd_client.gpu import cuda_memory, dlpack
from tierd_client.gpu.cuda_memory import CudaMemory

GPU = torch.device("cuda", 1)


class Played(CudaMemory):
    """Memory of the host that says it is a GPU's; only what makes tensors knows better."""

    def __init__(self, nbytes: int = 4096) -> None:
        self.array = np.arange(nbytes, dtype=np.uint8)
        super().__init__(self.array.ctypes.data, nbytes, GPU, "arena 5 of gpu:0")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that tensors were asked for."""
    devices: list[torch.device] = []
    real = dlpack.bytes_at

    def bytes_at(address: int, nbytes: int, device: torch.device, owner: Any) -> torch.Tensor:
        devices.append(device)
        return real(address, nbytes, torch.device("cpu"), owner)

    monkeypatch.setattr(cuda_memory, "bytes_at", bytes_at)
    return devices


def test_tensors_are_on_the_gpu_and_made_once_for_each_dtype(asked: list[torch.device]) -> None:
    memory = Played()
    assert memory.tensor(torch.uint8, (3,), (1,), 7).tolist() == [7, 8, 9]
    assert memory.tensor(torch.int16, (2, 1), (1, 1), 2).tolist() == [[0x0302], [0x0504]]
    memory.tensor(torch.uint8, (4,), (1,), 0)
    assert asked == [GPU, GPU]
    assert memory.device == GPU


def test_a_span_that_is_no_multiple_of_an_item_has_items_up_to_its_end() -> None:
    memory = Played(nbytes=4099)
    assert memory.tensor(torch.int64, (1,), (1,), 4088).tolist() != []


def test_a_tracked_tensor_holds_an_object_until_its_storage_is_gone() -> None:
    memory = Played()
    view, held = memory.tracked(torch.int16, (2, 2), 8, 8)
    assert view.shape == (2, 2)
    alive, owner = weakref.ref(held), weakref.ref(memory._owner)
    row = view[1]
    del held, view, memory
    gc.collect()
    assert alive() is not None
    assert owner() is not None
    del row
    gc.collect()
    assert alive() is owner() is None


def test_the_cpu_is_refused() -> None:
    with pytest.raises(BadTensorArgument, match="arena 5 of gpu:0 is on cuda:1, which the CPU"):
        Played().buffer(0, 1)
