from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash

from tierd_layouts import errors
from tierd_layouts.container import open_pack, write_index
from tierd_tools.errors import VerifyError
from tierd_tools.pack import pack
from tierd_tools.verify import verify

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def packed(tmp_path: Path, checkpoints: Any) -> Path:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)
    return tmp_path / "p"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def test_a_pack_that_is_right_is_counted(packed: Path) -> None:
    report = verify(packed)
    assert (report.layers, report.tensors, report.shards) == (5, 20, 1)
    assert report.codecs == {"dense": 5, "exponent-packed": 15}
    assert "--sparsity 0.5" in report.tool
    assert str(packed) in report.summary()
    assert json.loads(json.dumps(dataclasses.asdict(report)))["pack_dir"] == str(packed)


def test_a_flipped_bit_in_any_layer_is_found_and_named(packed: Path) -> None:
    index = open_pack(packed)
    for layer in index.layers:
        extent = layer.extents[0]
        place = extent.offset + extent.nbytes - 1
        flip(packed / index.shards[0].file, place)
        with pytest.raises(errors.ChecksumMismatch) as caught:
            verify(packed)
        text = str(caught.value)
        assert f"layer {layer.name!r}" in text
        assert f"{extent.xxh3[-1]:016x}" in text
        assert str(packed) in text
        flip(packed / index.shards[0].file, place)
    verify(packed)


@pytest.mark.parametrize(
    ("codec", "stored", "array", "error"),
    [
        ("raw", "raw", "bitmap", errors.TileError),
        ("lossless", "exponent-packed", "bitmap", errors.TileError),
        ("lossless", "exponent-packed", "heads", errors.TileError),
        ("int8", "int8", "offsets", errors.OffsetsWrong),
        ("int4", "int4", "bitmap", errors.TileError),
    ],
)
def test_tiles_that_break_the_rules_are_found_behind_a_right_checksum(
    tmp_path: Path, checkpoints: Any, codec: str, stored: str, array: str, error: type[Exception]
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    packed = tmp_path / "p"
    pack(source, packed, codec=codec, prune="magnitude", sparsity=0.5)
    verify(packed)
    index = open_pack(packed)
    layer = index.layer("model.layers.1")
    extent = layer.extents[0]
    tensor = next(tensor for tensor in layer.tensors if tensor.codec == stored)
    shard = packed / index.shards[0].file
    flip(shard, extent.offset + tensor.arrays[array].offset + 2)
    data = np.fromfile(shard, np.uint8, extent.nbytes, offset=extent.offset)
    hashes = (xxhash.xxh3_64_intdigest(data.data),)
    lying = dataclasses.replace(layer, extents=(dataclasses.replace(extent, xxh3=hashes),))
    layers = tuple(lying if item is layer else item for item in index.layers)
    write_index(packed, dataclasses.replace(index, layers=layers))
    with pytest.raises(error, match=rf"{layer.name}.*{tensor.name}"):
        verify(packed)


def test_a_truncated_shard_is_found(packed: Path) -> None:
    shard = packed / "tierd-00001.safetensors"
    os.truncate(shard, shard.stat().st_size - 4096)
    with pytest.raises(errors.ShardSizeWrong, match=r"tierd-00001\.safetensors"):
        verify(packed)


def test_a_missing_shard_is_found(packed: Path) -> None:
    (packed / "tierd-00001.safetensors").unlink()
    with pytest.raises(errors.ShardMissing, match=r"tierd-00001\.safetensors"):
        verify(packed)


def test_a_flipped_bit_in_the_header_is_found(packed: Path) -> None:
    flip(packed / "tierd-00001.safetensors", 60)
    with pytest.raises(errors.ShardError, match=r"tierd-00001\.safetensors"):
        verify(packed)


def test_a_flipped_bit_in_the_index_is_found(packed: Path) -> None:
    text = (packed / "tierd.json").read_text()
    (packed / "tierd.json").write_text(text.replace('"nnz": 8192', '"nnz": 8193', 1))
    with pytest.raises(errors.IndexChecksumWrong):
        verify(packed)


def test_a_pack_without_configuration_is_no_model(packed: Path) -> None:
    (packed / "config.json").unlink()
    with pytest.raises(VerifyError, match=r"no config\.json"):
        verify(packed)
    (packed / "config.json").mkdir()
    with pytest.raises(VerifyError, match=r"no config\.json"):
        verify(packed)


def test_what_is_no_file_is_no_control_file(packed: Path) -> None:
    before = verify(packed).control_files
    (packed / "folder.json").mkdir()
    (packed / "link.json").symlink_to("nowhere")
    assert verify(packed).control_files == before


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("config.json", "[]", "holds a list, not a JSON object"),
        ("config.json", "{", "is not JSON: "),
        ("tokenizer.json", '{"a": ', "is not JSON: "),
        ("tokenizer.json", "[" * 100_000, "is not JSON: "),
    ],
)
def test_a_control_file_that_nobody_can_read_is_named(
    packed: Path, name: str, text: str, problem: str
) -> None:
    """Their content has no hash in the index: that they are JSON is what can be said."""
    assert verify(packed).control_files == len(list(packed.glob("*.json"))) - 1
    (packed / name).write_text(text)
    with pytest.raises(VerifyError, match=f"{packed / name} {problem}"):
        verify(packed)


def test_a_folder_that_is_no_pack_is_named(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(errors.IndexMissing, match="nowhere"):
        verify(tmp_path / "nowhere")
    with pytest.raises(errors.IndexMissing, match=r"tierd\.json"):
        verify(tmp_path / "m")
    copied = shutil.copytree(packed, tmp_path / "copy")
    verify(copied)
