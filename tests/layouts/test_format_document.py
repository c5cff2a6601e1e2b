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

from tierd_layouts import exponent_packed, quantised
from tierd_layouts.container import (
    LayerBuilder,
    open_pack,
    read_layer,
    shard_file_name,
    tensor_bits,
    validate_layer,
    write_index,
    write_shard,
)
from tierd_layouts.index import PackIndex
from tierd_layouts.slot_entries import SlotState, slot_key, table_bytes
from tierd_layouts.slot_table import SlotTable
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
    if tensor["codec"] in ("exponent-packed", "int8", "int4"):
        return read_packed(tensor, arrays)
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


def read_packed(tensor: dict[str, Any], arrays: dict[str, bytes]) -> list[int]:
    """Section 3, one element at a time."""
    rows, cols = tensor["shape"]
    tile_cols = (cols + 63) // 64
    elements = [0] * (rows * cols)
    offsets = memoryview(arrays["offsets"]).cast("I")
    if "bitmap" in arrays:
        words = memoryview(arrays["bitmap"]).cast("Q").tolist()
    for tile in range(len(offsets) - 1):
        top, left = tile // tile_cols * 64, tile % tile_cols * 64
        kept = [
            (r, c)
            for r in range(min(64, rows - top))
            for c in range(min(64, cols - left))
            if "bitmap" not in arrays or words[tile * 64 + r] >> c & 1
        ]
        record = arrays["values"][offsets[tile] * 16 : offsets[tile + 1] * 16]
        if tensor["codec"] == "exponent-packed":
            head = memoryview(arrays["heads"]).cast("I")[tile]
            found = unpack_exponents(record, len(kept), head, 4 if tensor["dtype"] == "F32" else 2)
        else:
            groups = (cols + tensor["group"] - 1) // tensor["group"]
            first = (top // 64 * groups + left // tensor["group"]) * 64
            scales = memoryview(arrays["scales"]).cast("H")[first : first + 64]
            found = [
                round_to(tensor["dtype"], level(record, i, tensor["codec"]) * upper_half(scales[r]))
                for i, (r, _) in enumerate(kept)
            ]
        for (r, c), bits in zip(kept, found, strict=True):
            elements[(top + r) * cols + left + c] = bits
    return elements


def unpack_exponents(record: bytes, n: int, head: int, item: int) -> list[int]:
    base, planes, escapes = head & 0xFF, head >> 8 & 0xFF, head >> 16
    byte_plane, bit_plane = (n + 7) // 8 * 8, (n + 63) // 64 * 8
    after = (item - 1) * byte_plane
    end = after + planes * bit_plane
    tops = []
    for i in range(n):
        bits = [record[after + p * bit_plane + i // 8] >> i % 8 & 1 for p in range(planes)]
        tops.append(base + sum(bit << p for p, bit in enumerate(bits)))
    for e in range(escapes):
        number, top, zero = struct.unpack_from("<HBB", record, end + 4 * e)
        assert zero == 0
        tops[number] = top
    assert len(record) == (end + 4 * escapes + 15) // 16 * 16
    found = []
    for i in range(n):
        low = bytes(record[b * byte_plane + i] for b in range(item - 1))
        u = int.from_bytes(low + bytes([tops[i]]), "little")
        found.append(u >> 1 | (u & 1) << (item * 8 - 1))
    return found


def level(record: bytes, i: int, codec: str) -> int:
    if codec == "int8":
        return int.from_bytes(record[i : i + 1], signed=True)
    half = record[i // 2] >> i % 2 * 4 & 0xF
    return half - 16 if half > 7 else half


def upper_half(bits: int) -> float:
    (value,) = struct.unpack("<f", struct.pack("<I", bits << 16))
    return float(value)


def round_to(dtype: str, value: float) -> int:
    if dtype == "F16":
        return int.from_bytes(struct.pack("<e", value), "little")
    bits = int.from_bytes(struct.pack("<f", value), "little")
    if dtype == "F32":
        return bits
    below, rest = bits >> 16, bits & 0xFFFF
    return below + (rest > 0x8000 or (rest == 0x8000 and below & 1 == 1))


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
    text = image(12288, length, {8: header.encode().ljust(4088)}, data)
    (tmp_path / "tierd-00001.safetensors").write_bytes(text)
    (tmp_path / "tierd.json").write_text(index)
    return tmp_path


EXPECTED_WEIGHT = {0: 0x3F80, 2: 0x8000, 66 + 1: 0x4000, 66 + 65: 0x7FC1}
EXPECTED_UP = [0x3F80, 0, 0xC000, 0x3FC0, 0x4040, 0xBF80, 0x3580, 0x4000]


def test_the_example_is_a_pack_for_both_readers(document_pack: Path) -> None:
    index = open_pack(document_pack)
    assert index.digest == "bba31c6e3f6e0af2"
    weights = read_pack(document_pack)
    assert weights["fc.bias"] == [0x3F80, 0xBF80]
    assert weights["fc.weight"] == [EXPECTED_WEIGHT.get(i, 0) for i in range(2 * 66)]
    assert weights["tied.weight"] == weights["fc.weight"]
    assert weights["q.up"] == EXPECTED_UP
    assert weights["q.down"] == [0x3F75, 0xBF0C, 0x3E8C]  # 0.95703125, -0.546875, 0.2734375
    for name in ("q.up", "q.down"):
        layer, tensor = index.tensor(name)
        content = read_layer(document_pack, index, layer)
        validate_layer(content, layer)
        assert tensor_bits(content, tensor).tolist() == [weights[name]]


def test_our_writer_writes_the_example(document_pack: Path, tmp_path: Path) -> None:
    matrix = np.zeros(2 * 66, np.uint16)
    for place, bits in EXPECTED_WEIGHT.items():
        matrix[place] = bits
    builder = LayerBuilder("fc")
    builder.add_dense("fc.bias", "BF16", (2,), np.array([0x3F80, 0xBF80], np.uint16))
    builder.add_raw("fc.weight", "BF16", matrix.reshape(2, 66))
    other = LayerBuilder("q")
    other.add_matrix(
        "q.up", exponent_packed.encode(np.array([EXPECTED_UP], np.uint16), "BF16", masked=True)
    )
    down = np.array([[0x3F80, 0xBF00, 0x3E80]], np.uint16)
    other.add_matrix("q.down", quantised.encode(down, "BF16", codec="int4", group=64, masked=False))
    ours = tmp_path / "ours"
    ours.mkdir()
    shard, layers = write_shard(ours / shard_file_name(0), 0, [builder.finish(), other.finish()])
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
        key=slot_key("bba31c6e3f6e0af2", "fc"),
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
