"""A whole model whose matrices are computed with as on a GPU: here on the CPU, from both tiers."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.client.fake_streams import FakeStreams
from tests.client.small_checkpoints import IDS, SIZES, save
from tests.daemon.conftest import RunningDaemon
from tierd_client import load, load_model, tensors
from tierd_client.compute import Arithmetic
from tierd_client.device_kernels import TritonKernels
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
    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
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
            assert sum(event.synchronized for event in streams.events) == 1, "scratch grew once"
            statistics = model.tierd.statistics()
            wasted = statistics.expanded_ahead - statistics.used_ahead
            assert statistics.used_ahead >= 2 * 3 * 7 - 3 - 3, "all but where layers were not here"
            assert wasted <= 3 + 3
            expansions = 3 * 3 * 7 + wasted
            assert (statistics.expansions, statistics.expand_ns) == (expansions, 0)
            assert statistics.scratch_bytes == 2 * (100 * 60 * 2 + 2 * TILE_BYTES)
            streams.passed_ms = streams.now_ms
            assert model.tierd.statistics().expand_ns == expansions * 1_000_000


@pytest.mark.slow
def test_tritons_kernels_generate_the_tokens_of_the_model_in_memory(
    tmp_path: Path, streams: FakeStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted, with plans that fuse up to two tokens."""
    from tierd_kernels.gpu.plans import default_plan

    def choose(matrix: Any, tokens: int) -> Any:
        return default_plan(matrix.grid, tokens) if tokens <= 2 else None

    kernels = TritonKernels(SimpleNamespace(choice=choose))
    monkeypatch.setattr("tierd_client.compute.device_kernels", lambda device: kernels)
    save(LlamaConfig(**SIZES, num_key_value_heads=1), tmp_path / "source")
    packed = tmp_path / "packs" / "tiny"
    pack(tmp_path / "source", packed, prune="magnitude", sparsity=0.5)
    unpack(packed, tmp_path / "reference")
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with daemon_with_gpu(tmp_path) as socket, torch.no_grad():
        model: Any = load_model("tiny", "fused", socket, tier="gpu:0")
        with model.tierd:
            expected = reference.generate(IDS[:, :4], **settings)
            assert torch.equal(model.generate(IDS[:, :4], **settings), expected)
            statistics = model.tierd.statistics()
            assert model.tierd.kernels == "triton"
            assert statistics.fused_calls == 3 * 7, "the second pass, of a token in each row"
            assert statistics.expansions >= 3 * 7
            assert statistics.blocked_calls == 0
            logits = model(IDS[:, :4]).logits  # eight tokens: expanded, the same bits
            assert torch.equal(logits, reference(IDS[:, :4]).logits)
