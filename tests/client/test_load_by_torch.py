"""A whole model whose matrices torch expands, as on a GPU: here on the CPU, from both tiers."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.client.fake_streams import FakeStreams
from tests.client.test_load import IDS, SIZES, save
from tests.daemon.conftest import RunningDaemon
from tierd_client import load, load_model, tensors
from tierd_client.compute import Arithmetic
from tierd_kernels.torch_expand import TILE_BYTES
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    """Of the GPU that the host plays: no mark passes before it is told to."""
    streams = FakeStreams(passed_ms=0)
    monkeypatch.setattr(tensors, "KERNEL_DEVICES", set())
    monkeypatch.setattr(load, "Arithmetic", partial(Arithmetic, streams=streams))
    return streams


@contextmanager
def daemon_with_gpu(folder: Path) -> Iterator[str]:
    flags = ["--models", str(folder / "packs"), "--dram", "64MiB", "--gpu", "0=12MiB"]
    flags += ["--gpu-device", "memfd", "--gpu-chunk", "2MiB"]
    daemon = RunningDaemon(str(folder / "tierd.sock"), folder / "log", flags)
    try:
        daemon.wait_ready()
        yield daemon.socket
    finally:
        daemon.kill()


@pytest.mark.parametrize("tier", ["dram", "gpu:0"])
@pytest.mark.parametrize("codec", ["raw", "lossless", "int4"])
def test_its_logits_are_those_of_the_model_in_memory_and_nobody_waits_for_the_device(
    codec: str, tier: str, tmp_path: Path, streams: FakeStreams
) -> None:
    save(LlamaConfig(**SIZES, num_key_value_heads=1), tmp_path / "source")
    packed = tmp_path / "packs" / "tiny"
    pack(tmp_path / "source", packed, prune="magnitude", sparsity=0.5, codec=codec)
    unpack(packed, tmp_path / "reference")
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    with daemon_with_gpu(tmp_path) as socket, torch.no_grad():
        model: Any = load_model("tiny", "dense", socket, tier=tier)
        with model.tierd:
            for ids in (IDS, IDS[:1], IDS[:, :1]):
                assert torch.equal(model(ids).logits, reference(ids).logits)
            scratch_mark, *marks = streams.events
            assert scratch_mark.synchronized == 1, "scratch grew once"
            assert not any(event.synchronized for event in marks)
            statistics = model.tierd.statistics()
            matrices = 3 * 7
            assert (statistics.expansions, statistics.expand_ns) == (3 * matrices, 0)
            assert statistics.scratch_bytes == 100 * 60 * 2 + 2 * TILE_BYTES
            streams.passed_ms = streams.now_ms
            assert model.tierd.statistics().expand_ns == 3 * matrices * 1_000_000
