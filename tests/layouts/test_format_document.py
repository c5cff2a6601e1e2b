"""FORMAT.md is enough: a reader written from it alone, and its worked example, byte for byte.

`read_pack` uses struct, json and xxhash, and nothing of tierd.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tierd_layouts.container import (
    LayerBuilder,
    open_pack,
    shard_file_name,
    write_index,
    write_shard,
)
from tierd_layouts.index import PackIndex
from tierd_layouts.slot_table import SlotState, SlotTable, slot_key, table_bytes
from tierd_layouts.wire import FrameDecoder, encode

DOCUMENT = Path(__file__).parents[2] / "layouts" / "FORMAT.md"
EXAMPLE = DOCUMENT.read_text().partition("## 7. A worked example")[2]

Weights = dict[str, tuple[str, Any]]


# --------------------------------------------------------------------------------------------------
# The second reader


def read_pack(folder: Path) -> dict[str, list[int]]:
    """Returns every weight's elements as integers, verified, in row-major order."""
    index = json.loads((folder / "tierd.json").read_text())
    assert (index["format"], index["version"]) == ("tierd-pack", 1)
    stated = index.pop("xxh3")
    canonical = json.dumps(index, sort_keys=True, separators=(",", ":")).encode()
    assert xxhash.xxh3_64_hexdigest(canonical) == stated
    weights = {}
    for layer in index["layers"]:
        content = b""
        for extent in layer["extents"]:
            shard = (folder / index["shards"][extent["shard"]]["file"]).read_bytes()
            assert len(shard) == index["shards"][extent["shard"]]["nbytes"]
            part = shard[extent["offset"] : extent["offset"] + extent["nbytes"]]
            blocks = [part[i : i + 4194304] for i in range(0, len(part), 4194304)]
            assert [xxhash.xxh3_64_hexdigest(block) for block in blocks] == extent["xxh3"]
            content += part
        for tensor in layer["tensors"]:
            arrays = {
                name: content[array["offset"] : array["offset"] + array["nbytes"]]
                for name, array in tensor["arrays"].items()
            }
            weights[tensor["name"]] = read_tensor(tensor, arrays)
    return weights | {alias: weights[name] for alias, name in index["aliases"].items()}


def read_tensor(tensor: dict[str, Any], arrays: dict[str, bytes]) -> list[int]:
    item = {"BOOL": 1, "BF16": 2, "F16": 2, "F32": 4, "I64": 8, "F64": 8}[tensor["dtype"]]
    code = {1: "B", 2: "H", 4: "I", 8: "Q"}[item]

    def unpack(code: str, data: bytes) -> tuple[int, ...]:
        return struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)

    if tensor["codec"] == "dense":
        return list(unpack(code, arrays["data"]))
    rows, cols = tensor["shape"]
    bitmap = unpack("Q", arrays["bitmap"])
    offsets = unpack("I", arrays["offsets"])
    values = unpack(code, arrays["values"])
    elements = [0] * (rows * cols)
    tile_cols = (cols + 63) // 64
    for tile in range(len(offsets) - 1):
        at = offsets[tile] * 16 // item
        for r in range(64):
            word = bitmap[tile * 64 + r]
            while word:
                c = (word & -word).bit_length() - 1
                word &= word - 1
                elements[(tile // tile_cols * 64 + r) * cols + tile % tile_cols * 64 + c] = values[
                    at
                ]
                at += 1
    return elements


def test_a_reader_written_from_the_document_reads_our_packs(pack: Path, weights: Weights) -> None:
    found = read_pack(pack)
    assert found.keys() == weights.keys()
    for name, (_, bits) in weights.items():
        assert found[name] == bits.reshape(-1).tolist(), name


# --------------------------------------------------------------------------------------------------
# The example


def hex_blocks() -> list[dict[int, bytes]]:
    """Returns the document's hex listings: offset -> bytes."""
    listings = []
    for text in re.findall(r"```hex\n(.*?)```", EXAMPLE, re.DOTALL):
        lines = re.findall(r"^ *(\d+)  ((?:[0-9a-f]{2} )*[0-9a-f]{2})\b", text, re.MULTILINE)
        assert len(lines) == text.count("\n")
        listings.append({int(offset): bytes.fromhex(data) for offset, data in lines})
    return listings


def image(nbytes: int, *listings: dict[int, bytes]) -> bytes:
    content = bytearray(nbytes)
    for listing in listings:
        for offset, data in listing.items():
            content[offset : offset + len(data)] = data
    return bytes(content)


@pytest.fixture
def document_pack(tmp_path: Path) -> Path:
    """The example as the document shows it."""
    length, data, _, _ = hex_blocks()
    header, index = re.findall(r"```json\n(.*?)\n```", EXAMPLE, re.DOTALL)
    text = image(8192, length, {8: header.encode().ljust(4088)}, data)
    (tmp_path / "tierd-00001.safetensors").write_bytes(text)
    (tmp_path / "tierd.json").write_text(index)
    return tmp_path


EXPECTED_WEIGHT = {0: 0x3F80, 2: 0x8000, 66 + 1: 0x4000, 66 + 65: 0x7FC1}


def test_the_example_is_a_pack_for_both_readers(document_pack: Path) -> None:
    index = open_pack(document_pack)
    assert index.digest == "2079c627965798b8"
    weights = read_pack(document_pack)
    assert weights["fc.bias"] == [0x3F80, 0xBF80]
    assert weights["fc.weight"] == [EXPECTED_WEIGHT.get(i, 0) for i in range(2 * 66)]
    assert weights["tied.weight"] == weights["fc.weight"]


def test_our_writer_writes_the_example(document_pack: Path, tmp_path: Path) -> None:
    matrix = np.zeros(2 * 66, np.uint16)
    for place, bits in EXPECTED_WEIGHT.items():
        matrix[place] = bits
    builder = LayerBuilder("fc")
    builder.add_dense("fc.bias", "BF16", (2,), np.array([0x3F80, 0xBF80], np.uint16))
    builder.add_raw("fc.weight", "BF16", matrix.reshape(2, 66))
    ours = tmp_path / "ours"
    ours.mkdir()
    shard, layers = write_shard(ours / shard_file_name(0), 0, [builder.finish()])
    index = PackIndex(
        version=1,
        tool="example",
        source_digest="",
        shards=(shard,),
        layers=tuple(layers),
        aliases={"tied.weight": "fc.weight"},
        metadata={"format": "pt"},
    )
    write_index(ours, index)
    name = shard_file_name(0)
    assert (ours / name).read_bytes() == (document_pack / name).read_bytes()
    assert open_pack(document_pack) == open_pack(ours)


def test_our_slot_table_is_the_one_of_the_document() -> None:
    buffer = bytearray(table_bytes(1, 1))
    table = SlotTable.create(buffer, slot_count=1, lease_count=1, epoch=5)
    table.set_slot(
        0,
        generation=3,
        arena=0,
        offset=2 << 20,
        nbytes=4096,
        state=SlotState.RESIDENT,
        key=slot_key("2079c627965798b8", "fc"),
    )
    table.set_lease(0, lease=9, pid=0x1234, start_time=1000, slot=0, generation=3)
    assert bytes(buffer) == image(160, hex_blocks()[2])


def test_our_frame_is_the_one_of_the_document() -> None:
    message = {"id": 1, "op": "release", "leases": [7, 258]}
    shown = b"".join(hex_blocks()[3].values())
    assert encode(message) == shown
    decoder = FrameDecoder()
    decoder.feed(shown)
    assert list(decoder) == [message]
