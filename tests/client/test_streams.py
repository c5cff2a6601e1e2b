from __future__ import annotations

import os
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tierd_client.device_kernels import TorchKernels, TritonKernels
from tierd_client.errors import TensorCorrupt
from tierd_client.expansions import Expansions
from tierd_client.fault_cells import FaultCells
from tierd_client.streams import CudaStreams
from tierd_kernels import torch_matrix
from tierd_kernels.faults import new_faults
from tierd_layouts import exponent_packed, packed_matrix

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    monkeypatch.setattr(torch, "full", lambda *what, **how: asked.append((*what, how)))

    def make(device: torch.device) -> str:
        asked.append(("new", device))
        return "a stream"

    monkeypatch.setattr(torch.cuda, "Stream", make)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: asked.append(("use", stream)))
    cuda = CudaStreams(device)
    cuda.event()
    cuda.current()
    cuda.cells(7, 5)
    there = {"dtype": torch.int64, "device": device}
    here = {"dtype": torch.int64, "pin_memory": True}
    assert asked == [{"enable_timing": True}, device, ((7,), 5, there), ((7,), 5, here)]
    asked.clear()
    for _ in range(2):
        cuda.aside()
    assert asked == [("new", device), ("use", "a stream"), ("use", "a stream")]


def test_a_graph_is_captured_on_its_device_while_other_threads_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    device = torch.device("cuda", 3)

    @contextmanager
    def capture(graph: str, **options: Any) -> Iterator[None]:
        asked.append(("begin", graph, options))
        yield
        asked.append(("end", graph))

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        asked.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", use)
    found: Any = CudaStreams(device).captured(lambda: asked.append("work"))
    assert found == ("a graph", None)
    mode = {"capture_error_mode": "thread_local"}
    assert asked == [device, ("begin", "a graph", mode), "work", ("end", "a graph")]


class Weight:
    """A PackedTensor on a GPU without a daemon."""

    name, where = "w", "model/layer, 'w'"

    def __init__(self, matrix: torch_matrix.TorchMatrix) -> None:
        self.lease = self
        self.matrix = torch_matrix.measured(matrix)
        self.shape = (matrix.rows, matrix.cols)
        self.dtype = torch_matrix.DTYPES[matrix.dtype]

    def torch_matrix(self) -> torch_matrix.TorchMatrix:
        return self.matrix

    def __getitem__(self, name: str) -> Weight:
        return self


STORED: Any = SimpleNamespace(name="w", layer=0)


class Model:
    """One matrix, computed with again and again."""

    def __init__(self, matrix: torch_matrix.TorchMatrix, kernels: Any = None) -> None:
        self.weight: Any = Weight(matrix)
        self.streams = CudaStreams(matrix.device)
        self.cells = FaultCells(self.streams)
        kernels = kernels or TorchKernels()
        self.expansions = Expansions(matrix.device, self.streams, kernels, self.cells, self)

    def expanded(self) -> Any:
        return self.expansions.expanded(STORED, self.weight)

    @contextmanager
    def glimpse(self, layer: int) -> Iterator[Any]:
        yield self.weight


def random_matrix(rows: int = 1000, cols: int = 700) -> Any:
    rng = np.random.default_rng(1)
    numbers = rng.standard_normal((rows, cols), np.float32)
    numbers[rng.random(numbers.shape) < 0.5] = 0
    bits = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    return exponent_packed.encode(bits, "BF16", masked=True)


compiled = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TIERD_KERNELS_DEVICE=cuda compiles kernels"
)
KERNELS = [
    pytest.param(TorchKernels(), id="torch"),
    pytest.param(TritonKernels(None), id="triton", marks=compiled),
]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=gpu)])
def test_expansions_on_a_gpu_are_the_bits_of_the_pack_and_their_time_is_the_gpus(
    cuda: str, kernels: Any
) -> None:
    device = torch.device(cuda, 0)
    matrix = random_matrix()
    wanted = torch.from_numpy(packed_matrix.decode(matrix)).view(torch.bfloat16).to(device)
    model = Model(torch_matrix.from_arrays(matrix, device), kernels)
    x = torch.randn(3, 700, device=device).bfloat16()
    with torch.no_grad():
        for _ in range(20):
            other: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for stream in (torch.cuda.current_stream(device), other):
                with torch.cuda.stream(stream), model.expanded() as found:
                    assert torch.equal(found, wanted)
                    product = functional.linear(x, found)
                stream.synchronize()
                assert torch.equal(product, functional.linear(x, wanted))
    torch.cuda.synchronize(device)
    count, ns = model.expansions.totals()
    assert count > 40
    assert model.expansions.used_ahead > 30
    assert 40 * 1_000 < ns < 60_000_000_000


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=gpu)])
def test_a_model_on_a_gpu_computes_without_any_synchronisation(cuda: str, kernels: Any) -> None:
    device = torch.device(cuda, 0)
    model = Model(torch_matrix.from_arrays(random_matrix(), device), kernels)
    x = torch.randn(3, 700, device=device).bfloat16()
    for mode in ("default", "default", "default", "error"):  # first memory is allocated
        torch.cuda.synchronize(device)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.no_grad(), model.expanded() as found:
                functional.linear(x, found)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=gpu)])
def test_a_tile_that_goes_wrong_on_a_gpu_is_found_later_and_met_first_at_once(
    cuda: str, kernels: Any
) -> None:
    device = torch.device(cuda, 0)
    there = torch_matrix.from_arrays(random_matrix(), device)
    model = Model(there, kernels)
    with torch.no_grad(), model.expanded():
        pass
    assert there.heads is not None
    there.heads[5 * 4 + 2] ^= 255
    torch.cuda.synchronize(device)
    with torch.no_grad(), model.expanded() as found:
        assert not found[:64, 5 * 64 : 6 * 64].any()
    model.cells.sweep()
    torch.cuda.synchronize(device)
    with pytest.raises(TensorCorrupt, match="model/layer, 'w': tile 5: "):
        model.cells.raise_found()
    with pytest.raises(TensorCorrupt, match="model/layer, 'w': tile 5: "):
        Model(there, kernels).expanded().__enter__()


@compiled
@pytest.mark.parametrize("cuda", [pytest.param("cuda", marks=gpu)])
def test_a_captured_product_is_repeated_with_what_is_in_its_input_then(cuda: str) -> None:
    from tierd_kernels.gpu.linear import linear

    device = torch.device(cuda, 0)
    matrix = torch_matrix.measured(torch_matrix.from_arrays(random_matrix(), device))
    x = torch.randn(3, 700, device=device).bfloat16()
    cell = new_faults(device)

    def run() -> torch.Tensor:
        return linear(matrix, x, faults=cell)

    run()  # compiles
    graph, out = CudaStreams(device).captured(run)
    for _ in range(3):
        x.copy_(torch.randn(3, 700, device=device))
        expected = run()
        graph.replay()
        assert torch.equal(out, expected)
