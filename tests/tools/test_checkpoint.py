from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import CheckpointError, CheckpointMissing
from tierd_tools.source_tensor import FileTensor

if TYPE_CHECKING:
    from pathlib import Path

TENSORS = {
    "a.weight": ("BF16", (3, 2), bytes(range(12))),
    "b.weight": ("F32", (), b"\x00\x00\x80\x3f"),
    "c.index": ("I64", (2,), bytes(16)),
    "d.empty": ("F16", (0, 5), b""),
    "e.flag": ("BOOL", (3,), b"\x01\x00\x01"),
}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_the_safetensors_library_wrote_it(
    tmp_path: Path, checkpoints: Any, shards: int
) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=shards)
    checkpoint = Checkpoint.open(folder)
    found = {
        name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
        for name, tensor in checkpoint.tensors.items()
    }
    assert found == TENSORS
    assert checkpoint.nbytes == 12 + 4 + 16 + 3
    assert len(checkpoint.shards) == shards
    assert checkpoint.metadata == {"format": "pt"}


def test_elements_and_samples_come_as_unsigned_bits(tmp_path: Path, checkpoints: Any) -> None:
    bits = np.arange(600, dtype="<u2").reshape(20, 30)
    tensors = {"a.weight": ("BF16", (20, 30), bits.tobytes())}
    tensor = Checkpoint.open(checkpoints.write(tmp_path / "m", tensors)).tensors["a.weight"]
    assert np.array_equal(tensor.read_bits(), bits)
    assert tensor.sample_bits(10).tolist() == [297, 298, 299, 300, 301]
    assert tensor.sample_bits(1 << 20).tolist() == list(range(600))


@pytest.mark.parametrize("text", ["", '{"a": ', "[1]", "\x00"])
def test_a_config_that_is_not_a_json_object_is_refused_before_anything_is_packed(
    tmp_path: Path, checkpoints: Any, text: str
) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_control_files_are_those_that_are_no_weights(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=2)
    for name in ("merges.txt", "spiece.model", "chat_template.jinja", "vocab.json", "README.md"):
        (folder / name).write_text("x")
    for name in ("pytorch_model.bin", "model.gguf", ".hidden", "pytorch_model.bin.index.json"):
        (folder / name).write_text("x")
    (folder / "tokenizer_folder").mkdir()
    assert [file.name for file in Checkpoint.open(folder).control_files] == [
        *("README.md", "chat_template.jinja", "config.json", "merges.txt", "spiece.model"),
        *("tokenizer.json", "vocab.json"),
    ]


def test_links_are_followed_as_in_the_hugging_face_cache(tmp_path: Path, checkpoints: Any) -> None:
    blobs = checkpoints.write(tmp_path / "blobs", TENSORS)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert Checkpoint.open(snapshot).tensors["a.weight"].read().tobytes() == bytes(range(12))


# --------------------------------------------------------------------------------------------------
# Refusals


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match=r"nowhere does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file is not a directory"):
        Checkpoint.open(tmp_path / "file")


def test_a_folder_without_config_is_refused(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointMissing, match=r"no config\.json"):
        Checkpoint.open(folder)


def test_a_checkpoint_with_only_bin_files_is_refused_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointMissing, match=r"only pytorch_model\.bin; convert"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointMissing, match=r"no weights at all"):
        Checkpoint.open(tmp_path)


def test_a_pack_is_refused(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS)
    (folder / "tierd.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is a tierd pack already"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_shard_is_refused_by_name(tmp_path: Path, checkpoints: Any, kept: int) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS)
    shard = folder / "model.safetensors"
    os.truncate(shard, kept if kept >= 0 else shard.stat().st_size + kept)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(folder)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(
    tmp_path: Path, checkpoints: Any
) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS)
    tensor = Checkpoint.open(folder).tensors["c.index"]
    assert isinstance(tensor, FileTensor)
    os.truncate(folder / "model.safetensors", tensor.begin + 8)
    with pytest.raises(CheckpointError, match=rf"ends at byte {tensor.begin + 8}, .*'c\.index'"):
        tensor.read()


def edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"] |= changes
    path.write_text(json.dumps(content))


def test_a_missing_shard_is_refused_by_name(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointMissing, match=r"1 of 3 shards .*model-00002-of-00003"):
        Checkpoint.open(folder)


def test_an_index_that_names_a_tensor_that_is_not_there_is_refused(
    tmp_path: Path, checkpoints: Any
) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=2)
    edit_index(folder, ghost="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'ghost' is in model-00001"):
        Checkpoint.open(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=2)
    edit_index(folder, **{"a.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"'a\.weight' is in model-00002"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("place", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 3])
def test_an_index_that_leads_out_of_the_folder_is_refused(
    tmp_path: Path, checkpoints: Any, place: object
) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=2)
    edit_index(folder, ghost=place)
    with pytest.raises(CheckpointError, match=r"'ghost' is in .*not the name of a safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, checkpoints: Any, text: str) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS, shards=2)
    other = checkpoints.write(tmp_path / "other", {"a.weight": TENSORS["a.weight"]})
    (other / "model.safetensors").rename(folder / "extra.safetensors")
    edit_index(folder, ghost="extra.safetensors")
    with pytest.raises(CheckpointError, match=r"'a\.weight' is in two shards"):
        Checkpoint.open(folder)


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", {})
    with pytest.raises(CheckpointError, match=r"has no tensors"):
        Checkpoint.open(folder)


# --------------------------------------------------------------------------------------------------
# Fingerprint


def test_the_fingerprint_changes_when_a_weight_or_a_control_file_is_rewritten(
    tmp_path: Path, checkpoints: Any
) -> None:
    folder = checkpoints.write(tmp_path / "m", TENSORS)
    checkpoint = Checkpoint.open(folder)
    first = checkpoint.fingerprint()
    assert checkpoint.fingerprint() == first
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content)
    second = checkpoint.fingerprint()
    assert second != first
    (folder / "config.json").write_text("{}")
    assert checkpoint.fingerprint() != second
