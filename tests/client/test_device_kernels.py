from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.client.conftest import sparse_bits
from tierd_client import device_kernels
from tierd_client.device_kernels import ROOM_BYTES, TorchKernels, TritonKernels
from tierd_client.errors import UnsupportedDevice
from tierd_kernels import KernelError, torch_matrix
from tierd_kernels.errors import WrongKernel
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults
from tierd_kernels.torch_expand import TILE_BYTES
from tierd_layouts import exponent_packed, packed_matrix

if TYPE_CHECKING:
    from pathlib import Path

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An A100 with a folder of its own for compiled kernels."""
    device_kernels._made.cache_clear()
    monkeypatch.delenv("TIERD_GPU_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def stored(rows: int = 70, cols: int = 130) -> tuple[torch_matrix.TorchMatrix, torch.Tensor]:
    """A matrix, and the dense one that it is."""
    bits = sparse_bits(np.random.default_rng(1), (rows, cols), "BF16")
    matrix = exponent_packed.encode(bits, "BF16", masked=True)
    dense = torch.from_numpy(packed_matrix.decode(matrix)).view(torch.bfloat16)
    return torch_matrix.measured(torch_matrix.from_arrays(matrix)), dense


def triton(choose: Any = None) -> TritonKernels:
    return TritonKernels(SimpleNamespace(choice=choose))


@pytest.mark.parametrize("kernels", [TorchKernels(), triton()])
def test_all_kernels_expand_the_same_bits_and_note_what_is_wrong(kernels: Any) -> None:
    matrix, dense = stored()
    out, cell = torch.ones(70, 130, dtype=torch.bfloat16), new_faults(CPU)
    kernels.expand(matrix, out, cell)
    assert int(cell) == NO_FAULT
    assert torch.equal(out.view(torch.int16), dense.view(torch.int16))
    assert matrix.heads is not None
    matrix.heads[5 * 4 + 2] ^= 255
    kernels.expand(matrix, out, cell)
    assert fault_text(int(cell)).startswith("tile 5: ")
    assert not out[64:, 128:].any()
    with pytest.raises(KernelError, match="tile 5: "):
        kernels.expand(matrix, out, None)


def test_tritons_multiply_few_tokens_as_was_measured_and_torchs_never() -> None:
    from tierd_kernels.gpu.plans import default_plan

    matrix, dense = stored()
    plan = default_plan(matrix.grid, 3)
    kernels = triton(lambda matrix, tokens: plan if tokens == 3 else None)
    assert kernels.plan(matrix, 3) is plan
    assert kernels.plan(matrix, 4) is None
    assert TorchKernels().plan(matrix, 3) is None
    x, cell = torch.randn(3, 130).bfloat16(), new_faults(CPU)
    out = torch.empty(3, 70)
    assert kernels.linear(matrix, x, None, plan=plan, faults=cell, out=out) is out
    torch.testing.assert_close(out, x.float() @ dense.float().T)
    rounded = kernels.linear(matrix, x, None, plan=plan, faults=cell)
    assert torch.equal(rounded, out.bfloat16())
    with pytest.raises(UnsupportedDevice):
        TorchKernels().linear(matrix, x, None, plan=plan, faults=cell)


def test_kernels_that_compute_something_else_are_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tierd_kernels.gpu import trial

    def wrongly_chosen(*_: Any) -> None:
        raise WrongKernel("a plan multiplies wrongly")

    def wrongly_expanded(matrix: Any, out: torch.Tensor, **_: Any) -> None:
        out.zero_()

    advice = "; TIERD_GPU_KERNELS=torch takes operations of torch"
    matrix, dense = stored()
    with pytest.raises(UnsupportedDevice, match=f"a plan multiplies wrongly{advice}"):
        triton(wrongly_chosen).plan(matrix, 1)
    kernels = triton()
    with monkeypatch.context() as patched:
        patched.setattr(trial, "expand", wrongly_expanded)
        for _ in range(2):
            with pytest.raises(UnsupportedDevice, match=f"is expanded wrongly on cpu.*{advice}"):
                kernels.expand(matrix, torch.empty_like(dense), None)
    out = torch.empty_like(dense)
    kernels.expand(matrix, out, None)
    assert torch.equal(out.view(torch.int16), dense.view(torch.int16))


def test_only_torchs_have_temporaries() -> None:
    matrix, _ = stored()
    assert TorchKernels().temporary_bytes(matrix) == 6 * TILE_BYTES
    assert triton().temporary_bytes(matrix) == 0
    huge: Any = SimpleNamespace(grid=SimpleNamespace(tiles=1 << 20))
    assert TorchKernels().temporary_bytes(huge) == ROOM_BYTES


def test_the_variable_chooses_and_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd_kernels.gpu.crossover.Crossovers", lambda device: device)
    found = device_kernels.device_kernels(CUDA)
    assert (found.name, found.fused) == ("triton", True)
    assert device_kernels.device_kernels(CUDA) is found
    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
    other = device_kernels.device_kernels(CUDA)
    assert (other.name, other.fused) == ("torch", False)
    monkeypatch.setenv("TIERD_GPU_KERNELS", "cuda")
    with pytest.raises(UnsupportedDevice, match="TIERD_GPU_KERNELS=cuda is unknown: triton or"):
        device_kernels.device_kernels(CUDA)


def test_a_missing_triton_is_an_error_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedDevice, match=r"cuda:0 need Triton.*pip install triton"):
        device_kernels.device_kernels(CUDA)


def test_a_gpu_that_they_cannot_be_compiled_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UnsupportedDevice, match=r"cuda:0 need .* 8\.0, it has 7\.5: .*=torch"):
        device_kernels.device_kernels(CUDA)
    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
    assert device_kernels.device_kernels(CUDA).name == "torch"


def test_a_folder_that_cannot_be_written_is_refused_with_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/nowhere/triton")
    with pytest.raises(UnsupportedDevice, match=r"/proc/nowhere/triton.*set TRITON_CACHE_DIR"):
        device_kernels.device_kernels(CUDA)
