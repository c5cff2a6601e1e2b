"""Opening a pack: a named error for each way in which folder, index and shards disagree."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tierd_layouts.container import open_pack, open_shard
from tierd_layouts.errors import (
    DataHoles,
    FormatError,
    HeaderNotJson,
    IndexMissing,
    IndexTooLarge,
    ShardDisagrees,
    ShardMissing,
    ShardSizeWrong,
)
from tierd_layouts.index import Array
from tierd_layouts.records import Shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST = "tierd-00001.safetensors"
SECOND = "tierd-00002.safetensors"


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a shard's header in its place; the file keeps its size."""
    content = path.read_bytes()
    (nbytes,) = struct.unpack_from("<Q", content)
    members = json.loads(content[8 : 8 + nbytes])
    change(members)
    text = json.dumps(members, separators=(",", ":")).encode()
    assert len(text) <= nbytes
    path.write_bytes(content[:8] + text.ljust(nbytes) + content[8 + nbytes :])


def test_a_pack_opens_by_path_and_by_descriptor(pack: Path) -> None:
    index = open_pack(pack)
    assert [layer.name for layer in index.layers] == ["embed", "layers.0", "head", "coded"]
    assert open_pack(str(pack)) == index
    fd = os.open(pack, os.O_RDONLY)
    try:
        assert open_pack(fd) == index
        os.fstat(fd)
    finally:
        os.close(fd)


def test_opening_leaves_no_descriptor_open(pack: Path) -> None:
    before = os.listdir("/proc/self/fd")
    open_pack(pack)
    (pack / SECOND).unlink()
    with pytest.raises(ShardMissing):
        open_pack(pack)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_folder_without_an_index_is_no_pack(tmp_path: Path, pack: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", pack / "tierd.json"):
        with pytest.raises(IndexMissing, match=str(path)):
            open_pack(path)
    assert issubclass(IndexMissing, FileNotFoundError)


def test_an_index_that_is_no_plain_file_is_refused(pack: Path) -> None:
    index = pack / "tierd.json"
    index.rename(pack / "elsewhere")
    index.symlink_to(pack / "elsewhere")
    with pytest.raises(IndexMissing, match="a link is not followed"):
        open_pack(pack)
    index.unlink()
    index.mkdir()
    with pytest.raises(IndexMissing, match="not a plain file"):
        open_pack(pack)


def test_a_huge_index_is_refused_before_it_is_read(pack: Path) -> None:
    os.truncate(pack / "tierd.json", (256 << 20) + 1)
    with pytest.raises(IndexTooLarge, match="268435457 bytes, the limit is 268435456"):
        open_pack(pack)


def test_a_missing_shard_is_named(pack: Path) -> None:
    (pack / SECOND).unlink()
    with pytest.raises(ShardMissing, match=f"{SECOND}: there is no such file"):
        open_pack(pack)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_shard_that_is_no_plain_file_is_refused(pack: Path, kind: str) -> None:
    shard = pack / FIRST
    shard.rename(pack / "elsewhere")
    match kind:
        case "link":
            shard.symlink_to("elsewhere")
        case "folder":
            shard.mkdir()
        case _:
            os.mkfifo(shard)
    with pytest.raises(ShardMissing, match=f"{FIRST}: (a link|not a plain file)"):
        open_pack(pack)


@pytest.mark.parametrize("change", [-4096, -1, 1])
def test_a_shard_of_another_size_is_refused(pack: Path, change: int) -> None:
    shard = pack / FIRST
    nbytes = shard.stat().st_size
    os.truncate(shard, nbytes + change)
    with pytest.raises(ShardSizeWrong, match=f"{nbytes + change} bytes, the index says {nbytes}"):
        open_pack(pack)


def test_a_shard_name_cannot_leave_the_folder(pack: Path) -> None:
    fd = os.open(pack, os.O_RDONLY)
    try:
        with pytest.raises(FormatError, match="file name"):
            open_shard(fd, Shard("../pack/" + FIRST, 1), where="p")
    finally:
        os.close(fd)


def test_a_shard_opens_for_direct_reads(pack: Path) -> None:
    index = open_pack(pack)
    folder = os.open(pack, os.O_RDONLY)
    try:
        try:
            fd = open_shard(folder, index.shards[0], where="p", flags=os.O_DIRECT)
        except OSError as error:
            pytest.skip(f"no O_DIRECT here: {error}")
        os.close(fd)
    finally:
        os.close(folder)


# --------------------------------------------------------------------------------------------------
# The shard's header against the index


def rename_tensor(members: dict[str, Any]) -> None:
    members["layers.0.flagz"] = members.pop("layers.0.flags")


def change_dtype(members: dict[str, Any]) -> None:
    members["layers.0.norm.weight"]["dtype"] = "F16"


def change_shape(members: dict[str, Any]) -> None:
    members["layers.0.norm.weight"]["shape"] = [10, 10]


def swap_places(members: dict[str, Any]) -> None:
    one, two = members["layers.0.zero.weight.bitmap"], members["embed.weight.bitmap"]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
    one["shape"], two["shape"] = two["shape"], one["shape"]


def pad_with_text(members: dict[str, Any]) -> None:
    members["more"] = members.pop("__pad__.0")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (rename_tensor, "'layers.0.flagz' is not in the index, and not padding"),
        (change_dtype, r"is F16\[100\] at \d+, the index says BF16\[100\] at"),
        (change_shape, r"BF16\[10, 10\]"),
        (swap_places, r"weight.bitmap' is U64"),
        (pad_with_text, "'more' is not in the index"),
    ],
)
def test_a_header_that_says_something_else_is_refused(
    pack: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    change_header(pack / FIRST, change)
    with pytest.raises(ShardDisagrees, match=text):
        open_pack(pack)


def test_a_header_without_an_array_of_the_index_is_refused(pack: Path) -> None:
    def drop(members: dict[str, Any]) -> None:
        entry = members.pop("layers.0.empty.weight.values")
        assert entry["data_offsets"][0] == entry["data_offsets"][1]

    change_header(pack / FIRST, drop)
    with pytest.raises(
        ShardDisagrees, match=r"'layers.0.empty.weight.values' is in the index, but"
    ):
        open_pack(pack)


def test_a_broken_header_is_named_with_its_pack(pack: Path) -> None:
    change_header(pack / SECOND, lambda members: members.pop("head.weight.bitmap"))
    with pytest.raises(DataHoles, match=f"{pack}/{SECOND}: "):
        open_pack(pack)
    with (pack / SECOND).open("r+b") as file:
        file.seek(8)
        file.write(b"[")
    with pytest.raises(HeaderNotJson, match=f"{pack}/{SECOND}: "):
        open_pack(pack)


def test_arrays_of_a_layer_with_two_extents_are_looked_for_in_the_right_shard(pack: Path) -> None:
    """Version 1 writes one extent a layer, but its readers take more: join two layers into one."""
    index = open_pack(pack)
    embed, block, head, coded = index.layers
    moved = [
        replace(
            tensor,
            arrays={
                name: Array(array.offset + embed.nbytes, array.nbytes)
                for name, array in tensor.arrays.items()
            },
        )
        for tensor in head.tensors
    ]
    joined = replace(
        embed,
        nbytes=embed.nbytes + head.nbytes,
        extents=embed.extents + head.extents,
        tensors=(*embed.tensors, *moved),
    )
    text = replace(index, layers=(joined, block, coded)).to_json()
    (pack / "tierd.json").write_bytes(text)
    assert open_pack(pack).layers == (joined, block, coded)
