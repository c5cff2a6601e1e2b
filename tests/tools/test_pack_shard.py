from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts import packed_matrix, quantised
from tierd_layouts.container import LayerBuilder, write_shard
from tierd_layouts.safetensors_file import read_header
from tierd_layouts.shard_writer import shard_header
from tierd_tools import pack_shard
from tierd_tools.pack_plan import PlannedLayer, PlannedTensor
from tierd_tools.pack_shard import ShardWriter, reserved_header_bytes, temporary_path
from tierd_tools.pack_tensor import EncodedTensor
from tierd_tools.source_tensor import FileTensor

if TYPE_CHECKING:
    from tierd_layouts.records import Layer

BITS = np.arange(130 * 70, dtype=np.uint16).reshape(130, 70) % 5
MATRIX = packed_matrix.encode_raw(BITS, "BF16")


def dense(name: str, nbytes: int) -> EncodedTensor:
    data = np.resize(np.arange(1, 252, dtype=np.uint8), nbytes).tobytes()
    arrays = {"data": [memoryview(data[: nbytes // 3]), memoryview(data[nbytes // 3 :])]}
    return EncodedTensor(name, "U8", (nbytes,), "dense", nbytes, None, nbytes, "", arrays)


def matrix(name: str) -> EncodedTensor:
    arrays = {key: [array.data.cast("B")] for key, array in MATRIX.arrays().items()}
    nnz = MATRIX.nnz
    return EncodedTensor(name, "BF16", (130, 70), "raw", nnz, None, BITS.nbytes, "", arrays)


LAYERS = {
    "a": ["matrix:a.w", "dense:a.b:1000", "dense:a.c:0"],
    "b": ["dense:b.big:9500000", "matrix:b.w"],
    "c": ["dense:c.none:0"],
}


def make(text: str) -> EncodedTensor:
    kind, name, *size = text.split(":")
    return matrix(name) if kind == "matrix" else dense(name, int(size[0]))


def write(folder: Path, header_bytes: int, names: str, layers: list[Layer]) -> list[Layer]:
    """Writes the layers `names` after those that are there, and finishes when `c` is one."""
    written = list(layers)
    with ShardWriter(folder, 0, header_bytes, layers) as writer:
        for name in names:
            writer.begin_layer(name)
            for text in LAYERS[name]:
                writer.add(make(text))
            written.append(writer.end_layer())
            writer.sync()
        if "c" in names:
            shard = writer.finish()
            path = folder / shard.file
            assert path.stat().st_size == shard.nbytes
    return written


def planned() -> list[PlannedLayer]:
    layers = []
    for name, texts in LAYERS.items():
        tensors = []
        for encoded in map(make, texts):
            codec = "dense" if encoded.codec == "dense" else "lossless"
            source = FileTensor(encoded.name, encoded.dtype, encoded.shape, Path("x"), 0, 0)
            tensors.append(PlannedTensor(source, codec, 0.0))
        layers.append(PlannedLayer(name, tuple(tensors)))
    return layers


@pytest.fixture
def expected(tmp_path: Path) -> tuple[bytes, list[Layer]]:
    """The data of the shard that the writer of whole layers writes, and its layers."""
    builders = []
    for name, texts in LAYERS.items():
        builder = LayerBuilder(name)
        for encoded in map(make, texts):
            if encoded.codec == "dense":
                data = b"".join(encoded.arrays["data"])
                builder.add_dense(encoded.name, "U8", encoded.shape, data)
            else:
                builder.add_matrix(encoded.name, MATRIX)
        builders.append(builder.finish())
    path = tmp_path / "whole.safetensors"
    _, layers = write_shard(path, 0, builders)
    return path.read_bytes()[layers[0].extents[0].offset :], layers


def moved(layers: list[Layer], by: int) -> list[Any]:
    return [
        (layer.name, layer.nbytes, layer.tensors, extent.offset + by, extent.xxh3)
        for layer in layers
        for extent in layer.extents
    ]


@pytest.mark.parametrize("parts", [["abc"], ["a", "bc"], ["ab", "c"], ["a", "b", "c"]])
def test_a_streamed_shard_holds_what_one_written_whole_holds(
    tmp_path: Path, expected: tuple[bytes, list[Layer]], parts: list[str]
) -> None:
    data, layers = expected
    header_bytes = reserved_header_bytes(planned())
    written: list[Layer] = []
    for names in parts:
        written = write(tmp_path, header_bytes, names, written)
    content = (tmp_path / "tierd-00001.safetensors").read_bytes()
    assert content[header_bytes:] == data
    by = layers[0].extents[0].offset - header_bytes
    assert moved(written, by) == moved(layers, 0)
    header = read_header(tmp_path / "tierd-00001.safetensors")
    assert header.data_start == header_bytes
    assert header.entries == read_header(tmp_path / "whole.safetensors").entries
    assert not temporary_path(tmp_path, 0).exists()


def test_what_follows_the_last_finished_layer_is_cut_off(tmp_path: Path) -> None:
    header_bytes = reserved_header_bytes(planned())
    first = write(tmp_path, header_bytes, "a", [])
    with temporary_path(tmp_path, 0).open("ab") as file:
        file.write(b"half a layer")
    write(tmp_path, header_bytes, "bc", first)
    content = (tmp_path / "tierd-00001.safetensors").read_bytes()
    write(tmp_path, header_bytes, "abc", [])
    assert (tmp_path / "tierd-00001.safetensors").read_bytes() == content


def test_a_shard_has_no_name_before_it_is_finished(tmp_path: Path) -> None:
    write(tmp_path, 4096, "ab", [])
    assert sorted(os.listdir(tmp_path)) == ["tierd-00001.safetensors.tmp"]


def test_long_writes_are_sent_to_the_device_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_shard, "_WRITEBACK_BYTES", 1 << 20)
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, n, how: advised.append((at, n)))
    monkeypatch.setattr(pack_shard, "_WRITE_BYTES", 1 << 20)
    write(tmp_path, 4096, "b", [])
    assert (4096, 3166666) in advised  # the first piece of the tensor


def test_the_reserved_header_is_enough_for_any_codec() -> None:
    names = [f"model.layers.0.\N{GREEK SMALL LETTER ALPHA}{i}.weight" for i in range(50)]
    layer = PlannedLayer(
        "model.layers.0",
        tuple(
            PlannedTensor(FileTensor(name, "BF16", (64, 64), Path("x"), 0, 8192), "int4", 0.0)
            for name in names
        ),
    )
    builder = LayerBuilder("model.layers.0")
    bits = np.zeros((64, 64), np.uint16)
    for name in names:
        builder.add_matrix(
            name, quantised.encode(bits, "BF16", codec="int4", group=64, masked=True)
        )
    assert len(shard_header([builder.finish()])) <= reserved_header_bytes([layer])
