from __future__ import annotations

import contextlib
import json
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tierd_layouts import safetensors_file
from tierd_layouts.errors import (
    DataHoles,
    HeaderEntryInvalid,
    HeaderNotJson,
    HeaderTooLarge,
    ShardError,
    ShardTrailingBytes,
    ShardTruncated,
    TensorBytesWrong,
    UnknownDtype,
)
from tierd_layouts.safetensors_file import Entry, build_header, parse_header, read_header

if TYPE_CHECKING:
    from pathlib import Path


def entry(dtype: str = "U8", shape: Any = (4,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def parse(members: Any, data_bytes: int = 4) -> safetensors_file.Header:
    text = members if isinstance(members, bytes) else json.dumps(members).encode()
    return parse_header(text, file_bytes=8 + len(text) + data_bytes, where="x.safetensors")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.uint8)}
    path.write_bytes(save(tensors, {"format": "pt"}))
    return path


def test_a_file_of_the_safetensors_package_is_read(file: Path) -> None:
    header = read_header(file)
    assert header.entries == {"a": Entry("F32", (2, 3), 0, 24), "b": Entry("U8", (0,), 24, 24)}
    assert header.metadata == {"format": "pt"}
    assert file.stat().st_size == header.data_start + 24


def test_a_descriptor_is_read_and_stays_open(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        assert read_header(fd) == read_header(file)
        os.fstat(fd)
    finally:
        os.close(fd)


def test_our_headers_end_on_a_page_and_open_with_the_safetensors_package() -> None:
    header = build_header(
        {"ä.weight": Entry("U16", (2, 1), 0, 4), "empty": Entry("F32", (0, 5), 4, 4)},
        {"format": "pt"},
    )
    assert len(header) == 4096
    tensors = load(header + b"\1\0\2\0")
    assert tensors["ä.weight"].tolist() == [[1], [2]]
    assert tensors["empty"].shape == (0, 5)
    again = parse_header(header[8:], file_bytes=4100, where="x")
    assert again.entries["ä.weight"] == Entry("U16", (2, 1), 0, 4)
    assert again.data_start == 4096


def test_a_header_without_tensors_is_a_file() -> None:
    assert load(build_header({}, {})) == {}
    assert not parse({}, 0).entries


def test_missing_metadata_and_empty_metadata_are_told_apart() -> None:
    assert not parse({"a": entry()}).has_metadata
    assert parse({"__metadata__": {}, "a": entry()}).has_metadata


# --------------------------------------------------------------------------------------------------
# What can be wrong


@pytest.mark.parametrize("nbytes", [0, 7])
def test_a_file_without_a_length_is_truncated(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(nbytes))
    with pytest.raises(ShardTruncated, match=r"x.safetensors: ends at"):
        read_header(path)


def test_a_file_that_ends_inside_its_header_or_its_data_is_truncated(file: Path) -> None:
    content = file.read_bytes()
    for nbytes in (9, read_header(file).data_start - 1, len(content) - 24, len(content) - 1):
        file.write_bytes(content[:nbytes])
        with pytest.raises(ShardTruncated, match=r"model.safetensors: "):
            read_header(file)


def test_a_file_that_goes_on_after_its_last_tensor_is_refused(file: Path) -> None:
    with file.open("ab") as out:
        out.write(b"x")
    with pytest.raises(ShardTrailingBytes, match="the file goes on to"):
        read_header(file)


def test_a_header_above_100_mb_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for nbytes in (100_000_001, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", nbytes) + b"{}")
        with pytest.raises(HeaderTooLarge, match=f"{nbytes} bytes, the limit is 100000000"):
            read_header(path)


def test_a_header_that_would_be_too_large_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_BYTES", 4088)
    entries = {f"tensor.{i}": Entry("U8", (0,), 0, 0) for i in range(40)}
    assert len(build_header(entries, {})) == 4096
    entries = {f"tensor.{i}": Entry("U8", (0,), 0, 0) for i in range(100)}
    with pytest.raises(HeaderTooLarge, match="100 tensors need"):
        build_header(entries, {})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": NaN}',
        b'{"a": 1.5}',
        b' {"__metadata__": {}}',
        b"\xff\xfe{}",
        b'{"a": 1, "a": 1}',
        b'{"\\ud800": 1}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"{}x",
    ],
    ids=lambda text: text[:20].decode("latin-1"),
)
def test_a_header_that_is_not_one_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(HeaderNotJson, match=r"x.safetensors: "):
        parse(text)


@pytest.mark.parametrize(
    "members",
    [
        {"a": 5},
        {"a": {}},
        {"a": {"dtype": "U8", "shape": [4]}},
        {"a": {**entry(), "more": 1}},
        {"a": entry(shape="4")},
        {"a": entry(shape=[True])},
        {"a": entry(shape=[-4])},
        {"a": entry(shape=[2**64])},
        {"a": entry(begin=4, end=0)},
        {"a": entry(begin="0")},
        {"a": {**entry(), "data_offsets": [0, 2, 4]}},
        {"a": {**entry(), "data_offsets": 7}},
        {"__metadata__": {"a": 1}},
        {"__metadata__": ["a"]},
    ],
    ids=str,
)
def test_entries_with_missing_or_mistyped_fields_are_refused(members: dict[str, Any]) -> None:
    with pytest.raises(HeaderEntryInvalid):
        parse(members)


def test_deep_nesting_in_a_field_is_an_error_with_a_short_text() -> None:
    nested = b"[" * 400 + b"]" * 400
    text = b'{"a":{"dtype":"U8","shape":' + nested + b',"data_offsets":[0,4]}}'
    with pytest.raises(HeaderEntryInvalid) as caught:
        parse(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("dtype", ["F7", "u8", "", "BF16 ", None])
def test_an_unknown_dtype_is_refused_by_name(dtype: Any) -> None:
    with pytest.raises(UnknownDtype, match="known are BOOL"):
        parse({"a": entry(dtype=dtype)})


@pytest.mark.parametrize("shape", [[3], [5], [], [2, 3], [2**62, 2**62], [0]])
def test_offsets_that_do_not_hold_the_shape_are_refused(shape: list[int]) -> None:
    with pytest.raises(TensorBytesWrong, match="hold 4 bytes"):
        parse({"a": entry(shape=shape)})


def test_holes_and_overlaps_are_refused() -> None:
    with pytest.raises(DataHoles, match="'a' begins at 1, but the header ended at 0"):
        parse({"a": entry(begin=1, end=5)}, 5)
    with pytest.raises(DataHoles, match="'b' begins at 8, but 'a' ended at 4"):
        parse({"b": entry(begin=8, end=12), "a": entry()}, 12)
    with pytest.raises(DataHoles, match="'b' begins at 2, but 'a' ended at 4"):
        parse({"a": entry(), "b": entry(begin=2, end=6)}, 6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_mutated_file_is_read_like_the_safetensors_package_or_refused(
    data: st.DataObject,
) -> None:
    """Whatever we accept, the package accepts too; what we refuse has a name."""
    content = bytearray(save({"a": np.arange(3, dtype=np.uint8), "b": np.zeros((2, 2), np.int16)}))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["flip", "digit", "cut", "grow"])):
            case "flip":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "digit":
                content[place] = data.draw(st.sampled_from(b'0123456789"[]{},:'))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 9))]
            case _:
                content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        if not content:
            return
    fd = os.memfd_create("mutated")
    try:
        os.write(fd, content)
        try:
            header = read_header(fd)
        except ShardError:
            return
    finally:
        os.close(fd)
    try:
        tensors = load(bytes(content))
    except SafetensorError as error:
        pytest.fail(f"we accept {bytes(content)!r}, the package says {error}")
    for name, tensor in tensors.items():
        assert tensor.shape == header.entries[name].shape
        assert tensor.nbytes == header.entries[name].nbytes


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=80))
def test_an_arbitrary_header_is_refused_by_name_or_parsed(text: bytes) -> None:
    with contextlib.suppress(ShardError):
        assert parse_header(text, file_bytes=8 + len(text), where="x").data_start == 8 + len(text)
