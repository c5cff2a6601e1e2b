"""Files that compressed-tensors itself wrote; data/README.md says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierd_tools.checkpoint import IMPORT_NOTE, Checkpoint
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

DATA = Path(__file__).parent / "data"


def without_negative_zeros(data: bytes) -> bytes:
    bits = np.frombuffer(data, "<u2").copy()
    bits[bits == 0x8000] = 0
    return bits.tobytes()


@pytest.mark.parametrize(
    ("folder", "dense", "note"),
    [
        ("bitmask-a", "dense", "16 tensors from sparse-bitmask; config.json without"),
        ("bitmask-b", "dense", "7 tensors from sparse-bitmask; config.json without"),
        ("bitmask-24", "dense-24", "7 tensors from sparse-24-bitmask; config.json without"),
        ("bitmask-untrue", "dense-24", "config.json without quantization_config, which claimed"),
    ],
)
def test_what_the_library_wrote_is_read_as_the_weights_that_it_was_given(
    tmp_path: Path, checkpoints: Any, folder: str, dense: str, note: str
) -> None:
    checkpoint = Checkpoint.open(DATA / folder)
    assert checkpoint.imported.startswith(note)
    assert checkpoint.metadata[IMPORT_NOTE] == checkpoint.imported
    given = checkpoints.read(DATA / dense)
    expected = {
        name: (dtype, shape, without_negative_zeros(data))
        for name, (dtype, shape, data) in given.items()
    }
    found = {
        name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
        for name, tensor in checkpoint.tensors.items()
    }
    assert found == expected
    assert checkpoint.nbytes == sum(len(data) for _, _, data in expected.values())

    pack(DATA / folder, tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == expected
    config = json.loads((DATA / folder / "config.json").read_text())
    del config["quantization_config"]
    assert json.loads((tmp_path / "p" / "config.json").read_text()) == config
    assert list(json.loads((tmp_path / "out" / "config.json").read_text())) == list(config)


def test_the_fixtures_hold_what_is_hard_about_them(checkpoints: Any) -> None:
    given = checkpoints.read(DATA / "dense")
    value = np.frombuffer(given["model.layers.0.self_attn.v_proj.weight"][2], "<u2")
    assert (value & 0x7FFF > 0x7F80).sum() == 1  # NaN
    assert (value == 0x8000).sum() == 1  # -0.0, which the format loses
    assert not any(given["model.layers.0.self_attn.k_proj.weight"][2])
    assert given["model.layers.0.mlp.down_proj.weight"][1] == (16, 27)


@pytest.mark.filterwarnings("default")
def test_transformers_builds_the_model_from_the_unpacked_pack(
    tmp_path: Path, checkpoints: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    pack(DATA / "bitmask-b", tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = model.state_dict()["model.layers.0.mlp.down_proj.weight"]
    dtype, shape, data = checkpoints.read(DATA / "dense")["model.layers.0.mlp.down_proj.weight"]
    assert (dtype, shape) == ("BF16", tuple(weight.shape))
    assert weight.view(torch.uint8).numpy().tobytes() == data


def test_the_digest_of_a_pack_is_that_of_the_same_weights_stored_dense(
    tmp_path: Path, checkpoints: Any
) -> None:
    from tierd_layouts.container import open_pack

    dense = checkpoints.write(tmp_path / "m", checkpoints.read(DATA / "dense-24"))
    pack(dense, tmp_path / "dense.pack")
    pack(DATA / "bitmask-24", tmp_path / "24.pack")
    digests = {open_pack(tmp_path / p).source_digest for p in ("dense.pack", "24.pack")}
    assert len(digests) == 1
