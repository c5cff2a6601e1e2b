from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tierd_client.errors import TensorCorrupt
from tierd_client.expansions import Expansions
from tierd_client.streams import CudaStreams
from tierd_kernels import KernelError, torch_expand, torch_matrix
from tierd_layouts import exponent_packed, packed_matrix

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


def test_marks_know_their_time_and_streams_are_those_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: what torch.cuda is asked for."""
    asked: list[Any] = []
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: asked.append(options))
    monkeypatch.setattr(torch.cuda, "current_stream", asked.append)
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: asked.append((shape, how)))
    cuda = CudaStreams(device)
    cuda.event()
    cuda.current()
    cuda.host_cell()
    pinned = {"dtype": torch.int64, "pin_memory": True}
    assert asked == [{"enable_timing": True}, device, ((1,), pinned)]


class Weight:
    """A PackedTensor on a GPU without a daemon."""

    name, where = "w", "model/layer, 'w'"

    def __init__(self, matrix: torch_matrix.TorchMatrix) -> None:
        self.matrix = torch_matrix.measured(matrix)
        self.shape = (matrix.rows, matrix.cols)
        self.dtype = torch_matrix.DTYPES[matrix.dtype]

    def limits(self) -> tuple[int, int]:
        return self.matrix.most_planes, self.matrix.most_escapes

    def expand_into(self, out: torch.Tensor, **options: Any) -> None:
        del options["limits"]
        try:
            torch_expand.expand(self.matrix, out, **options)
        except KernelError as error:
            raise TensorCorrupt(f"{self.where}: {error}") from error


def random_matrix(rows: int = 1000, cols: int = 700) -> Any:
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((rows, cols), np.float32)
    numbers[rng.random(numbers.shape) < 0.5] = 0
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return exponent_packed.encode(bits, "BF16", masked=True)


@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=gpu)])
def test_expansions_on_a_gpu_are_the_bits_of_the_pack_and_their_time_is_the_gpus(
    cuda: str,
) -> None:
    device = torch.device(cuda, 0)
    matrix = random_matrix()
    wanted = torch.from_numpy(packed_matrix.decode(matrix)).view(torch.bfloat16).to(device)
    weight: Any = Weight(torch_matrix.from_arrays(matrix, device))
    expansions = Expansions(device, CudaStreams(device))
    x = torch.randn(3, 700, device=device).bfloat16()
    with torch.no_grad():
        for _ in range(20):
            other: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for stream in (torch.cuda.current_stream(device), other):
                with torch.cuda.stream(stream), expansions.expanded(weight) as found:
                    assert torch.equal(found, wanted)
                    product = functional.linear(x, found)
                stream.synchronize()
                assert torch.equal(product, functional.linear(x, wanted))
    torch.cuda.synchronize(device)
    count, ns = expansions.totals()
    assert count == 40
    assert 40 * 10_000 < ns < 60_000_000_000


@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=gpu)])
def test_a_model_on_a_gpu_computes_without_any_synchronisation(cuda: str) -> None:
    device = torch.device(cuda, 0)
    weight: Any = Weight(torch_matrix.from_arrays(random_matrix(), device))
    expansions = Expansions(device, CudaStreams(device))
    x = torch.randn(3, 700, device=device).bfloat16()
    for mode in ("default", "error"):  # the first time memory is allocated
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.no_grad(), expansions.expanded(weight) as found:
                functional.linear(x, found)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=gpu)])
def test_a_tile_that_goes_wrong_on_a_gpu_is_raised_by_a_later_product(cuda: str) -> None:
    device = torch.device(cuda, 0)
    there = torch_matrix.from_arrays(random_matrix(), device)
    weight: Any = Weight(there)
    expansions = Expansions(device, CudaStreams(device))
    with torch.no_grad(), expansions.expanded(weight):
        pass
    assert there.heads is not None
    there.heads[5 * 4 + 2] ^= 1
    with torch.no_grad(), expansions.expanded(weight) as found:
        assert not found[:64, 5 * 64 : 6 * 64].any()
    torch.cuda.synchronize(device)
    with pytest.raises(TensorCorrupt, match="model/layer, 'w': tile 5: "):
        expansions.expanded(weight).__enter__()
    other = Expansions(device, CudaStreams(device))
    with pytest.raises(TensorCorrupt, match="model/layer, 'w': tile 5: "):
        other.expanded(weight).__enter__()
