from __future__ import annotations

import sys

import pytest
import torch

from tierd_client.errors import DeviceFailed, ProtocolBroken
from tierd_client.gpu.kinds import make_memory
from tierd_client.gpu.memfd_memory import MemfdMemory

CHUNK = 2 << 20


def test_a_memfd_needs_no_cuda() -> None:
    memory = make_memory("memfd", 2 * CHUNK, CHUNK, torch.device("cpu"), "arena 0")
    assert isinstance(memory, MemfdMemory)


def test_an_unknown_kind_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ProtocolBroken, match="'rocm': known are memfd, cuda_vmm and cuda_ipc"):
        make_memory("rocm", 2 * CHUNK, CHUNK, torch.device("cpu"), "arena 0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_cuda_that_is_missing_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "cuda_ipc":
        monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceFailed, match=r"cuda-bindings|driver does not load|cupy"):
        make_memory(kind, 2 * CHUNK, CHUNK, torch.device("cuda", 0), "arena 0")
