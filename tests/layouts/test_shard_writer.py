from __future__ import annotations

import os
import resource
import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xxhash
from safetensors import safe_open

from tierd_layouts.container import LayerBuilder, open_pack, write_index, write_shard
from tierd_layouts.errors import DuplicateName, NameRefused
from tierd_layouts.safetensors_file import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_layouts.container import EncodedLayer


def layer(name: str, nbytes: int) -> EncodedLayer:
    builder = LayerBuilder(name)
    builder.add_dense(f"{name}.weight", "U8", (nbytes,), os.urandom(nbytes))
    return builder.finish()


def test_a_shard_opens_with_the_safetensors_package(
    pack: Path, weights: dict[str, tuple[str, Any]]
) -> None:
    index = open_pack(pack)
    seen = set()
    for shard in index.shards:
        with safe_open(pack / shard.file, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                seen.add(name)
                array = file.get_slice(name)
                if name.startswith("__pad__."):
                    assert array.get_dtype() == "U8"
                    assert not file.get_tensor(name).any()
    expected = {
        stored
        for layer_ in index.layers
        for tensor in layer_.tensors
        for stored in (
            [tensor.name]
            if tensor.codec == "dense"
            else [f"{tensor.name}.{a}" for a in tensor.arrays]
        )
    }
    assert {name for name in seen if not name.startswith("__pad__.")} == expected
    with safe_open(pack / index.shards[0].file, "numpy") as file:
        full = weights["layers.0.full.weight"][1]
        np.testing.assert_array_equal(
            file.get_tensor("layers.0.full.weight.values"), full.reshape(-1)
        )
        assert file.get_tensor("layers.0.full.weight.bitmap").tolist() == [2**64 - 1] * 64
        assert file.get_tensor("layers.0.full.weight.offsets").tolist() == [0, 512]


def test_extents_are_whole_pages_of_the_file_and_their_blocks_are_hashed(pack: Path) -> None:
    index = open_pack(pack)
    for entry in index.layers:
        (extent,) = entry.extents
        content = (pack / index.shards[extent.shard].file).read_bytes()
        assert extent.offset % 4096 == 0
        assert extent.nbytes % 4096 == 0
        data = content[extent.offset : extent.offset + extent.nbytes]
        blocks = [data[i : i + (4 << 20)] for i in range(0, len(data), 4 << 20)]
        assert extent.xxh3 == tuple(xxhash.xxh3_64_intdigest(block) for block in blocks)
    assert len(index.layer("layers.0").extents[0].xxh3) == 2


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, (4 << 20) - 4096, 4 << 20, (4 << 20) + 1])
def test_layers_of_any_length_have_their_hashes(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "tierd-00001.safetensors"
    shard, (record,) = write_shard(path, 0, [layer("a", nbytes)])
    pages = -(-nbytes // 4096)
    assert record.nbytes == pages * 4096
    assert shard.nbytes == path.stat().st_size == 4096 + record.nbytes
    assert len(record.extents[0].xxh3) == -(-record.nbytes // (4 << 20))
    read_header(path)


def test_a_failed_write_leaves_the_old_shard_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tierd-00001.safetensors"
    write_shard(path, 0, [layer("a", 10)])
    before = path.read_bytes()

    def disk_full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, 0, [layer("b", 10)])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_in_the_middle_of_a_layer_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tierd-00001.safetensors"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_shard(path, 0, [layer("a", 3 << 20)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_the_file_is_on_the_device_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    rename, fsync = os.rename, os.fsync

    def note_rename(old: Any, new: Any) -> None:
        steps.append(f"rename {os.path.basename(old)}")
        rename(old, new)

    def note_fsync(fd: int) -> None:
        steps.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "fsync", note_fsync)
    write_shard(tmp_path / "s.safetensors", 0, [layer("a", 10)])
    assert steps == [
        "fsync s.safetensors.tmp",
        "rename s.safetensors.tmp",
        f"fsync {tmp_path.name}",
    ]


def test_a_leftover_temporary_file_is_overwritten_but_a_link_is_not_followed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s.safetensors"
    temporary = tmp_path / "s.safetensors.tmp"
    temporary.write_bytes(b"x" * 100_000)
    write_shard(path, 0, [layer("a", 10)])
    assert path.stat().st_size == 8192
    victim = tmp_path / "victim"
    victim.write_text("precious")
    temporary.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        write_shard(path, 0, [layer("a", 10)])
    assert victim.read_text() == "precious"


def test_two_layers_with_one_stored_name_do_not_become_a_shard(tmp_path: Path) -> None:
    with pytest.raises(DuplicateName, match=r"'a\.weight' appears twice in one shard"):
        write_shard(tmp_path / "s.safetensors", 0, [layer("a", 10), layer("a", 10)])
    assert os.listdir(tmp_path) == []


def test_a_shard_name_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(NameRefused):
        write_shard(tmp_path / ".hidden", 0, [layer("a", 10)])


def test_the_index_is_replaced_whole(pack: Path) -> None:
    index = open_pack(pack)
    write_index(pack, index)
    assert open_pack(pack) == index
    assert not list(pack.glob("*.tmp"))
