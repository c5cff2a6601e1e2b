from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tierd_layouts.container import open_pack
from tierd_layouts.safetensors_file import parse_header
from tierd_tools import unpack_plan
from tierd_tools.pack import pack
from tierd_tools.unpack_plan import Piece, lay_out, named_tensors

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tierd_layouts.safetensors_file import Header


def headers(layout: unpack_plan.Layout) -> list[Header]:
    """As a reader finds them in files that are as long as they ought to be."""
    found = []
    for text in layout.headers:
        nbytes = layout.tensor_bytes + sum(map(len, layout.headers))
        if len(layout.headers) > 1:
            nbytes = len(text) + 8
        found.append(parse_header(text[8:], file_bytes=nbytes, where="shard"))
    return found


def test_pieces_are_ordered_so_that_each_is_aligned_to_its_elements() -> None:
    weights = [
        [Piece("b", "U8", (3,)), Piece("a", "I64", (2,))],
        [Piece("d", "BF16", (5,)), Piece("c", "F32", (1,))],
        [Piece("e", "BF16", (0,))],
    ]
    layout = lay_out(weights, {"format": "pt"})
    (header,) = headers(layout)
    assert list(header.entries) == ["a", "c", "d", "e", "b"]
    assert header.metadata == {"format": "pt"}
    for name, entry in header.entries.items():
        item = {"I64": 8, "F32": 4, "BF16": 2, "U8": 1}[entry.dtype]
        assert layout.places[name].offset == len(layout.headers[0]) + entry.begin
        assert layout.places[name].offset % item == 0
    assert layout.files == ("model.safetensors",)
    assert layout.tensor_bytes == 3 + 16 + 10 + 4


def test_a_weight_is_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_plan, "SHARD_BYTES", 8)
    weights = [[Piece(f"{i}.{part}", "U8", (4,)) for part in "xy"] for i in range(3)]
    weights.append([Piece("large", "U8", (8,))])
    layout = lay_out(weights, {})
    assert [list(header.entries) for header in headers(layout)] == [
        *(["0.x", "0.y"], ["1.x", "1.y"], ["2.x", "2.y"], ["large"])
    ]
    index = json.loads(layout.shard_index())
    assert index["weight_map"]["1.y"] == "model-00002-of-00004.safetensors"
    assert sorted(set(index["weight_map"].values())) == list(layout.files)
    assert index["metadata"]["total_size"] == 32


def test_tied_tensors_follow_the_one_that_is_stored(tmp_path: Path, checkpoints: Any) -> None:
    pack(checkpoints.write(tmp_path / "m", checkpoints.llama(layers=1)), tmp_path / "p")
    names = [named.name for named in named_tensors(open_pack(tmp_path / "p"))]
    assert names[:2] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert sorted(names) == sorted(checkpoints.llama(layers=1))
