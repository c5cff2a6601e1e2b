from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts.container import open_pack, read_layer, tensor_bits
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack
from tierd_tools.verify import verify

if TYPE_CHECKING:
    from pathlib import Path


def test_a_tied_weight_is_stored_once_and_found_under_both_names(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama()
    report = pack(checkpoints.write(tmp_path / "m", tensors), tmp_path / "p")
    assert report.aliases == 1
    index = open_pack(tmp_path / "p")
    layer, tensor = index.tensor("lm_head.weight")
    assert tensor.name == "model.embed_tokens.weight"
    bits = tensor_bits(read_layer(tmp_path / "p", index, layer), tensor)
    assert bits.tobytes() == tensors["lm_head.weight"][2]


def test_a_matrix_is_stored_sparse_exactly_when_that_is_smaller(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = {}
    for percent in (0, 3, 10, 50, 100):
        bits = np.ones(128 * 128, "<u2")
        bits[: bits.size * percent // 100] = 0
        tensors[f"l.{percent}.w"] = ("BF16", (128, 128), bits.tobytes())
    pack(checkpoints.write(tmp_path / "m", tensors), tmp_path / "p", codec="raw")
    index = open_pack(tmp_path / "p")
    codecs = {tensor.name: tensor.codec for layer in index.layers for tensor in layer.tensors}
    assert codecs == {
        **{"l.0.w": "dense", "l.3.w": "dense"},  # the bitmap takes 6.25 %
        **{"l.10.w": "raw", "l.50.w": "raw", "l.100.w": "raw"},
    }
    for layer in index.layers:
        for tensor in layer.tensors:
            assert sum(a.nbytes for a in tensor.arrays.values()) <= tensor.dense_bytes


def test_the_index_names_tool_settings_and_content(tmp_path: Path, checkpoints: Any) -> None:
    tensors = checkpoints.llama()
    one = checkpoints.write(tmp_path / "one", tensors, metadata={"format": "pt", "by": "me"})
    three = checkpoints.write(tmp_path / "three", tensors, shards=3)
    pack(one, tmp_path / "p1", prune="magnitude", sparsity=0.25)
    pack(three, tmp_path / "p3")
    first, third = open_pack(tmp_path / "p1"), open_pack(tmp_path / "p3")
    assert "--prune magnitude --sparsity 0.25" in first.tool
    assert first.metadata == {"format": "pt", "by": "me"}
    assert first.source_digest == third.source_digest  # of the content, not of the files
    tensors["model.norm.weight"] = ("BF16", (128,), bytes(256))
    pack(checkpoints.write(tmp_path / "other", tensors), tmp_path / "p4")
    assert open_pack(tmp_path / "p4").source_digest != first.source_digest


def test_a_pack_holds_control_files_shards_and_index_and_leaves_nothing_beside(
    tmp_path: Path, checkpoints: Any
) -> None:
    report = pack(checkpoints.write(tmp_path / "m", checkpoints.llama()), tmp_path / "packs" / "p")
    assert sorted(file.name for file in (tmp_path / "packs" / "p").iterdir()) == [
        *("config.json", "tierd-00001.safetensors", "tierd.json", "tokenizer.json"),
    ]
    assert [file.name for file in (tmp_path / "packs").iterdir()] == ["p"]
    assert report.pack_dir in report.summary()


def test_shards_open_with_the_safetensors_library(tmp_path: Path, checkpoints: Any) -> None:
    from safetensors import safe_open

    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)
    with safe_open(tmp_path / "p" / "tierd-00001.safetensors", "np") as file:
        bitmap = file.get_tensor("model.layers.0.mlp.up_proj.weight.bitmap")
        offsets = file.get_tensor("model.layers.0.mlp.up_proj.weight.offsets")
    assert int(np.bitwise_count(bitmap).sum()) == 384 * 128 // 2
    assert offsets.size == 6 * 2 + 1


def weights_of(pack_dir: Path) -> dict[str, Any]:
    """{tensor: (index's record, bits)}."""
    index = open_pack(pack_dir)
    found: dict[str, Any] = {}
    for layer in index.layers:
        data = read_layer(pack_dir, index, layer)
        found |= {tensor.name: (tensor, tensor_bits(data, tensor)) for tensor in layer.tensors}
    return found


def test_each_matrix_gets_the_sparsity_that_its_name_says(tmp_path: Path, checkpoints: Any) -> None:
    tensors = checkpoints.llama()
    gate = "model.layers.1.mlp.gate.weight"
    tensors[gate] = tensors["model.layers.1.self_attn.q_proj.weight"]
    report = pack(
        checkpoints.write(tmp_path / "m", tensors),
        tmp_path / "p",
        prune="magnitude",
        sparsity=0.5,
        sparsity_of=["model.layers.0=0.25", "*.down_proj=0.75"],
        keep=["*.k_proj", "model.layers.2.mlp"],
    )
    for name, (_, bits) in weights_of(tmp_path / "p").items():
        kept = name == gate or "k_proj" in name or "layers.2.mlp" in name
        if kept or "norm" in name or not name.startswith("model.layers"):
            expected = 0.0
        elif "down_proj" in name:
            expected = 0.75
        else:
            expected = 0.25 if "layers.0" in name else 0.5
        assert (bits == 0).mean() == pytest.approx(expected, abs=0.001), name
    assert report.pruned_tensors == 15 - 5
    assert "--sparsity-of '*.down_proj=0.75'" in open_pack(tmp_path / "p").tool


def test_quantised_are_the_linear_weights_that_are_not_to_be_kept(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama()
    gate = "model.layers.1.mlp.gate.weight"
    tensors[gate] = tensors["model.layers.1.self_attn.q_proj.weight"]
    broken = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[broken]
    tensors[broken] = (dtype, shape, data[:-2] + b"\x80\x7f")  # infinity
    source = checkpoints.write(tmp_path / "m", tensors)
    report = pack(source, tmp_path / "p", codec="int8", group=64, keep=["*.o_proj"])
    assert report.codecs == {"dense": 5, "exponent-packed": 5, "int8": 11}
    assert report.not_finite_tensors == [broken]
    assert f"not finite, stored without loss instead: {broken}" in report.summary()
    for name, (tensor, bits) in weights_of(tmp_path / "p").items():
        lossless = "o_proj" in name or name in (gate, broken) or len(tensor.shape) == 1
        if lossless or not name.startswith("model.layers"):
            assert bits.tobytes() == tensors[name][2], name
            assert tensor.group is None
        else:
            assert tensor.codec == "int8"
            assert tensor.group == 64
    verify(tmp_path / "p")


def test_a_checkpoint_that_is_pruned_already_is_left_as_it_is_and_said_so(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pack(source, tmp_path / "half", prune="magnitude", sparsity=0.5)
    unpack(tmp_path / "half", tmp_path / "pruned")
    report = pack(tmp_path / "pruned", tmp_path / "p", prune="magnitude", sparsity=0.505)
    assert report.pruned_tensors == 0
    assert len(report.left_tensors) == 15
    assert "left as they are, pruned already: 15 tensors: " in report.summary()
    unpack(tmp_path / "p", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == checkpoints.read(tmp_path / "pruned")
    report = pack(tmp_path / "pruned", tmp_path / "p", prune="magnitude", sparsity=0.6)
    assert (report.pruned_tensors, report.left_tensors) == (15, [])


def test_the_report_is_plain_data(tmp_path: Path, checkpoints: Any) -> None:
    import dataclasses

    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    report = dataclasses.asdict(pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5))
    assert json.loads(json.dumps(report)) == report
    assert report["source_bytes"] > report["pack_bytes"] > 0
    assert (report["layers"], report["shards"], report["pruned_tensors"]) == (5, 1, 15)
