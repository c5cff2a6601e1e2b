"""A whole model whose matrices torch expands, as on a GPU: here on the CPU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.client.fake_streams import FakeStreams
from tests.client.test_load import IDS, SIZES, save
from tierd_client import load, load_model, tensors
from tierd_client.compute import Arithmetic
from tierd_client.private_daemon import start
from tierd_kernels.torch_expand import TILE_BYTES
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("codec", ["raw", "lossless", "int4"])
def test_its_logits_are_those_of_the_model_in_memory_and_nobody_waits_for_the_device(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = FakeStreams(passed_ms=0)
    monkeypatch.setattr(tensors, "KERNEL_DEVICES", set())
    monkeypatch.setattr(load, "Arithmetic", partial(Arithmetic, streams=streams))
    save(LlamaConfig(**SIZES, num_key_value_heads=1), tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "tiny", prune="magnitude", sparsity=0.5, codec=codec)
    unpack(tmp_path / "tiny", tmp_path / "reference")
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    with start(tmp_path / "tiny", "64MiB") as daemon:
        model: Any = load_model("tiny", compute="dense", socket=daemon.socket)
        with model.tierd, torch.no_grad():
            for ids in (IDS, IDS[:1], IDS[:, :1]):
                assert torch.equal(model(ids).logits, reference(ids).logits)
            assert not any(event.synchronized for event in streams.events[1:])
            statistics = model.tierd.statistics()
            packed = 3 * 7
            assert (statistics.expansions, statistics.expand_ns) == (3 * packed, 0)
            assert statistics.scratch_bytes == 100 * 60 * 2 + 2 * TILE_BYTES
            streams.passed_ms = streams.now_ms
            assert model.tierd.statistics().expand_ns == 3 * packed * 1_000_000
