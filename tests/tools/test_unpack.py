from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tierd_layouts.errors import ChecksumMismatch
from tierd_tools import unpack_plan
from tierd_tools.errors import DiskFull, TargetBusy, TargetRefused
from tierd_tools.pack import pack
from tierd_tools.pack_staging import Staging
from tierd_tools.unpack import unpack

REPOSITORY = Path(__file__).parents[2]
MODELS = REPOSITORY.parent / "shared" / "models"


@pytest.fixture
def packed(tmp_path: Path, checkpoints: Any) -> Path:
    pack(checkpoints.write(tmp_path / "m", checkpoints.llama()), tmp_path / "p")
    return tmp_path / "p"


def test_a_large_checkpoint_is_cut_into_shards_with_an_index(
    tmp_path: Path, packed: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_plan, "SHARD_BYTES", 300_000)
    report = unpack(packed, tmp_path / "out")
    assert report.shards == 4
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    expected = checkpoints.read(tmp_path / "m")
    assert checkpoints.read(tmp_path / "out") == expected
    assert sorted(index["weight_map"]) == sorted(expected)
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in expected.values())
    pack(tmp_path / "out", tmp_path / "again")  # so index and shards agree
    unpack(tmp_path / "again", tmp_path / "out2")
    assert checkpoints.read(tmp_path / "out2") == expected


def test_metadata_and_control_files_come_back(tmp_path: Path, checkpoints: Any) -> None:
    from safetensors import safe_open

    for name, metadata in (("a", {"format": "pt", "x": "y"}), ("b", {})):
        source = checkpoints.write(tmp_path / name, checkpoints.llama(), metadata=metadata)
        (source / "generation_config.json").write_text('{"do_sample": true}')
        pack(source, tmp_path / f"{name}.pack")
        unpack(tmp_path / f"{name}.pack", tmp_path / f"{name}.out")
        with safe_open(tmp_path / f"{name}.out" / "model.safetensors", "np") as file:
            assert (file.metadata() or {}) == metadata
        for control in ("config.json", "tokenizer.json", "generation_config.json"):
            found = (tmp_path / f"{name}.out" / control).read_bytes()
            assert found == (source / control).read_bytes()
        assert sorted(file.name for file in (tmp_path / f"{name}.out").iterdir()) == sorted(
            file.name for file in source.iterdir()
        )


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("precious")
    with pytest.raises(TargetRefused, match="not an empty directory"):
        unpack(packed, tmp_path / "out")
    with pytest.raises(TargetRefused, match="not an empty directory"):
        unpack(packed, packed)
    with pytest.raises(TargetRefused, match="not an empty directory"):
        unpack(packed, tmp_path / "out" / "x")
    assert (tmp_path / "out" / "x").read_text() == "precious"


def test_an_empty_directory_may_be_the_target(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "out").mkdir()
    unpack(packed, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_a_killed_run_left_is_removed(tmp_path: Path, packed: Path, checkpoints: Any) -> None:
    (tmp_path / ".out.tierd-unpacking").mkdir()
    (tmp_path / ".out.tierd-unpacking" / "stray.safetensors").write_bytes(b"half")
    unpack(packed, tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == checkpoints.read(tmp_path / "m")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "out", "p"]


def test_a_damaged_pack_is_not_unpacked(tmp_path: Path, packed: Path) -> None:
    shard = packed / "tierd-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ChecksumMismatch, match=r"model\.layers"):
        unpack(packed, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "p"]


def test_two_runs_on_one_target_are_refused(tmp_path: Path, packed: Path) -> None:
    with (
        Staging.locked(tmp_path / "out", "tierd-unpacking"),
        pytest.raises(TargetBusy, match=f"pid {os.getpid()}"),
    ):
        unpack(packed, tmp_path / "out")


def test_a_disk_without_room_is_refused_with_both_numbers(
    tmp_path: Path, packed: Path, mounted_tmpfs: Any
) -> None:
    with mounted_tmpfs(tmp_path / "disk", "size=512k") as disk:
        with pytest.raises(DiskFull, match=r"needs 9\d\d\d\d\d bytes, 5\d\d\d\d\d bytes free"):
            unpack(packed, disk / "out")
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_is_left_as_it_was(
    tmp_path: Path, packed: Path, mounted_tmpfs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Staging, "free_bytes", lambda self: 1 << 40)
    with mounted_tmpfs(tmp_path / "disk", "size=512k") as disk:
        with pytest.raises(DiskFull, match="file system full: needs about"):
            unpack(packed, disk / "out")
        assert list(disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stdlib-llama-12m", "stdlib-opt-12m"])
@pytest.mark.filterwarnings("default")
def test_a_trained_model_comes_back_pruned_and_loads_with_transformers(
    tmp_path: Path, checkpoints: Any, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    from tierd_tools.checkpoint import Checkpoint
    from tierd_tools.pack_plan import is_prunable
    from tierd_tools.prune import magnitude
    from tierd_tools.verify import verify

    source = MODELS / name
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)
    verify(tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "out")
    expected = checkpoints.read(source)
    prunable = 0
    for tensor in Checkpoint.open(source).tensors.values():
        if is_prunable(tensor):
            bits = magnitude(tensor.read_bits(), tensor.dtype, 0.5)
            expected[tensor.name] = (tensor.dtype, tensor.shape, bits.tobytes())
            prunable += 1
    assert prunable >= 36
    assert checkpoints.read(tmp_path / "out") == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert set(expected) <= set(state)
    for tensor_name, (_, shape, _) in expected.items():
        assert tuple(state[tensor_name].shape) == shape

    pack(source, tmp_path / "p")  # as it was: byte for byte, the file too
    unpack(tmp_path / "p", tmp_path / "whole")
    for file in source.iterdir():
        assert (tmp_path / "whole" / file.name).read_bytes() == file.read_bytes()
